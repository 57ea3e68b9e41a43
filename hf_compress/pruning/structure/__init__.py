"""Neurons, heads, experts and layers that are really removed: smaller ordinary models."""
