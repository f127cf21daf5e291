"""A kernel and its bypass as one pytree in place of the array: code that multiplies by the kernel needs no change.

    def loss(values):
        return objective(model(attach(params, Bypass(values, columns), layout=Layout.IO), x))

Inside the model, `x @ params["hidden"]["w"]` then applies the bypass. Every other operation on the weight raises an error,
because W + D as an array would bring back the dense gradient.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from neuroada_jax.core import trees
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.core.entries import Layout
from neuroada_jax.core.ops import bypass_dense
from neuroada_jax.core.trees import Tree
from neuroada_jax.errors import UserError


class _NotSupported(UserError, AttributeError):
    """Access to an array attribute that a kernel with a bypass lacks; an AttributeError, which `hasattr` expects."""


# The fields are typed Any: JAX puts placeholders into them during transformations.
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "columns", "values"],
    meta_fields=["layout", "name", "transposed"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class BypassKernel:
    """Frozen kernel with its trainable values, for `x @ w`, `w @ x`, the same with `w.T`, and `w(x)`.

    It is a pytree of three arrays that passes through jit, grad, vmap, remat and, with stacked layers, scan.

    Attributes:
      kernel: float (*L, O, I), or (*L, I, O) for `Layout.IO`.
      columns: int32 (*L, O, k), or (*L, 1, k) where the neurons share them.
      values: float (*L, O, k).
      layout: axis order of the kernel.
      name: path of the kernel, for messages.
      transposed: whether the object stands for the transpose of the kernel.
    """

    kernel: Any
    columns: Any
    values: Any
    layout: Layout
    name: str
    transposed: bool = False

    __array_ufunc__ = None  # makes a NumPy array on the left of `@` defer to `__rmatmul__`

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.kernel.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the object stands for."""
        *leading, first, last = self.kernel.shape
        return (*leading, last, first) if self.transposed else (*leading, first, last)

    @property
    def dtype(self) -> Any:
        """The dtype of the kernel."""
        return self.kernel.dtype

    @property
    def T(self) -> "BypassKernel":
        """The transpose, without moving data."""
        return dataclasses.replace(self, transposed=not self.transposed)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the linear map, (*B, I) -> (*B, O), in both layouts."""
        if self.ndim != 2:
            raise UserError(
                f"{self.name}: found stacked kernels {self.shape}, expected one linear map; scan or vmap over them"
            )
        x = x.astype(jnp.promote_types(x.dtype, self.dtype))
        return bypass_dense(x, self.kernel, self.columns, self.values, layout=self.layout)

    def __rmatmul__(self, x: Any) -> jax.Array:
        """Return `x @ w`."""
        self._check_sums_over_inputs("x @ w", Layout.IO)
        return self(jnp.asarray(x))

    def __matmul__(self, x: Any) -> jax.Array:
        """Return `w @ x`."""
        self._check_sums_over_inputs("w @ x", Layout.OI)
        x = jnp.asarray(x)
        return self(x) if x.ndim == 1 else jnp.matrix_transpose(self(jnp.matrix_transpose(x)))

    def _check_sums_over_inputs(self, product: str, layout: Layout) -> None:
        if (self.layout is layout) == self.transposed:
            of = "the transpose of layout" if self.transposed else "layout"
            raise UserError(f"{self.name}: {product} with {of} {self.layout} sums over neurons, expected over inputs")

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        self._refuse()

    def _refuse(self, *_: Any) -> NoReturn:
        raise _NotSupported(f"{self.name} carries a bypass, which supports only x @ w, w @ x, w.T and w(x)")

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __pow__ = __neg__ = _refuse


def attach(params: Mapping[str, Any], bypass: Bypass, *, layout: Layout = Layout.OI) -> Tree:
    """Return the parameters with a BypassKernel in place of every kernel that has a bypass.

    Args:
      params: parameter tree, with kernels as for `build`.
      bypass: values, the variables to differentiate with respect to, and columns.
      layout: axis order of the kernels.

    Raises:
      UserError: a kernel does not fit its columns, or has a bypass already.
      KeyError: a path holds no kernel.
    """
    attached = dict(params)
    for path, columns in trees.leaves(bypass.columns, "columns"):
        kernel, node, name = trees.kernel_at(params, path), trees.get(params, path), ".".join(path)
        if isinstance(kernel, BypassKernel):
            raise UserError(f"{name} carries a bypass already")
        outputs = kernel.shape[-2] if Layout(layout) is Layout.OI else kernel.shape[-1]
        if columns.shape[:-1] not in ((*kernel.shape[:-2], outputs), (*kernel.shape[:-2], 1)):
            raise UserError(f"{name}: a kernel {kernel.shape} in layout {layout} does not fit columns {columns.shape}")
        new = BypassKernel(kernel, columns, trees.get(bypass.values, path)["values"], Layout(layout), name)
        attached = trees.put(attached, path, {**node, "kernel": new} if isinstance(node, Mapping) else new)
    return attached
