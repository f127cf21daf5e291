"""Write the rows of PEFT's MetaMathQA comparison: python train/metamath_rows.py [--out data/metamath].

As its data.py (huggingface/peft, method_comparison/MetaMathQA): the rows of meta-math/MetaMathQA whose query and response
have at most 1,300 characters together, and GSM8K's test rows. configs/metamath-llama3.2-3b-*.yaml read them.
"""

import argparse
import json
import sys
from pathlib import Path

from neuroada_jax import console, files
from neuroada_jax.cli import one_line_errors
from neuroada_jax.data.rows import load_rows

LARGEST = 1300  # characters of a query, a space and a response


def main() -> None:
    """Read both data sets and write train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--metamath", default="meta-math/MetaMathQA", help="hub id, or a file with query and response")
    parser.add_argument("--gsm8k", default="openai/gsm8k:main", help="hub id, or a file with question and answer")
    parser.add_argument("--out", type=Path, default=Path("data/metamath"), help="folder of the two files")
    parsed = parser.parse_args()
    rows = load_rows(parsed.metamath, "train").rows
    short = [row for row in rows if len(f"{row['query']} {row['response']}") <= LARGEST]
    parsed.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", short), ("test", load_rows(parsed.gsm8k, "test").rows)):
        files.write_text(parsed.out / f"{name}.jsonl", "".join(json.dumps(dict(row)) + "\n" for row in chosen))
        console.say(f"{parsed.out / name}.jsonl: {len(chosen):,} rows")


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
