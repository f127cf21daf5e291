"""The command line: neuroada train | evaluate | tasks | lm-eval | generate | plan | inspect | merge | export | import."""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from neuroada_jax import __version__, commands
from neuroada_jax.errors import NeuroadaWarning, UserError

# Without PyTorch, transformers says when it is imported that no models will be available. Ours are, and need none.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for an error that is the user's to mend, 130 when interrupted."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes no more overrides once an option came between: `train run.yaml --overwrite bypass.k=2`.
    if rest and hasattr(parsed, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        parsed.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return one_line_errors(lambda: parsed.run(parsed))


def one_line_errors(work: Callable[[], None]) -> int:
    """Runs `work` and returns the process's exit code, with errors that are for the user as one line each."""
    try:
        with _one_line_warnings():
            work()
    except UserError as error:
        sys.stderr.write(f"neuroada: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("neuroada: interrupted\n")
        return 130
    except BrokenPipeError:  # `neuroada ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own flush complains at exit
    return 0


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    def show(message: Any, category: Any, *_: Any, **__: Any) -> None:
        if issubclass(category, NeuroadaWarning):  # other libraries' are not for the person
            sys.stderr.write(f"neuroada: warning: {message}\n")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("neuroada", description="Sparse fine-tuning of language models with NeuroAda, in JAX.")
    parser.add_argument("--version", action="version", version=f"neuroada-jax {__version__}")
    found = parser.add_subparsers(required=True, metavar="command")

    train = found.add_parser("train", help="fine-tune as a config says")
    train.add_argument("config", help="YAML file of the run")
    train.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the config")
    train.add_argument("--overwrite", action="store_true", help="replace a run that is in the output folder already")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint (training.save_every)")
    train.add_argument(
        "--force-resume", action="store_true", help="with --resume: although the config, data or model has changed"
    )
    train.add_argument("--seeds", help="a run for each of these, such as 42,43,44; as `seeds: [...]` in the config")
    train.add_argument("--json", action="store_true", help="print results.json and nothing else on standard output")
    train.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0, where a run has several; auto: SLURM says (docs/scaling.md)",
    )
    train.add_argument("--processes", type=int, help="how many there are, with --coordinator HOST:PORT")
    train.add_argument("--process", type=int, help="which this is, from 0, with --coordinator HOST:PORT")
    train.set_defaults(run=commands.train)

    evaluate = found.add_parser("evaluate", help="score a base model, or one with an adapter, on a file of rows")
    _model_options(evaluate)
    evaluate.add_argument("--data", help="rows: a file, a datasets directory or a hub name (default: the task's)")
    evaluate.add_argument("--split", help="split, where --data has several (default: test)")
    evaluate.add_argument("--task", default="instruct", help="how rows are read (default: instruct)")
    evaluate.add_argument("--style", help="prompt style (default: the task's)")
    evaluate.add_argument("--method", choices=["generate", "choices"], help="how answers are found (default: generate)")
    evaluate.add_argument("--limit", type=int, help="score the first rows only")
    evaluate.add_argument("--max-new-tokens", type=int, help="longest generation (default: the task's)")
    evaluate.add_argument("--max-length", type=int, help="an encoder's longest row (default: as many as it has positions)")
    evaluate.add_argument("--batch-size", type=int, default=16, help="prompts or examples at a time (default: 16)")
    evaluate.add_argument(
        "--trained-on", metavar="ROWS", help="training rows, to score the questions apart that are there too"
    )
    evaluate.add_argument("--out", help="file for every prediction, as JSON lines (default: runs/evaluate/TASK.jsonl)")
    evaluate.set_defaults(run=commands.evaluate)

    tasks = found.add_parser("tasks", help="every task with its metric, prompt style and data")
    tasks.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    tasks.set_defaults(run=commands.tasks)

    lm_eval = found.add_parser("lm-eval", help="score a model on tasks of the lm-evaluation-harness (extra `eval`)")
    _model_options(lm_eval)
    lm_eval.add_argument("--tasks", required=True, help="names or patterns, with commas between them, or YAML files")
    lm_eval.add_argument("--include-path", help="folder of further task YAML files")
    lm_eval.add_argument("--num-fewshot", type=int, help="examples in front of a question (default: the task's)")
    lm_eval.add_argument("--limit", type=int, help="score the first rows of each task only")
    lm_eval.add_argument("--batch-size", type=int, default=16, help="texts at a time (default: 16)")
    lm_eval.add_argument("--apply-chat-template", action="store_true", help="ask as the tokenizer's chat template does")
    lm_eval.add_argument("--out", help="JSON file for results, task configs and every row's answer")
    lm_eval.set_defaults(run=commands.lm_eval)

    generate = found.add_parser("generate", help="continue a prompt: greedily, by sampling or by beam search")
    _model_options(generate)
    generate.add_argument("--prompt", required=True, action="append", help="text to continue; may be given several times")
    generate.add_argument("--style", default="verbatim", help="prompt style: verbatim (default), plain, alpaca, chat")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="longest continuation (default: 64)")
    generate.add_argument("--temperature", type=float, help="draw at random, with the logits divided by this")
    generate.add_argument("--top-k", type=int, help="draw at random, from this many likeliest tokens")
    generate.add_argument("--top-p", type=float, help="draw at random, from the likeliest with this probability together")
    generate.add_argument("--seed", type=int, help="of what is drawn (default: 0)")
    generate.add_argument("--beams", type=int, default=1, help="hypotheses of a beam search (default: 1, none)")
    generate.add_argument(
        "--length-penalty", type=float, default=1.0, help="above 0 favours longer hypotheses (default: 1)"
    )
    generate.add_argument("--early-stopping", action="store_true", help="end a search once as many as --beams have ended")
    generate.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: what was said is less likely")
    generate.add_argument("--no-repeat-ngram", type=int, default=0, help="so many tokens in a row never come twice")
    generate.add_argument("--stop", action="append", default=[], help="text that ends a continuation; may be repeated")
    generate.set_defaults(run=commands.generate)

    plan = found.add_parser("plan", help="what a config would need of a machine; reads no weights, runs nothing")
    plan.add_argument("config", help="YAML file of the run")
    plan.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the config")
    plan.add_argument("--target", default="cpu", help="cpu (this machine), h100, h200, a100, l40s, rtx4090 (default: cpu)")
    plan.add_argument("--devices", type=int, help="how many share a batch, as the section parallel says (default: 1)")
    plan.add_argument("--json", action="store_true", help="print one JSON object and nothing else on standard output")
    plan.set_defaults(run=commands.plan)

    inspect = found.add_parser("inspect", help="neurons, values and bytes of every module of a model or adapter")
    inspect.add_argument("path", help="model directory, hub id, .gguf file or adapter directory")
    inspect.add_argument("--k", type=int, default=1, help="connections per neuron, for a model (default: 1)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=commands.inspect)

    merge = found.add_parser("merge", help="write base + adapter as a Hugging Face model directory")
    _model_options(merge, adapter_required=True)
    merge.add_argument("--out", required=True, help="the directory to make")
    merge.set_defaults(run=commands.merge)

    export = found.add_parser(
        "export", help="write an adapter for PyTorch libraries: PEFT, transformers, the official code"
    )
    export.add_argument("adapter", help="adapter directory")
    export.add_argument(
        "--to", required=True, choices=["official", "peft-supertuning", "peft-shira", "huggingface"], help="the format"
    )
    export.add_argument("--out", required=True, help="the directory to make")
    export.add_argument("--model", help="the base (default: the one that the adapter names)")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "auto"], help="of the base (default: the adapter's)")
    export.add_argument("--verify", action="store_true", help="load the export in its library; fail if it differs")
    export.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    export.set_defaults(run=commands.export)

    imports = found.add_parser("import", help="turn an adapter of another library into one of this library")
    imports.add_argument("directory", help="the adapter")
    imports.add_argument(
        "--from",
        dest="source_format",
        required=True,
        choices=["official", "peft-supertuning", "peft-shira"],
        help="the format",
    )
    imports.add_argument("--base", required=True, help="the model it belongs to: directory, hub id or .gguf file")
    imports.add_argument("--out", required=True, help="the adapter directory to make")
    imports.add_argument(
        "--dtype", choices=["float32", "bfloat16", "auto"], default="auto", help="of the base (default: auto)"
    )
    imports.add_argument("--allow-pickle", action="store_true", help="read the official format's pickled positions")
    imports.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    imports.set_defaults(run=commands.import_)
    return parser


def _model_options(parser: argparse.ArgumentParser, *, adapter_required: bool = False) -> None:
    parser.add_argument(
        "--model", help="model directory, hub id, .gguf file or package:NAME/FILE (default: the adapter's base)"
    )
    parser.add_argument("--adapter", required=adapter_required, help="adapter directory")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "auto"], help="of the weights (default: the adapter's, else auto)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


if __name__ == "__main__":
    sys.exit(main())
