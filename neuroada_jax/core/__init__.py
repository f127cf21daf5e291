"""The core: arrays and trees alone. It knows neither Flax nor files."""
