"""Evaluation: rows are scored, and the figures say how sure they are."""
