"""Fine-tune on several GPUs with `jax.pmap`: python train/finetune_pmap.py CONFIG [section.field=value ...].

The same as `neuroada train CONFIG parallel.mode=pmap`. The step is that of `neuroada_jax.training.modes.Pmap`:

    def body(state, rows):                           # on every device: the complete state, its own rows of the batch
        local = sums(state, rows)                    # summed loss, number of labels, summed gradients
        return update(state, lax.psum(local, "data"))  # one reduction; then the division, AdamW and the resident write

    step = jax.pmap(body, "data", in_axes=(None, 0), out_axes=None, donate_argnums=0)

`sums` and `update` are the two halves of the step of one device (`neuroada_jax.training.step`). Only the values have
gradients, so a step sends 4 bytes for each value and nothing else.
"""

import sys

from neuroada_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:], "parallel.mode=pmap"]))
