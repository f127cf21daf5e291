"""Fine-tune by a config: python train/finetune.py CONFIG [section.field=value ...]. The same as `neuroada train`."""

import sys

from neuroada_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
