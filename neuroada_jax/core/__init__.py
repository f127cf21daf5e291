"""The method itself, on arrays and trees: independent of Flax, of model code and of files."""
