"""Adapters and models on disk, one file format each."""
