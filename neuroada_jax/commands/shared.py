"""Options and checks that several commands share."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from neuroada_jax import files
from neuroada_jax.errors import UserError

Commands = Any  # argparse has no public name for what `add_subparsers` returns
DTYPES = ["float32", "bfloat16", "auto"]
QUANTIZATIONS = ["auto", "none", "nf4", "int8", "fp8"]
STOPPED = 75  # exit code, EX_TEMPFAIL of sysexits.h: try again later
ADAPTER_HELP = "adapter directory, or hub id: USER/NAME or USER/NAME@REVISION"


def on_cpu() -> None:
    """Make JAX start on the CPU, whatever JAX_PLATFORMS says, for a command that needs nothing faster: a GPU stays free.

    To be called before anything else asks JAX for a device; it has no effect once JAX has started.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")


def add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> Any:
    """Add a command with its option --json and return its parser."""
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output and nothing else")
    parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the config of a run and its overrides, which may also follow options (`cli.main`)."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    # With a default, Python 3.11 does not list them as required.
    parser.add_argument("overrides", nargs="*", default=[], metavar="SECTION.FIELD=VALUE", help="change to the config")


def add_model(parser: argparse.ArgumentParser, *, adapter_required: bool = False) -> None:
    """Add the options of a model, with or without an adapter."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="model directory, hub id, .gguf file or package:NAME/FILE (default: the adapter's base model)",
    )
    parser.add_argument("--adapter", metavar="ADAPTER", required=adapter_required, help=ADAPTER_HELP)
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the adapter's, else auto)")
    add_quantization(parser)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Add the options of a quantised base model."""
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="how kernels are held: quantised on load, as the checkpoint is (auto) or dequantised (none) (default: the "
        "adapter's)",
    )
    parser.add_argument(
        "--force", action="store_true", help="use the adapter on weights that differ from those it was trained on"
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that may run in several processes (`training.processes.joined`)."""
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, where a run has several processes; auto: ask SLURM (docs/scaling.md)",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes, with --coordinator HOST:PORT")
    parser.add_argument(
        "--process", type=int, metavar="N", help="number of this process, from 0, with --coordinator HOST:PORT"
    )
    parser.add_argument(
        "--join-timeout", type=float, metavar="SECONDS", help="time for all processes to come (default: 120)"
    )


def add_prompt_form(parser: Any, style: str) -> None:
    """Add the options of the form of prompts to a parser or group; `style` says which style is the default."""
    parser.add_argument(
        "--style", metavar="STYLE", help=f"prompt style: plain, alpaca, chat or verbatim (default: {style})"
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="chat template (default: that of the training, else the tokenizer's)",
    )
    parser.add_argument(
        "--template-arguments",
        metavar="MAPPING",
        help="variables of the chat template, as JSON or YAML: '{enable_thinking: false}' (default: those of the training)",
    )


def prompt_options(parsed: argparse.Namespace) -> Any:
    """Return the options of `add_prompt_form`.

    Raises:
      UserError: template arguments that are no mapping.
    """
    from neuroada_jax.adapters.prompting import Options
    from neuroada_jax.data.prompts import PromptStyle
    from neuroada_jax.training.config_file import parse_yaml

    arguments = None
    if parsed.template_arguments is not None:
        arguments = parse_yaml(parsed.template_arguments, "--template-arguments")
        if not isinstance(arguments, Mapping):
            raise UserError(
                f"--template-arguments: expected a mapping as JSON or YAML, found {parsed.template_arguments!r}"
            )
    return Options(parsed.style and PromptStyle(parsed.style), parsed.chat_template, arguments)


def check_minimum(parsed: argparse.Namespace, **minima: int) -> None:
    """Raise UserError where an option is below its minimum; an option that is not given passes."""
    for name, minimum in minima.items():
        value = getattr(parsed, name)
        if value is not None and value < minimum:
            raise UserError(f"{flag(name)}: expected at least {minimum}, found {value}")


def flag(name: str) -> str:
    """Return an option as it is typed: `--max-length` for `max_length`."""
    return f"--{name.replace('_', '-')}"


def open_model(parsed: argparse.Namespace, *, decoder: bool = True) -> tuple[Any, Any, Any]:
    """Open the model of --model, or the adapter's base model, without reading weights.

    Args:
      parsed: with the options of `add_model`.
      decoder: accept only decoders.

    Returns:
      (opened model, tokenizer, adapter or None).

    Raises:
      UserError: no model is named, it cannot be opened, or it is an encoder where `decoder` is set.
    """
    from neuroada_jax.adapters import base_model, hub, native
    from neuroada_jax.pretrained import quantization
    from neuroada_jax.pretrained.load import open_with_tokenizer
    from neuroada_jax.training import unfinished

    unfinished.check(parsed.adapter, parsed.model)
    adapter = hub.read(parsed.adapter) if parsed.adapter else None
    base = adapter.metadata.get("base", {}) if adapter else {}
    if not parsed.model and not adapter:
        raise UserError("give --model, or an --adapter that names its base model")

    def open_source(source: str) -> tuple[Any, Any]:
        return open_with_tokenizer(
            source,
            parsed.dtype or base.get("dtype") or "auto",
            native.labels_of(base),
            quantization_of=parsed.quantization or quantization.of_adapter(base),
        )

    if adapter:
        adapter = native.without_digests(adapter) if parsed.force else adapter
        opened, tokenizer = base_model.open_base(adapter, parsed.adapter, parsed.model, open_source)
    else:
        opened, tokenizer = open_source(parsed.model)
    if decoder and not opened.model.architecture.is_decoder:
        kind = opened.model.hf_config["model_type"]
        raise UserError(
            f"{opened.source}: {kind} is an encoder, which cannot continue a text; this command needs a decoder"
        )
    return opened, tokenizer, adapter


def load_params(opened: Any, adapter: Any) -> tuple[Any, Any]:
    """Read the weights of an opened model and return (loaded model, its parameters with the adapter, if any, in them).

    The parameters take the place of the model's own, whose arrays they have taken.
    """
    from neuroada_jax.adapters import on_base
    from neuroada_jax.models import unrolled
    from neuroada_jax.pretrained.load import load_with_progress

    base_model = load_with_progress(opened, replaced=adapter is not None)
    params = base_model.params if adapter is None else on_base.tuned(adapter, base_model)
    return base_model, unrolled.apart(params, base_model.model.layers_path)


def print_json(content: Any) -> None:
    """Print one line of JSON on standard output."""
    print_json_text(files.to_json(content))


def print_json_text(text: str) -> None:
    """Print JSON on standard output; characters that its encoding lacks, in JSON's own escapes."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text))
    print(text)
