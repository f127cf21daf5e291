"""neuroada-jax: sparse fine-tuning of large models with NeuroAda (arXiv 2510.18940), in JAX.

There are two ways to use it. `load`, `fine_tune` and `sweep` work on pretrained models and rows of text
(docs/python.md, docs/sweep.md). The core, functions on arrays and trees, works on models of your own (docs/own-models.md)
and needs no other framework than JAX. Everything that needs Flax, Equinox or transformers (`load`, `fine_tune` and their
types, and the modules `linen`, `nnx` and `equinox`) is imported at its first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from neuroada_jax.core.attached import BypassKernel, attach
from neuroada_jax.core.bypass import Bypass, average, build, count, interpolate, make_resident, merge, read, swap, unmerge
from neuroada_jax.core.entries import Layout
from neuroada_jax.core.ops import bypass_dense
from neuroada_jax.core.selection import magnitude, select
from neuroada_jax.core.trees import kernels
from neuroada_jax.core.value_gradient import GradientAlgorithm, choose_algorithm
from neuroada_jax.errors import UserError

if TYPE_CHECKING:
    from neuroada_jax.fine_tuning import fine_tune
    from neuroada_jax.session import MergedModel, Prediction, PretrainedModel, TunedModel, load
    from neuroada_jax.sweeping.sweep import sweep

__version__ = "0.1.0"

_MODULES = ("equinox", "linen", "nnx")
_SESSION = ("MergedModel", "Prediction", "PretrainedModel", "TunedModel", "load")

__all__ = [
    "Bypass",
    "BypassKernel",
    "GradientAlgorithm",
    "Layout",
    "MergedModel",
    "Prediction",
    "PretrainedModel",
    "TunedModel",
    "UserError",
    "attach",
    "average",
    "build",
    "bypass_dense",
    "choose_algorithm",
    "count",
    "fine_tune",
    "interpolate",
    "kernels",
    "load",
    "magnitude",
    "make_resident",
    "merge",
    "read",
    "select",
    "swap",
    "sweep",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """Import a name that needs more than JAX at its first use (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "fine_tune":
        from neuroada_jax.fine_tuning import fine_tune

        return fine_tune
    if name == "sweep":
        from neuroada_jax.sweeping.sweep import sweep

        return sweep
    if name in _SESSION:
        from neuroada_jax import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
