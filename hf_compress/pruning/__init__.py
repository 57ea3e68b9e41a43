"""Scores, exact selection and masks: which weights stay."""
