"""Sharing an adapter on the Hugging Face hub: the folder with its model card, and the upload."""
