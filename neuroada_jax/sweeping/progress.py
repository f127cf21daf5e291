"""Members between two of their steps, as files: a sweep that is stopped, or killed, goes on from them.

A file has the train state of one member, the values of its best validation and its course, so that members may go on in
other groups than before. Learning rates, dropout masks and batches follow from its config and the step.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from neuroada_jax import console, files
from neuroada_jax.core.trees import Tree
from neuroada_jax.sweeping.group import Course, Progress
from neuroada_jax.training import resuming
from neuroada_jax.training.step import TrainState

FORMAT = 1
_ABOUT = "neuroada_progress"


def write(path: Path, progress: Progress, about: dict[str, Any]) -> None:
    """Write the progress of a member, completely or not at all.

    Args:
      path: of the file.
      progress: of the member.
      about: what it was trained on, as JSON, and "member", its digest.

    Raises:
      UserError: the file cannot be written.
    """
    tensors = _named(progress.state._asdict(), progress.best)
    content = {"format": FORMAT, "step": progress.step, "course": dataclasses.asdict(progress.course), **about}
    content["digest"] = _digest(content, tensors)
    files.write_bytes(path, safetensors.numpy.save(tensors, {_ABOUT: files.to_json(content)}))


def read(path: Path, fresh: TrainState, member: str) -> tuple[Progress, dict[str, Any]] | None:
    """Return the progress of a member and what it was trained on; None, with a warning, where its file is damaged.

    Args:
      path: of the file, which exists.
      fresh: the state of the member before its first step, whose arrays have the same names, shapes and dtypes.
      member: its digest; the progress of another one is as good as damaged.
    """
    expected = _named(jax.eval_shape(lambda: fresh)._asdict(), jax.eval_shape(lambda: fresh.trainable))
    try:
        with safetensors.safe_open(str(path), framework="numpy") as handle:
            content = json.loads((handle.metadata() or {})[_ABOUT])
            tensors = {name: handle.get_tensor(name) for name in expected}
        other = [name for name, array in tensors.items() if _kind(array) != _kind(expected[name])]
        if other or content.pop("digest") != _digest(content, tensors):
            raise ValueError(f"{other[0]} has another shape" if other else "it is not what was written")
        if content["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, found {content['format']}")
        if content["member"] != member:
            raise ValueError("it is of another member or config")
        progress = Progress(
            step=int(content["step"]),
            course=Course(**content["course"]),
            state=type(fresh)(**_filled("state", fresh._asdict(), tensors)),
            best=_filled("best", fresh.trainable, tensors),
        )
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        console.warn(f"{path}: damaged ({error}); its member starts again")
        return None
    return progress, content


def _digest(content: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    """Return the digest of all that a file says."""
    return files.digest({**content, "arrays": resuming.digest_of_arrays(tensors)})


def _named(state: Tree, best: Tree) -> dict[str, Any]:
    """Return all arrays by their paths, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path({"best": best, "state": state})
    named = {_name(path): leaf for path, leaf in leaves}
    return {name: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf for name, leaf in named.items()}


def _filled(root: str, tree: Tree, tensors: dict[str, np.ndarray]) -> Tree:
    """Return the tree with the arrays of these names."""
    filled: Tree = jax.tree_util.tree_map_with_path(lambda path, _: tensors[f"{root}.{_name(path)}"], tree)
    return filled


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _kind(array: Any) -> tuple[Any, ...]:
    return (*array.shape, np.dtype(array.dtype))
