"""`evaluate.Metric` subclasses that import without a hub."""
