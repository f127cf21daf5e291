"""Compiles LLaMA-7B's training step for an H100, on a machine without one, and checks its bytes against stored bounds.

    make check-h100

Exits with 1 where a step needs more than its bound. The bounds are a little above what was measured when they were set;
whoever makes a step smaller lowers its bound here.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax

from neuroada_jax import console, files
from neuroada_jax.adapters.native import installed_versions
from neuroada_jax.planning import plan
from neuroada_jax.training import config_file

RESULTS = Path(__file__).parent / "results"
LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
# (k, rows of 512 tokens, remat): bytes, every position labelled.
BOUNDS = {
    (1, 16, "full"): 16.9e9,
    (20, 16, "full"): 18.6e9,
    (1, 16, "names"): 39.8e9,
    (1, 2, "full"): 14.5e9,
    (1, 2, "none"): 17.6e9,
}


def main() -> int:
    """Compiles, prints the table, saves benchmarks/results/check_h100.json."""
    jax.config.update("jax_platforms", "cpu")
    rows = []
    with tempfile.TemporaryDirectory() as model:
        (Path(model) / "config.json").write_text(json.dumps(LLAMA_7B))
        for (k, batch_size, remat), bound in BOUNDS.items():
            content = {
                "name": "llama-7b",
                "model": {"path": model, "dtype": "bfloat16"},
                "bypass": {"k": k},
                "data": {"train": "none", "max_length": 512},
                "optimizer": {"learning_rate": 8e-3},
                "training": {"steps": 1, "batch_size": batch_size, "remat": remat},
            }
            made = plan.plan(config_file.from_dict(content, "check_h100"), "h100")
            if made["attention"] != "cudnn":
                sys.exit(
                    f"not compiled as it would run: {'; '.join(made['notes'])}; `make check-h100` installs what it needs"
                )
            rows.append({key: made[key] for key in ("total_bytes", "bytes", "compile_seconds")})
            rows[-1] |= {"k": k, "rows": batch_size, "remat": remat, "bound": bound}
    files.write_text(
        RESULTS / "check_h100.json",
        json.dumps({"settings": {"versions": installed_versions()}, "rows": rows}, indent=1) + "\n",
    )
    console.table(
        "LLaMA-7B, bfloat16, rows of 512 tokens, compiled for an H100",
        ("k", "rows", "remat", "total", "temporaries", "bound", "compiled in"),
        [
            (
                str(row["k"]),
                str(row["rows"]),
                row["remat"],
                console.size(row["total_bytes"]),
                console.size(row["bytes"]["temporaries"]),
                console.size(row["bound"]),
                f"{row['compile_seconds']:.0f} s",
            )
            for row in rows
        ],
    )
    above = [row for row in rows if row["total_bytes"] > row["bound"]]
    for row in above:
        excess = console.size(row["total_bytes"] - row["bound"])
        console.say(f"k = {row['k']}, {row['rows']} rows, remat {row['remat']}: {excess} above the bound")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
