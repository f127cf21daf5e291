"""Rounding to bfloat16: no program leaves it to a pair of casts, and runs report the share of values that it swallows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step as decoder
import test_step_encoder as encoder
from jax.extend.core import Literal
from test_parallel import FORMS, SINGLE

from neuroada_jax.core import bypass, ops, selection
from neuroada_jax.core.entries import Layout, round_to
from neuroada_jax.core.value_gradient import GradientAlgorithm
from neuroada_jax.generation import decoder as decoding
from neuroada_jax.models import Remat
from neuroada_jax.models.losses import classification_losses, label_scores
from neuroada_jax.training import parallel, rounding, step
from neuroada_jax.training.config import ParallelSection

# Primitives that pass numbers on as they are.
MOVES = {
    *(
        "reshape",
        "transpose",
        "broadcast_in_dim",
        "squeeze",
        "expand_dims",
        "slice",
        "dynamic_slice",
        "gather",
        "rev",
        "pad",
    ),
    *("concatenate", "scatter", "dynamic_update_slice", "select_n", "copy", "name", "optimization_barrier"),
}


def casts_back(jaxpr, narrowed=None):
    """Yield the (dtype, cast) of every cast to a wider dtype whose operand was cast to this narrower dtype before.

    XLA may drop both, and on a GPU it does, so that nothing is rounded. Numbers are followed through `MOVES` and into and
    out of the jaxprs inside.
    """
    narrowed = {} if narrowed is None else narrowed  # variable -> the dtype it was cast to
    rounded = set()  # variables for which that cast changes nothing
    for equation in jaxpr.eqns:
        inputs, outputs = equation.invars, equation.outvars
        if equation.primitive.name == "reduce_precision":
            rounded.add(outputs[0])
        elif equation.primitive.name == "convert_element_type":
            old, new = inputs[0].aval.dtype, outputs[0].aval.dtype
            if all(jnp.issubdtype(dtype, jnp.floating) for dtype in (old, new)):
                source = None if isinstance(inputs[0], Literal) else inputs[0]  # a literal has no hash
                if new.itemsize < old.itemsize and source not in rounded:
                    narrowed[outputs[0]] = new
                elif new.itemsize > old.itemsize and source in narrowed:
                    yield narrowed[source], equation
        elif equation.primitive.name in MOVES:
            for source in inputs:
                pass_on(narrowed, [source] * len(outputs), narrowed, outputs)
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else [parameter]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    inside = {}  # of its own, since several equations may share a jaxpr
                    pass_on(narrowed, inputs[len(inputs) - len(inner.invars) :], inside, inner.invars)
                    yield from casts_back(inner, inside)
                    if len(inner.outvars) == len(outputs):
                        pass_on(inside, inner.outvars, narrowed, outputs)


def pass_on(known, sources, narrowed, targets):
    for source, target in zip(sources, targets, strict=False):  # a loop's condition has fewer inputs than the loop
        if not isinstance(source, Literal) and source in known:
            narrowed[target] = known[source]


def casts_back_in(function, *arguments):
    return list(casts_back(jax.make_jaxpr(function)(*arguments).jaxpr))


def test_the_search_finds_the_rounding_that_xla_drops():
    def remainder(x):
        return x - jax.jit(lambda x: x.astype(jnp.bfloat16).reshape(2, 4))(x).T.astype(jnp.float32).T.reshape(8)

    def in_a_loop(x):
        return jax.lax.scan(lambda total, part: (total + remainder(part), None), x, jnp.stack([x, x]))[0]

    @jax.checkpoint
    def in_a_derivative(x):
        return jnp.sum(jnp.sin(x.astype(jnp.bfloat16).astype(jnp.float32)))

    def scattered(x):
        return jnp.zeros(9, jnp.bfloat16).at[jnp.arange(8)].set(x.astype(jnp.bfloat16)).astype(jnp.float32)

    for function in remainder, in_a_loop, jax.grad(in_a_derivative), scattered:
        assert casts_back_in(function, jnp.ones(8)), function
    assert not casts_back_in(lambda x: jnp.sin(x.astype(jnp.bfloat16)).astype(jnp.float32), jnp.ones(8))
    assert not casts_back_in(lambda x: round_to(x, jnp.bfloat16).astype(jnp.float32), jnp.ones(8))


@pytest.fixture(scope="module")
def half():
    """(model, transformation, state, batch) of a decoder with a bfloat16 base."""
    model, transformation, _ = decoder.compiled(dtype=jnp.bfloat16)
    return model, transformation, decoder.fresh(model, transformation, decoder.ALL, 3)[1], decoder.random_batch()


@pytest.fixture
def mixed():
    with jax.numpy_dtype_promotion("standard"):  # JAX transposes its own attention in mixed precision
        yield


@pytest.mark.parametrize("remat", Remat)
def test_a_step_leaves_no_rounding_to_casts(half, mixed, remat, monkeypatch):
    # Token blocks, which a CPU takes, widen x and dy: where these are not rounded before, the gradient is more exact.
    monkeypatch.setattr(ops, "choose_algorithm", lambda *_, **__: GradientAlgorithm.DENSE_CHUNKS)
    model, transformation, state, batch = half
    assert not casts_back_in(step.make_step(model.module(remat), transformation, 2), state, batch)
    official = state.bypass._replace(values=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.bypass.values))
    state = step.initial_state(state.params, official, transformation)
    assert not casts_back_in(step.make_step(model.module(remat), transformation), state, batch)


def test_a_step_of_an_encoder_leaves_no_rounding_to_casts(mixed):
    model, transformation, make_state = encoder.setup(dtype=jnp.bfloat16, dropout=0.1)
    run = step.make_step(model.module(), transformation, 1, classification_losses, 3)
    found = casts_back_in(run, make_state(), encoder.random_batch())
    # The value gradient widens the gathered output of a LayerNorm: where that is not rounded before, it is more exact.
    assert [cast.outvars[0].aval.shape for _, cast in found] == [(4 * 12, encoder.SIZES["intermediate_size"])]


def test_other_programs_leave_no_rounding_to_casts(half, mixed):
    model, _, state, batch = half
    module, params = model.module(), state.params

    def generate(params):
        ids, lengths = jnp.ones((2, 5), jnp.int32), jnp.asarray([3, 5])
        _, caches = decoding.prefill(module, params, ids, lengths, 8)
        return decoding.Decoder.make(module, params, 5 - lengths).step(ids[:, 0], jnp.int32(6), caches)

    assert not casts_back_in(generate, params)
    assert not casts_back_in(lambda params, batch: label_scores(module, {"params": params}, batch), params, batch)
    assert not casts_back_in(bypass.merge, params, state.bypass)
    assert not casts_back_in(bypass.make_resident, params, state.bypass, state.base_entries)
    assert not casts_back_in(lambda kernel: selection.select(kernel, 3), jnp.ones((12, 10), jnp.bfloat16))


@pytest.mark.parametrize(
    "algorithm", [each for each in GradientAlgorithm if each is not GradientAlgorithm.CUDA]
)  # a CPU has none
@pytest.mark.parametrize("layout", Layout)
def test_the_layer_leaves_no_rounding_to_casts(algorithm, layout):
    columns = jnp.zeros((16, 1), jnp.int32)
    for kernel_dtype, x_dtype in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")):
        kernel, x = jnp.ones((16, 16), kernel_dtype), jnp.ones((20, 16), x_dtype)

        def loss(values, x, resident):
            y = ops.bypass_dense(x, kernel, columns, values, resident=resident, algorithm=algorithm, layout=layout)  # noqa: B023
            return jnp.sum(jnp.sin(y))

        for resident in True, False:
            gradient = jax.grad(functools.partial(loss, resident=resident), argnums=(0, 1))
            assert not casts_back_in(gradient, jnp.zeros((16, 1)), x), (kernel_dtype, x_dtype, resident)


def test_the_share_that_rounds_to_nothing_is_the_same_on_all_devices(half):
    model, transformation, _, _ = half
    state = decoder.fresh(model, transformation, decoder.ALL, 3)[1]
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 2e-3, leaf.dtype), state.bypass.values)
    state = state._replace(trainable={"bypass": values})
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (values, state.base_entries)), strict=True)
    same = [((base.astype(np.float32) + value).astype(base.dtype) == base).reshape(-1) for value, base in pairs]
    want = np.concatenate(same).mean()
    assert 0.1 < want < 0.9
    for form in SINGLE, *FORMS.values():
        devices = parallel.resolve(ParallelSection(**form))
        placed = devices.place(jax.tree.map(jnp.copy, state))
        assert rounding.share(placed, devices) == pytest.approx(want)
