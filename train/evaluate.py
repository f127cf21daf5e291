"""Score a model or an adapter: python train/evaluate.py --model M --data FILE ... The same as `neuroada evaluate`."""

import sys

from neuroada_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
