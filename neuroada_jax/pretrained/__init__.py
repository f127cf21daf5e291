"""Pretrained models on disk: found, read and written."""
