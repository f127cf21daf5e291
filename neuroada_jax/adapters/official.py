"""The published PyTorch code's adapter format, as its runs write it and its loader reads it.

    tunable_para/state_dict_tunable.pt   torch.save of {"<path>.weight_new": (O * k,)}, and of the densely trained
                                         parameters under their own names
    positions.npy                        np.save of {"<path>.weight": int64 (O * k, 2)}: row and column of each value

Both are row-major, with ascending columns within each row of the weight. The published forward pass is
``W.flatten().scatter_add(0, row * I + column, weight_new)``.
"""

import re
import types
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from neuroada_jax import files, models
from neuroada_jax.adapters import inert_pickle, native
from neuroada_jax.adapters.foreign import Imported
from neuroada_jax.core import trees
from neuroada_jax.errors import UserError, install_line
from neuroada_jax.models import names

VALUES = Path("tunable_para") / "state_dict_tunable.pt"
POSITIONS = Path("positions.npy")

# The order of the linear maps within a layer in the published code's files.
_ORDER = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
)


def _torch() -> types.ModuleType:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"the official format needs PyTorch: {install_line('torch')}") from error
    return torch


def _place(module: str) -> tuple[Any, ...]:
    """Return the sort key of a module name that gives PyTorch's order: by layer, then by the order within one."""
    numbers = tuple(int(part) for part in re.findall(r"\.(\d+)\.", module))
    known = next((rank for rank, name in enumerate(_ORDER) if module.endswith(f".{name}")), len(_ORDER))
    return not numbers, numbers, known, module


def export(
    adapter: native.Adapter,
    directory: Path,
    dtype: Literal["float32", "bfloat16"] | None = None,
    *,
    replace: bool = False,
) -> list[str]:
    """Write an adapter as the published code's loader reads it, complete or not at all.

    Args:
      adapter: the adapter to write.
      directory: the destination; must not exist unless `replace`.
      dtype: of the values and dense parameters; None for the base dtype, since the loader does not convert them and its
        scatter_add needs the dtype of the base weights.
      replace: overwrite an existing directory.

    Returns: lines that report the conversions.

    Raises:
      UserError: the directory exists or cannot be written, or PyTorch is not installed.
    """
    torch = _torch()
    chosen = dtype or adapter.metadata["base"]["dtype"]
    content: dict[str, Any] = {}
    positions: dict[str, Any] = {}
    changed = 0
    for module in sorted(adapter.values, key=_place):
        values, columns = adapter.values[module], adapter.columns[module]
        tensor = torch.from_numpy(values.reshape(-1).copy()).to(getattr(torch, chosen))
        changed += int((tensor.float().numpy() != values.reshape(-1)).sum())
        content[f"{module}.weight_new"] = torch.nn.Parameter(tensor)
        rows = np.arange(len(values), dtype=np.int64).repeat(values.shape[1])
        # A transposed view, as torch.nonzero returns it.
        positions[f"{module}.weight"] = torch.from_numpy(np.stack([rows, columns.reshape(-1).astype(np.int64)])).T
    for name, array in adapter.dense_parameters.items():
        content[name] = torch.nn.Parameter(torch.from_numpy(array.copy()).to(getattr(torch, chosen)))
    with files.new_directory(directory, replace=replace) as temporary:
        (temporary / VALUES).parent.mkdir()
        torch.save(content, temporary / VALUES)
        np.save(temporary / POSITIONS, np.array(positions, dtype=object), allow_pickle=True)
    count = sum(values.size for values in adapter.values.values())
    return [f"{changed} of {count} values rounded to {chosen}, the base dtype"] if changed else []


