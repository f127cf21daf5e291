"""`neuroada inspect`, `merge`, `export` and `import`: adapters and models on disk."""

import argparse
from typing import Any

from neuroada_jax.commands import shared

_VERIFY = "load the original model and the result in PyTorch, and fail if weights or outputs differ from ours"


def add(commands: shared.Commands) -> None:
    """Add the commands."""
    _add_inspect(commands)
    _add_merge(commands)
    _add_export(commands)
    _add_import(commands)


def _add_inspect(commands: shared.Commands) -> None:
    summary = "count the neurons, values and bytes of a model or an adapter"
    parser = shared.add_command(commands, "inspect", _inspect, summary)
    parser.add_argument("path", metavar="PATH", help="model directory, .gguf file, adapter directory, or hub id of either")
    parser.add_argument("--k", type=int, default=1, metavar="N", help="connections per neuron, for a model (default: 1)")
    parser.add_argument("--all", action="store_true", help="list every module, not a line for each kind")


def _inspect(parsed: argparse.Namespace) -> None:
    from neuroada_jax.adapters import inspection
    from neuroada_jax.training import unfinished

    shared.on_cpu()
    shared.check_minimum(parsed, k=1)
    unfinished.check(parsed.path)
    content = inspection.inspect(parsed.path, parsed.k)
    shared.print_json(content) if parsed.json else inspection.print_inspection(content, every=parsed.all)


def _add_merge(commands: shared.Commands) -> None:
    summary = "merge an adapter into its base model, as a Hugging Face directory"
    parser = shared.add_command(commands, "merge", _merge, summary)
    shared.add_model(parser, adapter_required=True)
    parser.add_argument("--out", required=True, metavar="DIRECTORY", help="directory to create")
    parser.add_argument("--verify", action="store_true", help=_VERIFY)
    parser.add_argument(
        "--requantise",
        choices=["nf4", "int8"],
        help="quantise the layers' weights as bitsandbytes does, and say what is lost (default: not quantised)",
    )


def _merge(parsed: argparse.Namespace) -> None:
    from neuroada_jax.adapters import exchange
    from neuroada_jax.training import unfinished

    unfinished.check(parsed.adapter, parsed.model)
    options = {"verify": parsed.verify, "requantise": parsed.requantise}
    made = exchange.export_adapter(parsed.adapter, "huggingface", parsed.out, _base(parsed), **options)
    content = {"model" if key == "out" else key: value for key, value in made.items() if key != "notes"}
    shared.print_json(content) if parsed.json else exchange.print_result(made)


def _base(parsed: argparse.Namespace) -> Any:
    """Return the base model that the command line names."""
    from neuroada_jax.adapters.exchange import Base

    return Base(parsed.model, parsed.dtype, parsed.quantization, parsed.force)


def _add_export(commands: shared.Commands) -> None:
    summary = "write an adapter for PEFT, transformers or the official code"
    parser = shared.add_command(commands, "export", _export, summary)
    parser.add_argument("adapter", metavar="ADAPTER", help=shared.ADAPTER_HELP)
    parser.add_argument(
        "--to",
        required=True,
        choices=["official", "peft-supertuning", "peft-shira", "peft-lora", "huggingface"],
        help="format to write",
    )
    parser.add_argument("--out", required=True, metavar="DIRECTORY", help="directory to create")
    parser.add_argument("--model", metavar="MODEL", help="base model (default: the one that the adapter names)")
    parser.add_argument("--dtype", choices=shared.DTYPES, help="dtype of the base model (default: the adapter's)")
    shared.add_quantization(parser)
    parser.add_argument("--verify", action="store_true", help=_VERIFY)


def _export(parsed: argparse.Namespace) -> None:
    from neuroada_jax.adapters import exchange
    from neuroada_jax.training import unfinished

    shared.on_cpu()
    unfinished.check(parsed.adapter, parsed.model)
    made = exchange.export_adapter(parsed.adapter, parsed.to, parsed.out, _base(parsed), verify=parsed.verify)
    _print_result(made, parsed)


def _add_import(commands: shared.Commands) -> None:
    parser = shared.add_command(commands, "import", _import, "convert another library's adapter to a native adapter")
    parser.add_argument("directory", metavar="ADAPTER", help="directory of the other library's adapter")
    parser.add_argument(
        "--from",
        dest="source_format",
        required=True,
        choices=["official", "peft-supertuning", "peft-shira", "peft-lora"],
        help="format to read",
    )
    parser.add_argument("--base", required=True, metavar="MODEL", help="base model: directory, hub id or .gguf file")
    parser.add_argument("--out", required=True, metavar="DIRECTORY", help="adapter directory to create")
    parser.add_argument("--dtype", choices=shared.DTYPES, default="auto", help="dtype of the base model (default: auto)")


def _import(parsed: argparse.Namespace) -> None:
    from neuroada_jax.adapters import exchange

    shared.on_cpu()
    arguments = (parsed.directory, parsed.source_format, parsed.base, parsed.out)
    _print_result(exchange.import_adapter(*arguments, dtype=parsed.dtype), parsed)


def _print_result(made: dict[str, Any], parsed: argparse.Namespace) -> None:
    from neuroada_jax.adapters import exchange

    shared.print_json(made) if parsed.json else exchange.print_result(made)
