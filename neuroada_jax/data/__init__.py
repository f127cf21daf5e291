"""From a row in a file to a batch of arrays."""
