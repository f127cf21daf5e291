"""Data: a row in a file becomes a batch of arrays."""
