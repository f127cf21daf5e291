"""A `jax.vmap` rule over examples for functions with a custom VJP: one call for the batch, not one for each example.

JAX batches the backward pass of a custom VJP and sums the results afterwards. `jax.vmap(layer)(x)`, the usual form of a
batch in Equinox and in plain JAX, then forms a value gradient for every example, and a dense dW for every example where
`choose_algorithm` picks the dense product. Here the mapped axis becomes one more leading axis of x before anything is
differentiated. `jax.custom_batching.custom_vmap` cannot do this: around a custom VJP it has no reverse mode, and inside one
it sees a single example.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir


def share_examples(name: str, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return `function` with a vmap rule for x alone, which turns the mapped axis into a leading axis of x.

    Derivatives and residuals remain those of `function`, and so does vmap over its other arguments (several adapters,
    stacked layers).

    Args:
      name: of the primitive that represents the function in a jaxpr until it is differentiated or compiled.
      function: (x, *arrays, **static) -> y with x (*B, I) and y (*B, O), for any number of axes B.
    """

    def shared(*arguments: Any, **static: Any) -> jax.Array:
        if not any(isinstance(argument, jax.core.Tracer) for argument in arguments):
            return function(*arguments, **static)
        # Traced here rather than at lowering, so that settings such as the matmul precision are those of the caller.
        jaxpr = jax.make_jaxpr(functools.partial(function, **static))(*arguments)
        return primitive().bind(*arguments, jaxpr=jaxpr, static=tuple(static.items()))

    @functools.cache
    def primitive() -> Any:
        return _primitive(name, shared)

    return shared


def _primitive(name: str, shared: Callable[..., jax.Array]) -> Any:
    """Return the primitive; its parameters are `jaxpr`, the function traced at its arguments, and the items of `static`."""
    from jax.extend.core import Primitive, jaxpr_as_fun  # here, since jax.extend takes a tenth of the time of `import jax`

    primitive = Primitive(name)

    def evaluate(*arguments: Any, jaxpr: Any, static: Any) -> jax.Array:
        return jaxpr_as_fun(jaxpr)(*arguments)[0]

    def differentiate(primals: Any, tangents: Any, **params: Any) -> Any:
        active = [index for index, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

        def of_active(*arrays: jax.Array) -> jax.Array:
            arguments = list(primals)
            for index, array in zip(active, arrays, strict=True):
                arguments[index] = array
            return evaluate(*arguments, **params)

        return jax.jvp(of_active, [primals[index] for index in active], [tangents[index] for index in active])

    def batch(arguments: Any, axes: Any, **params: Any) -> Any:
        x, *others = arguments
        if all(axis is None for axis in axes[1:]):
            return shared(jnp.moveaxis(x, axes[0], 0), *others, **dict(params["static"])), 0
        return jax.vmap(functools.partial(evaluate, **params), in_axes=tuple(axes))(*arguments), 0

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(lambda *_, jaxpr, static: jaxpr.out_avals[0])
    ad.primitive_jvps[primitive] = differentiate
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(evaluate, multiple_results=False))
    return primitive
