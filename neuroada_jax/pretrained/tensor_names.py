"""Which tensor of a checkpoint is which tensor of the model, as transformers assigns them; and the ones that are none.

A checkpoint may store a tensor under other names than the model's own: without the prefix of the bare model ("bert.",
"model."), or as the first BERT checkpoints did ("LayerNorm.gamma"). Where it stores one tensor under two names,
transformers takes the first in its order of names.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from neuroada_jax import models
from neuroada_jax.models import names

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FIRST_BERTS = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
# Buffers that older checkpoints stored; transformers computes them from the config and does not report them either.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq|(^|\.)position_ids$")
_SHOWN = 6  # unused tensors, or groups of them, in one line
_LONGEST = 100  # characters of a name in it


class Assignment(NamedTuple):
    """Names of a checkpoint's tensors, assigned to a model.

    Attributes:
      stored: Hugging Face name of a tensor of the model -> the name under which the checkpoint stores it. A decoder's
        output layer is among them wherever it is stored, even if the model ties it.
      unused: names in the checkpoint that are no tensor of the model, without buffers that the config determines.
    """

    stored: dict[str, str]
    unused: list[str]


def assign(model: models.Model, available: Iterable[str]) -> Assignment:
    """Assign the names of a checkpoint to the tensors of a model."""
    wanted = set(names.checkpoint_names(model.abstract_params(), model.layers_path))
    prefix = model.architecture.prefix
    if model.architecture.is_decoder:
        wanted.add(HEAD)
    stored: dict[str, str] = {}
    unused = []
    for name in sorted(available, key=_order):
        own = _own_name(name, wanted, prefix)
        if own is not None and own not in stored:
            stored[own] = name
        elif not _BUFFERS.search(name):
            unused.append(name)
    if model.architecture.is_decoder and model.config.tied and EMBEDDING not in stored and HEAD in stored:
        stored[EMBEDDING] = stored[HEAD]  # tying works in both directions
    return Assignment(stored, unused)


def _own_name(name: str, wanted: set[str], prefix: str) -> str | None:
    """Return the model's own name of a stored tensor, None where it has no such tensor."""
    for old, new in _FIRST_BERTS:
        name = name.replace(old, new)
    candidates = (name.removeprefix(prefix), f"{prefix}{name}", name)
    return next((each for each in candidates if each in wanted), None)


def _number(digits: str) -> int | None:
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None


def _order(name: str) -> list[tuple[int, str, int]]:
    """Return the key by which transformers sorts names: numbers before texts, and by their value."""
    parts = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        number = _number(part[len(text) :])
        parts.append((1 if text else 0, text, -1 if number is None else number))
    return parts


def describe(unused: Iterable[str], used: Iterable[str]) -> str:
    """Return unused names as a short text: a few in full, many by module ("cls.* (9)") and layers ("layers.2-5.* (36)").

    Args:
      unused: names in the checkpoint that the model does not use.
      used: names in the checkpoint that it uses; a module is named that has none of them below it.
    """
    unused = list(unused)
    if len(unused) <= _SHOWN:
        return ", ".join(_printable(name) for name in unused)
    modules = {".".join(parts[:depth]) for name in used for parts in [name.split(".")] for depth in range(len(parts) + 1)}
    groups: dict[str, list[str]] = {}  # pattern with {} for numbers -> the names that it stands for
    for name in unused:
        parts = name.split(".")
        deepest = range(1, len(parts) + 1)
        depth = next((each for each in deepest if ".".join(parts[:each]) not in modules), len(parts))
        pattern = ["{}" if _number(part) is not None else part for part in parts[:depth]]
        groups.setdefault(".".join(pattern + ["*"] * (depth < len(parts))), []).append(name)
    texts = [members[0] if len(members) == 1 else _group(pattern, members) for pattern, members in groups.items()]
    return ", ".join([*map(_printable, texts[:_SHOWN]), *["..."] * (len(texts) > _SHOWN)])


def _group(pattern: str, members: list[str]) -> str:
    """Return a pattern with the numbers that its members have in the place of each {}, and the number of members."""
    parts = pattern.split(".")
    for position, part in enumerate(parts):
        if part == "{}":
            found = {int(name.split(".")[position]) for name in members}
            low, high = min(found), max(found)
            exact = f"{low}-{high}" if high > low else str(low)
            parts[position] = exact if len(found) == high - low + 1 else "*"
    return f"{'.'.join(parts)} ({len(members)})"


def _printable(name: str) -> str:
    """Return a name as one short piece of a line, whatever the file has put into it."""
    shown = name if name.isprintable() else ascii(name)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def line(source: str, model: models.Model, available: Iterable[str]) -> str | None:
    """Return the line that names the tensors of a checkpoint that its model does not use; None where there are none."""
    found = assign(model, available)
    if not found.unused:
        return None
    kind = "decoder" if model.architecture.is_decoder else "sequence classifier"
    count = f"{len(found.unused)} tensor{'s' if len(found.unused) > 1 else ''}"
    return f"{source} has {count} that this {kind} does not use: {describe(found.unused, found.stored.values())}"
