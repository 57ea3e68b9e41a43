"""Choosing a compressed model by experiment, under limits in the units of its user."""
