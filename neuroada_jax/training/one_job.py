"""Whether all processes of a run do the same job: config, code, data, steps and base weights, compared by digests."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import xxhash

import neuroada_jax
from neuroada_jax.adapters import native
from neuroada_jax.errors import UserError
from neuroada_jax.training import peers
from neuroada_jax.training.config import RunConfig
from neuroada_jax.training.config_file import flatten_config
from neuroada_jax.training.resuming import digest_of_arrays, digest_of_data, digests_of_held_out

if TYPE_CHECKING:
    from neuroada_jax.training.preparation import PreparedRows

# Fields that may differ: where this process writes, and where it finds the files whose contents are compared.
_OWN_OPTIONS = ("run", "json", "coordinator", "process", "join_timeout", "out", "model", "adapter", "data", "trained_on")
_OWN = ("output", "tracking", "model.path", "data.train", "data.validation")


def check(about: str, fields: Mapping[str, Any]) -> None:
    """Compare fields with those of the other processes.

    Args:
      about: what is compared.
      fields: by the name that a message gives them; values that JSON can hold.

    Raises:
      UserError: one differs; all processes raise it.
    """
    together = peers.current()
    first, *others = together.share(about, {name: str(value) for name, value in fields.items()})
    for number, found in enumerate(others, 1):
        for name in {**first, **found}:
            if first.get(name) != found.get(name):
                raise UserError(
                    f"{name}: process {number} has {found.get(name)}, process 0 has {first.get(name)}; all processes of a "
                    "run do the same job"
                )


def check_config(config: RunConfig, **options: bool) -> None:
    """Compare the config, command line options and code; see `check`."""
    if peers.current().count != jax.process_count():
        raise UserError("JAX has several processes: train inside of neuroada_jax.training.processes.joined")
    if peers.current().count == 1:
        return
    flat = {name: value for name, value in flatten_config(config).items() if name not in _OWN}
    flat["evaluation.sets"] = [{**each, "data": None} for each in flat["evaluation.sets"]]
    named = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    platform = {"backend": jax.default_backend(), "devices of a process": jax.local_device_count()}
    check("config", {**named, **flat, "code": _digest_of_code(), **platform, **native.installed_versions()})


@functools.cache
def _digest_of_code() -> str:
    digest = xxhash.xxh3_64()
    folder = Path(neuroada_jax.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return f"neuroada-jax {neuroada_jax.__version__}, {digest.hexdigest()}"


def digest(content: Any) -> str:
    """Return a digest of the text of a value."""
    return xxhash.xxh3_64_hexdigest(repr(content).encode())


def check_data(prepared: "PreparedRows") -> None:
    """Compare the rows and the steps that they make; see `check`."""
    if peers.current().count == 1:
        return
    batches = prepared.batches
    fields = {
        "data.train": f"rows with digest {digest_of_data(batches)}",
        "step shapes": [list(shape) for shape in batches.shapes],
        "steps": prepared.total_steps,
        "model.path": f"a config with digest {digest(prepared.opened.model.hf_config)}",
        "data.validation": "none",
    }
    check("data", fields | {field: f"rows with digest {each}" for field, each in digests_of_held_out(prepared).items()})


def check_evaluation(
    options: Mapping[str, Any], rows: Sequence[Any], digests: Mapping[str, str], adapter: native.Adapter | None
) -> None:
    """Compare what is scored, and how; see `check`.

    Args:
      options: of the command line, by their names in it.
      rows: to score.
      digests: of the base model's tensors, by name.
      adapter: merged in; None for the base model.
    """
    if peers.current().count == 1:
        return
    fields = {f"--{name.replace('_', '-')}": value for name, value in options.items() if name not in _OWN_OPTIONS}
    fields |= {"code": _digest_of_code(), "--data": f"rows with digest {digest(list(rows))}", **native.installed_versions()}
    if adapter is not None:
        arrays = digest_of_arrays({**adapter._asdict(), "metadata": {}})
        fields["--adapter"] = f"tensors with digest {arrays}"
    check("evaluation", fields)
    check_weights(digests)


def check_weights(digests: Mapping[str, str]) -> None:
    """Compare the digests of the base model's tensors, by name; see `check`."""
    if peers.current().count > 1:
        check("weights", {f"model.path: tensor {name}": f"digest {each}" for name, each in digests.items()})
