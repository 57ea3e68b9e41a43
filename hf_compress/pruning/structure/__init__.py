"""Neurons, heads, experts, layers and hidden features, really removed: smaller ordinary models."""
