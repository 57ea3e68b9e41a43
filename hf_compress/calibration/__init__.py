"""A few batches through a model, layer by layer, for what is decided without training."""
