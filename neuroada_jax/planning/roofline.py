"""Lower bounds on computation and memory traffic of a traced program, counted from its jaxpr, alike for every backend.

XLA's own cost analysis counts the body of a loop once, however often it runs, and is not available for programs compiled
for a described GPU.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

# Primitives whose result has the same numbers as their first operand, or a subset of them.
_VIEWS = {"convert_element_type", "dynamic_slice", "optimization_barrier", "reshape", "slice", "squeeze", "transpose"}


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one call of a program.

    Attributes:
      flops: of the matrix products, two for each multiplication; elementwise operations and gathers are not counted.
      weight_bytes: frozen weights that matrix products read, once for each product.
      stacked_bytes: arrays that loops stack for later use, mainly kept activations.
    """

    flops: int = 0
    weight_bytes: int = 0
    stacked_bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.stacked_bytes + other.stacked_bytes,
        )

    def __mul__(self, times: int) -> "Work":
        return Work(times * self.flops, times * self.weight_bytes, times * self.stacked_bytes)


def nbytes(tree: Any) -> int:
    """Return the bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def work(jaxpr: Any, frozen: Sequence[bool]) -> Work:
    """Count the work of a (closed) jaxpr.

    Args:
      jaxpr: as `jax.jit(f).trace(...)` or `jax.make_jaxpr` return it. A loop without a fixed length counts once.
      frozen: whether each flat argument is a frozen weight.
    """
    return _count(jaxpr, frozen)[0]


def _count(jaxpr: Any, frozen: Sequence[bool]) -> tuple[Work, list[bool]]:
    """Return the work of a jaxpr, and whether each of its results is a part of a frozen weight; arguments as in `work`."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    weights = {variable for variable, is_weight in zip(jaxpr.invars, frozen, strict=True) if is_weight}
    total = Work()
    for equation in jaxpr.eqns:
        # Literals are not hashable, and never weights.
        read = [isinstance(operand, core.Var) and operand in weights for operand in equation.invars]
        name = equation.primitive.name
        if name == "dot_general":
            operands = zip(equation.invars, read, strict=True)
            total += Work(_dot_flops(equation), sum(nbytes(operand.aval) for operand, is_weight in operands if is_weight))
        elif name == "optimization_barrier":  # before a quantised kernel is dequantised: its codes are read here
            of_weights = [each for each, is_weight in zip(equation.invars, read, strict=True) if is_weight]
            total += Work(weight_bytes=sum(nbytes(each.aval) for each in of_weights))
        elif read and read[0] and (name in _VIEWS or (name == "gather" and _takes_of_stack(equation))):
            weights.add(equation.outvars[0])
        elif name == "scan":
            body = equation.params["jaxpr"]
            results = zip(equation.outvars, body.out_avals, strict=True)
            stacked = [result.aval for result, each in results if result.aval.shape != each.shape]  # the others are carried
            total += work(body, read) * equation.params["length"] + Work(stacked_bytes=nbytes(stacked))
        elif name == "cond":
            branches = (work(branch, read[1:]) for branch in equation.params["branches"])
            total += max(branches, key=lambda branch: branch.flops)
        else:
            for inner in _jaxprs(equation.params.values()):
                # A while loop's condition and body take some of its operands only: weights are not tracked into them.
                same = len(inner.invars) == len(read)
                own, parts = _count(inner, read if same else [False] * len(inner.invars))
                total += own
                if len(parts) == len(equation.outvars):  # jnp's and lax's own functions of a weight are jitted
                    weights.update(result for result, is_part in zip(equation.outvars, parts, strict=True) if is_part)
    return total, [isinstance(result, core.Var) and result in weights for result in jaxpr.outvars]


def _takes_of_stack(equation: Any) -> bool:
    """Return whether a gather takes whole entries of the first axis, as of the kernels of experts."""
    return bool(equation.outvars[0].aval.shape[1:] == equation.invars[0].aval.shape[1:])


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the jaxprs among the parameters of an equation."""
    for value in values:
        value = getattr(value, "jaxpr", value)
        if hasattr(value, "eqns"):
            yield value
