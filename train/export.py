"""Export an adapter to another format: python train/export.py ADAPTER --to FORMAT --out DIR. As `neuroada export`."""

import sys

from neuroada_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
