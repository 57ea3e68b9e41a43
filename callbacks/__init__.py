"""Adapters between the Trainer and the methods: they decide when, never how."""
