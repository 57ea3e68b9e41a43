"""Pruning a trained model in minutes, layer by layer, from a little calibration data."""
