"""Compressed models in the formats of other runtimes, and what is left of them there."""
