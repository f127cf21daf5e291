"""Side-by-side measurements, one command each: `make bench-NAME` prints a table and writes benchmarks/results/NAME.json."""
