"""Scoring a model on rows, with confidence intervals."""
