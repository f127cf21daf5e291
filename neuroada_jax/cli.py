"""The command line: neuroada train | evaluate | tasks | lm-eval | generate | plan | inspect | merge | export | import."""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from neuroada_jax import __version__, console
from neuroada_jax.errors import NeuroadaWarning, UserError


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
    commands = parser.add_subparsers(required=True, metavar="command")

    train = commands.add_parser("train", help="fine-tune as a config says")
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
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="score a base model, or one with an adapter, on a file of rows")
    _model_options(evaluate)
    evaluate.add_argument("--data", help="rows: a file, a datasets directory or a hub name (default: the task's)")
    evaluate.add_argument("--split", default="test", help="split, where the data has several (default: test)")
    evaluate.add_argument("--task", default="instruct", help="how rows are read (default: instruct)")
    evaluate.add_argument("--style", help="prompt style (default: the task's)")
    evaluate.add_argument("--method", choices=["generate", "choices"], default="generate", help="how answers are found")
    evaluate.add_argument("--limit", type=int, help="score the first rows only")
    evaluate.add_argument("--max-new-tokens", type=int, help="longest generation (default: the task's)")
    evaluate.add_argument("--max-length", type=int, help="an encoder's longest row (default: as many as it has positions)")
    evaluate.add_argument("--batch-size", type=int, default=16, help="prompts or examples at a time (default: 16)")
    evaluate.add_argument(
        "--trained-on", metavar="ROWS", help="training rows, to score the questions apart that are there too"
    )
    evaluate.add_argument("--out", help="file for every prediction, as JSON lines (default: runs/evaluate/TASK.jsonl)")
    evaluate.set_defaults(run=_evaluate)

    tasks = commands.add_parser("tasks", help="every task with its metric, prompt style and data")
    tasks.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    tasks.set_defaults(run=_tasks)

    lm_eval = commands.add_parser("lm-eval", help="score a model on tasks of the lm-evaluation-harness (extra `eval`)")
    _model_options(lm_eval)
    lm_eval.add_argument("--tasks", required=True, help="names or patterns, with commas between them, or YAML files")
    lm_eval.add_argument("--include-path", help="folder of further task YAML files")
    lm_eval.add_argument("--num-fewshot", type=int, help="examples in front of a question (default: the task's)")
    lm_eval.add_argument("--limit", type=int, help="score the first rows of each task only")
    lm_eval.add_argument("--batch-size", type=int, default=16, help="texts at a time (default: 16)")
    lm_eval.add_argument("--apply-chat-template", action="store_true", help="ask as the tokenizer's chat template does")
    lm_eval.add_argument("--out", help="JSON file for results, task configs and every row's answer")
    lm_eval.set_defaults(run=_lm_eval)

    generate = commands.add_parser("generate", help="continue a prompt: greedily, by sampling or by beam search")
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
    generate.set_defaults(run=_generate)

    plan = commands.add_parser("plan", help="what a config would need of a machine; reads no weights, runs nothing")
    plan.add_argument("config", help="YAML file of the run")
    plan.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the config")
    plan.add_argument("--target", default="cpu", help="cpu (this machine), h100, h200, a100, l40s, rtx4090 (default: cpu)")
    plan.add_argument("--devices", type=int, help="how many share a batch, as the section parallel says (default: 1)")
    plan.add_argument("--json", action="store_true", help="print one JSON object and nothing else on standard output")
    plan.set_defaults(run=_plan)

    inspect = commands.add_parser("inspect", help="neurons, values and bytes of every module of a model or adapter")
    inspect.add_argument("path", help="model directory, hub id, .gguf file or adapter directory")
    inspect.add_argument("--k", type=int, default=1, help="connections per neuron, for a model (default: 1)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)

    merge = commands.add_parser("merge", help="write base + adapter as a Hugging Face model directory")
    _model_options(merge, adapter_required=True)
    merge.add_argument("--out", required=True, help="the directory to make")
    merge.set_defaults(run=_merge)

    export = commands.add_parser(
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
    export.set_defaults(run=_export)

    imports = commands.add_parser("import", help="turn an adapter of another library into one of this library")
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
    imports.set_defaults(run=_import)
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


def _load(parsed: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The decoder of --model, or of the adapter, with the adapter merged in: (base, params, tokenizer)."""
    return _read(*_open(parsed))


def _open(parsed: argparse.Namespace, *, decoder: bool = True) -> tuple[Any, Any, Any]:
    """The model of --model, or of the adapter, without its weights: (base, tokenizer, adapter or None).

    With `decoder`, only a model that continues texts will do.
    """
    from neuroada_jax.formats import native
    from neuroada_jax.weights import open_base

    adapter = native.read(parsed.adapter) if parsed.adapter else None
    source = parsed.model or (adapter.metadata.get("base", {}).get("source") if adapter else None)
    if not source:
        raise UserError("give --model, or an --adapter that names its base")
    trained_in = adapter.metadata["base"].get("dtype") if adapter else None
    labels = adapter.metadata["base"].get("labels") if adapter else None
    opened, tokenizer = open_base(source, parsed.dtype or trained_in or "auto", labels)
    if decoder and not opened.model.architecture.is_decoder:
        kind = opened.model.hf_config["model_type"]
        raise UserError(f"{source}: {kind} is an encoder, which cannot continue a text; this command needs a decoder")
    return opened, tokenizer, adapter


def _read(opened: Any, tokenizer: Any, adapter: Any) -> tuple[Any, Any, Any]:
    """(base, params, tokenizer) of what `_open` opened: the weights, with the adapter merged in."""
    from neuroada_jax.formats import native
    from neuroada_jax.weights import with_weights

    base = with_weights(opened)
    return base, base.params if adapter is None else native.merge(adapter, base), tokenizer


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False))


def _train(parsed: argparse.Namespace) -> None:
    from neuroada_jax.training import config, processes, report, run, seeds, signals

    overrides = parsed.overrides + ([f"seeds=[{parsed.seeds}]"] if parsed.seeds else [])
    settings = config.load(parsed.config, overrides)
    several = settings.seeds is not None
    train = seeds.train if several else run.train
    flags = {"overwrite": parsed.overwrite, "resume": parsed.resume, "force_resume": parsed.force_resume}
    if parsed.coordinator and parsed.resume:
        raise UserError("--resume: several processes save no checkpoints yet, so that there is none to go on from")
    with (
        processes.joined(parsed.coordinator, parsed.processes, parsed.process) as first,
        processes.own_output(settings) as settings,
        # Several processes have nothing to save and cannot stop at different steps: there a signal ends them as usual.
        contextlib.nullcontext(signals.Stop()) if parsed.coordinator else signals.listening() as stop,
    ):
        try:
            results = train(settings, **flags, stop=stop)
        except signals.Stopped as stopped:
            saved = "nothing new to save" if stopped.step is None else f"step {stopped.step} is saved"
            seeds_option = ["--seeds", parsed.seeds] if parsed.seeds else []
            again = shlex.join(["neuroada", "train", parsed.config, *parsed.overrides, *seeds_option, "--resume"])
            sys.stderr.write(f"neuroada: stopped, {saved}; go on with: {again}\n")
            return
        if parsed.json and first:
            _print_json(results)
        else:
            (seeds.print_summary if several else report.print_summary)(results)


def _plan(parsed: argparse.Namespace) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own words on a GPU that is missing, or on memory
    import jax

    # Before anything else asks JAX for a device: a described GPU is compiled for without taking a real one, and several
    # CPUs are virtual ones.
    jax.config.update("jax_platforms", "cpu")
    from neuroada_jax import planning
    from neuroada_jax.training import config

    settings = config.load(parsed.config, parsed.overrides)
    planning.start_devices(settings, parsed.devices)
    plan = planning.plan(settings, parsed.target, parsed.devices)
    if parsed.json:
        _print_json(plan)
    else:
        planning.print_plan(plan)


def _evaluate(parsed: argparse.Namespace) -> None:
    from neuroada_jax import evaluation
    from neuroada_jax.rows import load_rows
    from neuroada_jax.tasks import GLUE, TASKS, Source
    from neuroada_jax.training import report

    if parsed.task not in TASKS | GLUE:
        raise UserError(f"--task: unknown task {parsed.task!r}; known: {', '.join(TASKS | GLUE)}")
    opened = _open(parsed, decoder=parsed.task not in GLUE)
    is_decoder = opened[0].model.architecture.is_decoder
    if is_decoder and parsed.task not in TASKS:
        raise UserError(f"--task: {parsed.task!r} needs an encoder with a head, and {opened[0].source} is a decoder")
    source = Source(parsed.data, parsed.split) if parsed.data else (TASKS if is_decoder else GLUE)[parsed.task].source()
    rows = load_rows(source.data, source.split, parsed.limit)
    score_rows = _score_texts if is_decoder else _score_labels
    base, params, tokenizer = _read(*opened)
    with console.bar("evaluating") as shown:
        score = score_rows(parsed, base, params, tokenizer, rows, console.reporter(shown))
    out = Path(parsed.out or f"runs/evaluate/{parsed.task}.jsonl")
    evaluation.write_predictions(out, score)
    console.say(f"every prediction is in {out}")
    if parsed.json:
        parts = {name: part._asdict() for name, part in score.parts.items()}
        found = {
            "task": parsed.task,
            "metric": score.metric,
            "value": score.value,
            "n": score.n,
            "interval": score.interval,
            **score.beside,
        }
        more = {"parts": parts, "overlap": score.overlap, "empty": score.empty}
        _print_json(found | {key: value for key, value in more.items() if value})
    else:
        report.print_scores({parsed.task: report.score(None, score)})


def _score_texts(parsed: argparse.Namespace, base: Any, params: Any, tokenizer: Any, rows: Any, progress: Any) -> Any:
    from neuroada_jax import evaluation
    from neuroada_jax.prompts import PromptStyle
    from neuroada_jax.rows import load_rows
    from neuroada_jax.tasks import TASKS, overlap

    task, trained_on = TASKS[parsed.task], None
    if parsed.trained_on:
        trained_on = overlap.questions(
            evaluation.convert(load_rows(parsed.trained_on), TASKS[task.suite or task.name]).rows
        )
    return evaluation.evaluate(
        base,
        params,
        tokenizer,
        rows,
        task,
        style=PromptStyle(parsed.style or task.style),
        method=parsed.method,
        max_new_tokens=parsed.max_new_tokens,
        batch_size=parsed.batch_size,
        trained_on=trained_on,
        on_progress=progress,
    )


def _score_labels(parsed: argparse.Namespace, base: Any, params: Any, tokenizer: Any, rows: Any, progress: Any) -> Any:
    from neuroada_jax import classification
    from neuroada_jax.tasks import GLUE

    if base.drawn and not parsed.adapter:
        raise UserError(f"{base.source} has no {base.drawn[0]}: give an --adapter, which brings its trained head")
    positions = base.model.config.max_positions
    if parsed.max_length is not None and not 1 <= parsed.max_length <= positions:
        raise UserError(f"--max-length: found {parsed.max_length}, expected 1 to the model's {positions} positions")
    return classification.evaluate(
        base,
        params,
        tokenizer,
        rows,
        GLUE[parsed.task],
        max_length=parsed.max_length or positions,
        batch_size=parsed.batch_size,
        on_progress=progress,
    )


def _tasks(parsed: argparse.Namespace) -> None:
    from neuroada_jax import tasks

    found = tasks.listing()
    if parsed.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    header = ("task", "suite", "model", "metric", "prompt", "data")
    rows = [
        (each["task"], each["suite"] or "", each["model"], each["metric"], each["prompt"], "".join(each["data"][-1:]))
        for each in found
    ]
    console.table("tasks", header, rows)
    console.say("data: the last place that is looked at; --json has all of them")


def _lm_eval(parsed: argparse.Namespace) -> None:
    from neuroada_jax import harness

    for option in ("batch_size", "limit", "num_fewshot"):
        value, least = getattr(parsed, option), 0 if option == "num_fewshot" else 1
        if value is not None and value < least:
            raise UserError(f"--{option.replace('_', '-')}: expected at least {least}, found {value}")
    if parsed.out and not Path(parsed.out).parent.is_dir():
        raise UserError(f"--out: the folder {Path(parsed.out).parent} does not exist")
    tasks = harness.find_tasks(parsed.tasks.split(","), parsed.include_path)  # before the weights, which take longer
    base, params, tokenizer = _load(parsed)
    with console.bar("scoring") as shown:
        results = harness.evaluate(
            harness.NeuroAdaLM(base, params, tokenizer, parsed.batch_size, console.reporter(shown)),
            tasks,
            num_fewshot=parsed.num_fewshot,
            limit=parsed.limit,
            apply_chat_template=parsed.apply_chat_template,
        )
    if parsed.out:
        harness.write_results(Path(parsed.out), results)
    print(harness.summary_json(results) if parsed.json else harness.summary_table(results))


def _generate(parsed: argparse.Namespace) -> None:
    from neuroada_jax import data, evaluation
    from neuroada_jax.generation import before_stop, generate
    from neuroada_jax.sampling import Decoding

    fields = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(Decoding)}
    decoding = Decoding(**{**fields, "stop": tuple(parsed.stop)})
    base, params, tokenizer = _load(parsed)
    prompts = [data.encode_prompt({"prompt": prompt}, parsed.style, tokenizer) for prompt in parsed.prompt]
    outputs = generate(
        base.model,
        params,
        prompts,
        max_new_tokens=parsed.max_new_tokens,
        eos_ids=evaluation.end_tokens(base, tokenizer),
        decoding=decoding,
        decode=tokenizer.decode,
    )
    texts = [before_stop(tokenizer.decode(ids, skip_special_tokens=True), decoding.stop) for ids in outputs]
    if parsed.json:
        pairs = zip(parsed.prompt, texts, outputs, strict=True)
        _print_json({"generations": [{"prompt": p, "text": text, "tokens": len(ids)} for p, text, ids in pairs]})
    else:
        print("\n\n".join(texts))


def _inspect(parsed: argparse.Namespace) -> None:
    from neuroada_jax import inspection

    if parsed.k < 1:
        raise UserError(f"--k: expected at least 1, found {parsed.k}")
    content = inspection.inspect(parsed.path, parsed.k)
    _print_json(content) if parsed.json else inspection.print_inspection(content)


def _merge(parsed: argparse.Namespace) -> None:
    from neuroada_jax.formats import exchange

    made = exchange.export_adapter(parsed.adapter, "huggingface", parsed.out, model=parsed.model, dtype=parsed.dtype)
    _print_json({"model": made["out"], "files": made["files"]}) if parsed.json else exchange.print_result(made)


def _export(parsed: argparse.Namespace) -> None:
    from neuroada_jax.formats import exchange

    options = {"model": parsed.model, "dtype": parsed.dtype, "verify": parsed.verify}
    made = exchange.export_adapter(parsed.adapter, parsed.to, parsed.out, **options)
    _print_json(made) if parsed.json else exchange.print_result(made)


def _import(parsed: argparse.Namespace) -> None:
    from neuroada_jax.formats import exchange

    options = {"dtype": parsed.dtype, "allow_pickle": parsed.allow_pickle}
    made = exchange.import_adapter(parsed.directory, parsed.source_format, parsed.base, parsed.out, **options)
    _print_json(made) if parsed.json else exchange.print_result(made)


if __name__ == "__main__":
    sys.exit(main())