def read(directory: Path, base_model: models.Model) -> Imported:
    """Read the adapter that a run of the published code wrote, without executing anything in it.

    `POSITIONS` is a pickle: `inert_pickle` interprets it and never unpickles it. `VALUES` is read by `load_tensors`.

    Args:
      directory: the run's output folder, with `VALUES` and `POSITIONS` in it.
      base_model: the architecture and config of its base model, against whose shapes the files are checked.

    Raises:
      UserError: PyTorch is not installed, a file is missing or not as the published code writes it, or an
        entry does not fit the base model; names the tensor.
    """
    path = directory / POSITIONS
    params = base_model.abstract_params()
    shapes = base_model.linear_maps()
    positions = inert_pickle.read_tensors(path)
    tensors = load_tensors(directory / VALUES)
    trained = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight_new")}
    expected = {f"{name}_new" for name in positions}
    if not trained or set(trained) != expected:
        odd = min(set(trained) ^ expected, default="<module>.weight_new")
        raise UserError(f"{directory}: {odd!r} is not both in {VALUES} and in {POSITIONS}")
    values, columns, k = {}, {}, 0
    for name, pairs in positions.items():
        module = name.removesuffix(".weight")
        if module not in shapes or module == name:
            raise UserError(f"{path}: the base model has no linear map {name!r}")
        columns[module] = _columns(f"{path}: {name!r}", pairs, *shapes[module])
        values[module] = _numbers(directory / VALUES, f"{name}_new", trained[f"{name}_new"], (columns[module].size,))
        values[module] = values[module].reshape(columns[module].shape)
        k = max(k, columns[module].shape[1])
    for module, chosen in columns.items():
        if chosen.shape[1] != min(k, shapes[module][1]):
            raise UserError(f"{path}: '{module}.weight' has {chosen.shape[1]} entries per row, and others have {k}")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"})
    notes = [f"{' and '.join(dtypes)} in the file, converted to float32 without loss"] if dtypes else []
    leaves, slots = dict(trees.flatten(params)), names.checkpoint_names(params, base_model.layers_path)
    dense_parameters = {}
    for name, tensor in tensors.items():
        if name in trained:
            continue
        if name not in slots or name.removesuffix(".weight") in values:
            raise UserError(f"{directory / VALUES}: the base model has no parameter {name!r}, or one that carries a bypass")
        shape = leaves[slots[name].path].shape[len(slots[name].place) :]
        dense_parameters[name] = _numbers(directory / VALUES, name, tensor, shape)
    return Imported(values, columns, dense_parameters, notes)


def load_tensors(path: Path) -> dict[str, Any]:
    """Read the tensors of a .pt file with PyTorch's `weights_only`, whose unpickler calls only listed constructors.

    Raises:
      UserError: PyTorch is not installed, the file is missing or damaged, or it holds anything but named tensors.
    """
    torch = _torch()
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save does not compress: an archive that unpacks to more than its size was made to exhaust the memory.
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise UserError(f"{path}: refused, since it unpacks to more than its own size")
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path}: {damaged!r} in it is damaged (its checksum differs)")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # PyTorch raises many types for damaged files and for other objects than tensors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: no file of plain tensors as torch.save writes it ({reason[:200]})") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: expected a dict of named tensors, found {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path}: {name!r} is {type(tensor).__name__}, expected a tensor")
    return content


def _columns(where: str, pairs: np.ndarray, outputs: int, inputs: int) -> np.ndarray:
    """Check int64 (O * k, 2) pairs of row and column, and return the columns as int32 (O, k)."""
    count = len(pairs)
    if pairs.shape[1] != 2 or count % outputs or count > outputs * inputs:
        raise UserError(
            f"{where} is {list(pairs.shape)}, expected a pair for each of k connections "
            f"of {outputs} neurons, k up to {inputs}"
        )
    k = count // outputs
    if (pairs[:, 0].reshape(outputs, k) != np.arange(outputs)[:, None]).any():
        raise UserError(f"{where} must have the same number of entries in each of {outputs} rows, row after row")
    columns = pairs[:, 1].reshape(outputs, k)
    if columns.min() < 0 or columns.max() >= inputs:
        raise UserError(f"{where} has columns from {columns.min()} to {columns.max()}, expected 0 to {inputs - 1}")
    if (np.diff(columns, axis=1) <= 0).any():
        raise UserError(f"{where} must have ascending and distinct columns in every row")
    return columns.astype(np.int32)


def _numbers(path: Path, name: str, tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Check a tensor and return it as float32, which represents float16 and bfloat16 exactly."""
    torch = _torch()
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"{path}: {name!r} is {tensor.dtype}, expected float32, bfloat16 or float16")
    if tuple(tensor.shape) != shape:
        raise UserError(f"{path}: {name!r} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise UserError(f"{path}: {name!r} holds no plain numbers ({tensor.layout}, {tensor.device})")
    numbers = tensor.detach().to(torch.float32).contiguous().numpy()
    if not np.isfinite(numbers).all():
        raise UserError(f"{path}: {name!r} holds NaN or infinite entries")
    return numbers
