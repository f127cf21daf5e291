"""Starter configs: the fields that matter for a kind of rows, each with a line on its meaning, default and use."""

import enum
import json
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from neuroada_jax.errors import UserError
from neuroada_jax.training import config_file
from neuroada_jax.training.starting_rate import starting_rate


class Kind(enum.StrEnum):
    """What is trained on."""

    CHAT = "chat"
    INSTRUCT = "instruct"
    CLASSIFY = "classify"
    TEXT = "text"


class _Field(NamedTuple):
    path: str
    value: Any
    comment: str


class _Start(NamedTuple):
    """What differs between the kinds.

    Attributes:
      title: what is trained on, in words.
      model: the base model that is written without --model.
      train: the file of rows that is written without --train.
      row: what the file looks like.
      data: further fields of the section `data`.
      width: of the hidden states of `model`, which says the learning rate.
      epochs: passes over the rows.
    """

    title: str
    model: str
    train: str
    row: str
    data: Sequence[_Field]
    width: int = 576
    epochs: int = 5


_K = 8
_MAX_LENGTH = "Tokens of the longest example (default 512); longer ones are truncated. Lower it to save memory and time."
_CHAT_ROW = '{"messages": [{"role": "user", "content": "..."}, ...]}, or ShareGPT\'s "conversations" of "from" and "value"'
_STARTS = {
    Kind.CHAT: _Start(
        "chats",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "chats.jsonl",
        _CHAT_ROW,
        [
            _Field(
                "data.style",
                "chat",
                "chat: the model's chat template (default plain). A model without one needs data.chat_template.",
            ),
            _Field("data.learn", "all", "all (default): every assistant turn is learnt; last: the last one of each chat."),
            _Field("data.max_length", 512, _MAX_LENGTH),
        ],
    ),
    Kind.INSTRUCT: _Start(
        "prompts and answers",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "rows.jsonl",
        '{"prompt": "...", "completion": "..."} or {"instruction": "...", "input": "...", "output": "..."}',
        [
            _Field(
                "data.style", "plain", "Form of the prompts: plain (default), alpaca, chat (the chat template) or verbatim."
            ),
            _Field("data.max_length", 512, _MAX_LENGTH),
        ],
    ),
    Kind.CLASSIFY: _Start(
        "texts and labels",
        "sentence-transformers/all-MiniLM-L6-v2",
        "rows.csv",
        'a csv with columns text and label, or a .jsonl of {"text": "...", "label": "..."}',
        [
            _Field(
                "data.task",
                "classification",
                "classification (one label), multilabel (any number) or regression (a number).",
            ),
            _Field("data.text", "text", "Column of the text (default text), or of a pair: [title, body]."),
            _Field("data.label", "label", "Column of the label (default label)."),
            _Field("data.labels", "auto", "auto (default): those of the rows; or a list, which fixes their order."),
            _Field("data.max_length", 128, _MAX_LENGTH),
        ],
        width=384,
        epochs=8,
    ),
    Kind.TEXT: _Start(
        "texts",
        "HuggingFaceTB/SmolLM2-135M",
        "texts.jsonl",
        '{"text": "..."}',
        [
            _Field("data.max_length", 512, "Tokens of the longest text (default 512); split longer ones, or they are cut."),
            _Field("data.packing", True, "true fills rows with several texts (default false): faster for short ones."),
        ],
    ),
}


def starter(
    kind: Kind, path: str, name: str, model: str | None = None, train: str | None = None, width: int | None = None
) -> str:
    """Return the text of a config that trains on rows of this kind; `config_file.load` reads it.

    Args:
      kind: of the rows.
      path: of the file that it will be, for its first comment.
      name: of the run.
      model: base model; None for a small one of the hub.
      train: file of the rows; None for a name that says what belongs there.
      width: of the model's hidden states; None: that of the kind's own model.
    """
    start = _STARTS[kind]
    rate = starting_rate(_K, width or start.width)
    command = " ".join(["neuroada", "train", *shlex.quote(path).split()])  # in one line
    text = "\n".join(
        [
            f"# Starter config to train on {start.title} of your own. Run: {command}",
            f"# A field for one run: {command} bypass.k=20. All fields: neuroada schema, docs/training.md.",
            *_lines(_fields(start, name, model or start.model, train or start.train, rate)),
            "",
        ]
    )
    config_file.from_dict(config_file.parse_yaml(text, path), path)
    return text


def default_train(kind: Kind) -> str:
    """Return the file of rows that a starter config names without another."""
    return _STARTS[kind].train


def default_width(kind: Kind) -> int:
    """Return the width that the learning rate of a starter config is for without another."""
    return _STARTS[kind].width


def row_format(kind: Kind) -> str:
    """Return what rows of this kind look like."""
    return _STARTS[kind].row


def _fields(start: _Start, name: str, model: str, train: str, rate: float) -> list[_Field]:
    return [
        _Field("name", name, "Name of the run, whose files go to runs/<name>."),
        _Field("model.path", model, "Base model: directory, hub id, .gguf file or package:NAME/FILE."),
        _Field(
            "model.dtype", "float32", "float32, bfloat16 (half the memory: for large models on a GPU) or auto (default)."
        ),
        _Field(
            "method", "neuroada", "What trains: neuroada, connections (default), or lora, low-rank factors (docs/lora.md)."
        ),
        _Field("bypass.k", _K, "Trained connections of every neuron (default 1); more learn more and need a lower rate."),
        _Field("data.train", train, f"Rows: {start.row}"),
        _Field(
            "data.validation",
            None,
            "0.1, a share of the rows, or a file: its loss chooses the state to keep (default null).",
        ),
        *start.data,
        _Field("optimizer.learning_rate", rate, "Peak rate. `neuroada sweep` finds the best; more k needs a lower one."),
        _Field("optimizer.warmup_ratio", 0.06, "Share of the steps in which the rate rises from 0 (default 0)."),
        _Field("training.epochs", start.epochs, "Passes over the rows; more for few rows. In its place: steps: N."),
        _Field("training.batch_size", 8, "Examples in an update (default 16). With little memory, add accumulation: 8."),
        _Field("training.remat", "full", "full (default) needs the least memory; names and none are faster."),
        _Field(
            "training.save_every", 100, "Steps between checkpoints for --resume (default: only when the run is stopped)."
        ),
        _Field("merge", False, "true: also write the merged model to runs/<name>/merged (default false)."),
        _Field("seed", 42, "Seed of the order of the rows and of a new classifier (default 42)."),
    ]


def _lines(fields: Sequence[_Field]) -> list[str]:
    lines: list[str] = []
    open_section = ""
    for field in fields:
        section, _, last = field.path.rpartition(".")
        if section and section != open_section:
            lines.append(f"{section}:")
        open_section = section
        indent = "  " if section else ""
        lines += [f"{indent}# {field.comment}", f"{indent}{last}: {_scalar(field.value)}"]
    return lines


def _scalar(value: Any) -> str:
    """Return a value as YAML, in quotes only where it would be read as something else without them."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        plain = config_file.parse_yaml(f"field: {text}", "") == {"field": value} and "\n" not in text
    except UserError:
        plain = False
    return text if plain else json.dumps(value)
