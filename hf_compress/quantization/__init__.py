"""Integer weights: loading in 8 and 4 bit."""
