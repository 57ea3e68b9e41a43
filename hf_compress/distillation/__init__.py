"""A large teacher trains a small student inside any Trainer."""
