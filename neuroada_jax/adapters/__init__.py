"""Adapters on disk, in our own format and in those of other libraries."""
