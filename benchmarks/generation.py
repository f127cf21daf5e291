"""Greedy generation with a key/value cache: prefill and decode in tokens per second, against transformers' `generate`.

    make bench-generation        (or: python -m benchmarks.generation --model MODEL --batch-sizes 1 8)

Both libraries have the same float32 weights and the same prompts of random tokens, and nothing ends a continuation. A
prefill is a call for one new token, and takes in the prompts; a decode is what a call for `--new` more costs besides,
refused where noise hides it. All figures are from the fastest call of each kind, since what disturbs a call only makes
it slower. `speedup` is transformers' seconds over a row's own.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from benchmarks import common
from benchmarks.common import Column, Row
from neuroada_jax.cli import one_line_errors
from neuroada_jax.errors import UserError
from neuroada_jax.generation.generate import generate
from neuroada_jax.pretrained.load import load_model

OURS, THEIRS = "neuroada-jax", "transformers"
COLUMNS = (
    Column("method", "method"),
    Column("phase", "phase"),
    Column("batch", "batch"),
    common.SECONDS,
    Column("tokens/s", "tokens_per_second", "{:,.0f}".format),
    Column("speedup", "speedup", "{:.2f}".format),
)
Generate = Callable[[np.ndarray, int], object]
Times = dict[tuple[str, int, int], list[float]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints the table and saves benchmarks/results/generation.json."""
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded after the first")
    settings = parser.parse_args(arguments)

    libraries = {OURS: _ours(settings.model)}
    if not common.missing("torch", "transformers"):
        libraries[THEIRS] = _theirs(settings.model)
    rng = np.random.default_rng(0)
    runs: dict[tuple[str, int, int], Callable[[], object]] = {}
    for batch in settings.batch_sizes:
        prompts = rng.integers(4, 256, (batch, settings.prompt), dtype=np.int32)
        for name, run in libraries.items():
            for new in (1, 1 + settings.new):
                runs[name, batch, new] = lambda run=run, prompts=prompts, new=new: run(prompts, new)
    times = common.alternate(runs, settings.repeats, warmups=1, title="generation")
    common.report("generation", "greedy generation, float32", COLUMNS, list(_rows(times, settings)), settings)


def _ours(source: str) -> Generate:
    base = load_model(source, "float32")

    def run(prompts: np.ndarray, new: int) -> object:
        rows = prompts.tolist()
        return generate(base.model, base.params, rows, max_new_tokens=new, eos_ids=[], batch_size=len(rows))

    return run


def _theirs(source: str) -> Generate:
    import torch

    from benchmarks import torch_methods

    model = torch_methods.build_model(torch_methods.load(source, "float32")).eval()
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.eos_token_id = None
    gc.collect()

    def run(prompts: np.ndarray, new: int) -> object:
        ids = torch.from_numpy(prompts.astype(np.int64)).to(model.device)
        options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        if made.shape[1] != prompts.shape[1] + new:
            raise ValueError(f"transformers made {made.shape[1] - prompts.shape[1]} tokens, expected {new}")
        return made

    return run


def _rows(times: Times, settings: argparse.Namespace) -> Iterator[Row]:
    for batch in settings.batch_sizes:
        for phase in ("prefill", "decode"):
            found = {name: _seconds(times, name, batch, phase, settings.new) for name, each, _ in times if each == batch}
            tokens = batch * (settings.prompt if phase == "prefill" else settings.new)
            for name, seconds in found.items():
                yield {
                    "method": name,
                    "phase": phase,
                    "batch": batch,
                    "k": None,
                    "dtype": "float32",
                    "shape": [batch, settings.prompt, settings.new],
                    "seconds": seconds,
                    "tokens_per_second": tokens / seconds,
                    "speedup": found[THEIRS] / seconds if THEIRS in found else None,
                    "peak_bytes": None,
                }


def _seconds(times: Times, name: str, batch: int, phase: str, new: int) -> float:
    """Raises UserError where the decode is too short to be told from noise."""
    first, whole = min(times[name, batch, 1]), min(times[name, batch, 1 + new])
    if whole <= first:
        raise UserError(
            f"--new: {name} took {first:.2g} s for 1 token and {whole:.2g} s for {1 + new} (batch {batch}), too few to "
            "measure decoding; give more, or more --repeats"
        )
    return first if phase == "prefill" else whole - first


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
