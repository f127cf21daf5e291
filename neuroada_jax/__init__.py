"""neuroada-jax: sparse fine-tuning of large models with NeuroAda (arXiv 2510.18940), in JAX.

The names here are the core: arrays and trees only. Models, data, training and file formats live in the submodules.
"""

from neuroada_jax.core.attached import BypassKernel, attach
from neuroada_jax.core.bypass import Bypass, average, build, count, interpolate, make_resident, merge, read, swap, unmerge
from neuroada_jax.core.ops import GradientAlgorithm, Layout, bypass_dense, choose_algorithm
from neuroada_jax.core.selection import magnitude, select
from neuroada_jax.core.trees import kernels
from neuroada_jax.errors import UserError

__version__ = "0.1.0"

__all__ = [
    "Bypass",
    "BypassKernel",
    "GradientAlgorithm",
    "Layout",
    "UserError",
    "attach",
    "average",
    "build",
    "bypass_dense",
    "choose_algorithm",
    "count",
    "interpolate",
    "kernels",
    "magnitude",
    "make_resident",
    "merge",
    "read",
    "select",
    "swap",
    "unmerge",
]
