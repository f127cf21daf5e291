"""The Bypass tree: build, count, merge, resident writes and exact unmerging; adapters swapped and mixed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from neuroada_jax import models
from neuroada_jax.core import bypass, selection, trees
from neuroada_jax.core.entries import Layout
from neuroada_jax.errors import UserError

# Compiled whole: operation by operation they take three times as long.
merge, read, unmerge, make_resident = map(jit, (bypass.merge, bypass.read, bypass.unmerge, bypass.make_resident))

TARGETS = [("model", "layers", "q_proj"), ("model", "layers", "deep", "down_proj"), ("head",)]


def tree(dtype, seed=0):
    """A nested tree with stacked (3, O, I) and plain (O, I) kernels, biases and other leaves."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.3, dtype)  # noqa: E731
    return {
        "model": {
            "embed": {"embedding": normal(11, 6)},
            "layers": {
                "q_proj": {"kernel": normal(3, 8, 6), "bias": normal(3, 8)},
                "deep": {"down_proj": {"kernel": normal(3, 6, 10)}, "norm": {"scale": normal(3, 6)}},
                "o_proj": {"kernel": normal(3, 6, 8)},
            },
        },
        "head": {"kernel": normal(11, 6)},
    }


def random_values(built, seed=1, scale=0.1):
    rng = np.random.default_rng(seed)
    return built._replace(
        values=jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape) * scale, v.dtype), built.values)
    )


def adapter(params, targets, k, seed, *, chosen=0, dtype=jnp.float32, layout=Layout.OI):
    """Random values at random columns; equal `chosen` give equal columns."""
    rng = np.random.default_rng(chosen)
    values, columns = {}, {}
    for path in targets:
        *leading, outputs, inputs = trees.kernel_at(params, path).shape
        if layout is Layout.IO:
            outputs, inputs = inputs, outputs
        order = np.argsort(rng.random((*leading, outputs, inputs)), axis=-1)[..., :k]
        columns = trees.put(columns, path, {"columns": jnp.asarray(np.sort(order, axis=-1), jnp.int32)})
        values = trees.put(values, path, {"values": np.zeros(order.shape, dtype)})
    return random_values(bypass.Bypass(values, columns), seed=seed, scale=1.0)


def dense_sum(kernel, columns, values):
    """W + D in float64."""
    delta = np.zeros(kernel.shape)
    np.put_along_axis(delta, np.asarray(columns), np.asarray(values, np.float64), axis=-1)
    return np.asarray(kernel, np.float64) + delta


def others(params):
    """Every leaf that is no target kernel, by path."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    names = {tuple(key.key for key in path): leaf for path, leaf in flat}
    return {path: leaf for path, leaf in names.items() if path[:-1] not in TARGETS or path[-1] != "kernel"}


def assert_identical(a, b):
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_kernels_lists_every_linear_map_in_tree_order():
    names = [path for path, _ in trees.kernels(tree(jnp.float32))]
    assert names == [TARGETS[0], TARGETS[1], ("model", "layers", "o_proj"), TARGETS[2]]


def test_build_gives_zero_values_and_the_selected_columns():
    params = tree(jnp.bfloat16)
    built = bypass.build(params, TARGETS, 3)
    assert [path for path, _ in trees.leaves(built.columns, "columns")] == TARGETS
    for path in TARGETS:
        kernel = trees.get(params, path)["kernel"]
        columns, values = trees.get(built.columns, path)["columns"], trees.get(built.values, path)["values"]
        np.testing.assert_array_equal(columns, selection.select(kernel, 3))
        assert (columns.dtype, values.dtype) == (jnp.int32, jnp.float32)
        assert values.shape == columns.shape
        assert not values.any()
    assert bypass.count(built.values) == 3 * (3 * 8 + 3 * 6 + 11)


def test_build_clips_k_to_the_inputs_and_takes_another_score_and_dtype():
    params = tree(jnp.float32)
    built = bypass.build(params, TARGETS, 8, score=lambda kernel: -jnp.abs(kernel), dtype=jnp.bfloat16)
    assert trees.get(built.values, TARGETS[0])["values"].shape == (3, 8, 6)
    assert trees.get(built.values, TARGETS[1])["values"].shape == (3, 6, 8)
    assert trees.get(built.values, TARGETS[1])["values"].dtype == jnp.bfloat16
    kernel, columns = params["model"]["layers"]["deep"]["down_proj"]["kernel"], trees.get(built.columns, TARGETS[1])
    np.testing.assert_array_equal(columns["columns"], selection.select(kernel, 8, lambda kernel: -jnp.abs(kernel)))


NO_KERNELS = [("nowhere",), ("model", "layers", "deep", "norm"), ("model", "layers", "deep"), ("head", "kernel", "x")]


@pytest.mark.parametrize("path", [*NO_KERNELS, ("model", "layers", "deep", "norm", "bias")])
def test_build_refuses_a_path_without_a_kernel(path):
    with pytest.raises(KeyError, match=".".join(path)):
        bypass.build(tree(jnp.float32), [path], 1)


def test_build_refuses_k_below_one():
    with pytest.raises(ValueError, match="k must be at least 1"):
        bypass.build(tree(jnp.float32), TARGETS, 0)


def test_merge_is_the_dense_sum_in_float64():
    with jax.enable_x64(True):
        params = tree(jnp.float64)
        built = random_values(bypass.build(params, TARGETS, 3, dtype=jnp.float64))
        merged = merge(params, built)
    for path in TARGETS:
        want = dense_sum(*_arrays(params, built, path))
        np.testing.assert_array_equal(trees.get(merged, path)["kernel"], want)


def _arrays(params, built, path):
    get = trees.get
    return get(params, path)["kernel"], get(built.columns, path)["columns"], get(built.values, path)["values"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_rounds_the_float32_sum_once(dtype):
    params = tree(dtype)
    built = random_values(bypass.build(params, TARGETS, 3))
    merged = merge(params, built)
    for path in TARGETS:
        kernel, columns, values = _arrays(params, built, path)
        want = np.array(kernel)
        base_entries = np.take_along_axis(np.asarray(kernel), np.asarray(columns), axis=-1).astype(np.float32)
        np.put_along_axis(want, np.asarray(columns), (base_entries + np.asarray(values)).astype(want.dtype), axis=-1)
        np.testing.assert_array_equal(trees.get(merged, path)["kernel"], want)
        assert trees.get(merged, path)["kernel"].dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unmerge_gives_the_base_back_bit_for_bit(dtype):
    params = tree(dtype)
    built = random_values(bypass.build(params, TARGETS, 4), scale=3.0)
    base_entries = read(params, built.columns)
    assert_identical(unmerge(merge(params, built), built.columns, base_entries), params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_many_resident_writes_neither_drift_nor_lose_the_base(dtype):
    params = tree(dtype)
    built = bypass.build(params, TARGETS, 4)
    base_entries = read(params, built.columns)
    write = jit(bypass.make_resident, donate_argnums=0)
    resident = jax.tree.map(jnp.copy, params)
    for step in range(30):
        built = random_values(built, seed=step, scale=10.0 ** (step % 5 - 3))
        resident = write(resident, built, base_entries)
    assert_identical(resident, merge(params, built))  # whatever was written before
    assert_identical(unmerge(resident, built.columns, base_entries), params)


def test_a_resident_write_from_unmerged_or_merged_params_is_the_same():
    params = tree(jnp.float32)
    built = random_values(bypass.build(params, TARGETS, 2))
    base_entries = read(params, built.columns)
    once = make_resident(params, built, base_entries)
    assert_identical(make_resident(once, built, base_entries), once)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_resident_write_aliases_the_donated_parameters(dtype):
    params = {"layers": {"q_proj": {"kernel": jax.ShapeDtypeStruct((4, 256, 192), dtype)}}}
    built = jax.eval_shape(lambda params: bypass.build(params, [("layers", "q_proj")], 2), params)
    base_entries = jax.eval_shape(bypass.read, params, built.columns)
    memory = jax.jit(bypass.make_resident, donate_argnums=0).lower(params, built, base_entries).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * 256 * 192 * dtype.dtype.itemsize


def test_other_leaves_are_the_same_objects():
    params = tree(jnp.float32)
    built = random_values(bypass.build(params, TARGETS, 2))
    base_entries = bypass.read(params, built.columns)
    before = others(params)
    kernels = {path: trees.get(params, path)["kernel"] for path in TARGETS}
    for changed in (
        bypass.merge(params, built),
        bypass.make_resident(params, built, base_entries),
        bypass.unmerge(params, built.columns, base_entries),
    ):
        after = others(changed)
        assert after.keys() == before.keys()
        assert all(after[path] is before[path] for path in before)
    assert all(trees.get(params, path)["kernel"] is kernels[path] for path in TARGETS)  # the input tree is untouched


# Any tree: other layouts, other names, several axes.


def own_tree(dtype, layout, seed=0):
    """What somebody else's code keeps: weights under names of its own, with other leaves beside them."""
    rng = np.random.default_rng(seed)

    def weights(*shape):
        rows = jnp.asarray(rng.normal(size=shape) * 0.3, dtype)
        return rows if layout is Layout.OI else rows.swapaxes(-1, -2)

    return {
        "embedding": jnp.asarray(rng.normal(size=(11, 6)), dtype),
        "blocks": {"w_in": weights(3, 8, 6), "w_out": weights(3, 6, 8), "scale": jnp.ones((3, 6), dtype)},
        "head": {"kernel": weights(11, 6), "bias": jnp.zeros(11, dtype)},
        "plain": weights(5, 7),
    }


OWN = [("blocks", "w_in"), ("blocks", "w_out"), ("head",), ("plain",)]


@pytest.mark.parametrize("layout", Layout)
def test_any_tree_merges_to_the_dense_sum_in_float64(layout):
    rows = lambda kernel: kernel if layout is Layout.OI else kernel.swapaxes(-1, -2)  # noqa: E731
    with jax.enable_x64(True):
        params = own_tree(jnp.float64, layout)
        built = random_values(bypass.build(params, OWN, 3, dtype=jnp.float64, layout=layout))
        merged = jit(functools.partial(bypass.merge, layout=layout))(params, built)
        chosen = {path: selection.select(rows(trees.kernel_at(params, path)), 3) for path in OWN}
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for path in OWN:
        kernel, columns = rows(np.asarray(trees.kernel_at(params, path))), trees.get(built.columns, path)["columns"]
        np.testing.assert_array_equal(columns, chosen[path])
        want = dense_sum(kernel, columns, trees.get(built.values, path)["values"])
        np.testing.assert_array_equal(rows(np.asarray(trees.kernel_at(merged, path))), want)
    for path in [("embedding",), ("blocks", "scale"), ("head", "bias")]:
        assert_identical(trees.get(merged, path), trees.get(params, path))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layout", Layout)
def test_any_tree_comes_back_bit_for_bit(layout, dtype):
    params = own_tree(dtype, layout)
    built = adapter(params, OWN, 3, 0, layout=layout)
    base_entries = bypass.read(params, built.columns, layout=layout)
    merged = bypass.merge(params, built, layout=layout)
    assert_identical(bypass.make_resident(params, built, base_entries, layout=layout), merged)
    assert_identical(bypass.unmerge(merged, built.columns, base_entries, layout=layout), params)


@pytest.mark.parametrize("layout", Layout)
def test_a_kernel_may_have_its_inputs_and_neurons_over_several_axes(layout):
    """As Flax's attention: (D, H, N) for the queries, (H, N, D) for the output; three layers of each."""
    rng = np.random.default_rng(3)
    inputs, neurons = (4, 3), (2, 5)
    axes = (*neurons, *inputs) if layout is Layout.OI else (*inputs, *neurons)
    flat = (10, 12) if layout is Layout.OI else (12, 10)
    wide = {"map": {"kernel": jnp.asarray(rng.normal(size=(3, *axes)), jnp.float32)}}
    matrix = {"map": {"kernel": wide["map"]["kernel"].reshape(3, *flat)}}
    built = random_values(bypass.build(matrix, [("map",)], 4, layout=layout))
    base_entries = bypass.read(wide, built.columns, layout=layout)
    assert_identical(base_entries, bypass.read(matrix, built.columns, layout=layout))
    merged = bypass.merge(wide, built, layout=layout)
    want = bypass.merge(matrix, built, layout=layout)["map"]["kernel"]
    np.testing.assert_array_equal(merged["map"]["kernel"], want.reshape(3, *axes))
    assert_identical(bypass.unmerge(merged, built.columns, base_entries, layout=layout), wide)


def test_a_tree_in_the_other_layout_is_refused():
    params = own_tree(jnp.float32, Layout.OI)
    built = bypass.build(params, [("head",)], 2)
    with pytest.raises(ValueError, match=r"\(11, 6\) in layout IO does not fit columns \(11, 2\)"):
        bypass.merge(params, built, layout=Layout.IO)


# Adapters as arrays.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_swaps_between_different_columns_k_and_targets_lose_nothing(dtype):
    params = tree(dtype)
    adapters = [
        adapter(params, TARGETS[:2], 1, 0, chosen=0),
        adapter(params, TARGETS[1:], 4, 1, chosen=1),
        adapter(params, TARGETS, 6, 2, chosen=2),
    ]
    swap = jit(bypass.swap, donate_argnums=0)
    live, columns, base_entries = jax.tree.map(jnp.copy, params), {}, {}
    for new in adapters:
        live, base_entries = swap(live, columns, base_entries, new)
        columns = new.columns
        assert_identical(live, merge(params, new))
        assert_identical(base_entries, read(params, columns))
    assert_identical(unmerge(live, columns, base_entries), params)


def test_equal_columns_only_need_overwriting():
    params = tree(jnp.float32)
    one, two = adapter(params, TARGETS, 3, 0), adapter(params, TARGETS, 3, 1)
    base_entries = read(params, one.columns)
    overwritten = make_resident(make_resident(params, one, base_entries), two, base_entries)
    swapped, new_entries = bypass.swap(make_resident(params, one, base_entries), one.columns, base_entries, two)
    assert_identical(overwritten, swapped)
    assert_identical(new_entries, base_entries)


def test_swap_in_the_other_layout():
    params = own_tree(jnp.float32, Layout.IO)
    one = adapter(params, OWN[:2], 2, 0, layout=Layout.IO)
    two = adapter(params, OWN[1:], 4, 1, layout=Layout.IO, chosen=1)
    swap = jit(functools.partial(bypass.swap, layout=Layout.IO))
    live, base_entries = swap(params, {}, {}, one)
    live, base_entries = swap(live, one.columns, base_entries, two)
    assert_identical(live, bypass.merge(params, two, layout=Layout.IO))
    assert_identical(bypass.unmerge(live, two.columns, base_entries, layout=Layout.IO), params)


def test_swap_refuses_a_path_without_a_kernel():
    params = tree(jnp.float32)
    new = adapter({"other": params["head"]}, [("other",)], 2, 0)
    with pytest.raises(KeyError, match="other holds no kernel"):
        bypass.swap(params, {}, {}, new)


@pytest.mark.parametrize("layout", Layout)
def test_a_swap_allocates_nothing_weight_sized(layout):
    size = 4 * 256 * 192 * 4
    shape = (4, 256, 192) if layout is Layout.OI else (4, 192, 256)
    params = {"layers": {"q_proj": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}}

    def abstract(k):
        leaf = lambda name, dtype: {"layers": {"q_proj": {name: jax.ShapeDtypeStruct((4, 256, k), dtype)}}}  # noqa: E731
        return bypass.Bypass(leaf("values", jnp.float32), leaf("columns", jnp.int32)), leaf("base_entries", jnp.float32)

    (old, base_entries), (new, _) = abstract(1), abstract(3)
    swap = jax.jit(functools.partial(bypass.swap, layout=layout), donate_argnums=0)
    memory = swap.lower(params, old.columns, base_entries, new).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes < size / 8


def test_average_and_interpolation_are_those_of_the_dense_differences():
    with jax.enable_x64(True):
        params = tree(jnp.float64)
        one, two, three = (adapter(params, TARGETS, 3, seed, dtype=jnp.float64) for seed in range(3))
        mixes = {
            (1 / 6, 1 / 3, 1 / 2): bypass.average([one, two, three], [1.0, 2.0, 3.0]),
            (1 / 3, 1 / 3, 1 / 3): bypass.average([one, two, three]),
            (0.75, 0.25, 0.0): bypass.interpolate(one, two, 0.25),
            (1.5, -0.5, 0.0): bypass.interpolate(one, two, -0.5),
        }
        merged = {weights: merge(params, mix) for weights, mix in mixes.items()}
        for weights, got in merged.items():
            for path in TARGETS:
                deltas = [
                    dense_sum(*_arrays(params, each, path)) - trees.get(params, path)["kernel"]
                    for each in (one, two, three)
                ]
                want = trees.get(params, path)["kernel"] + sum(w * d for w, d in zip(weights, deltas, strict=True))
                np.testing.assert_allclose(trees.get(got, path)["kernel"], want, rtol=1e-12, atol=1e-12)


def test_the_ends_of_an_interpolation_are_the_adapters_themselves():
    params = tree(jnp.float32)
    one, two = adapter(params, TARGETS, 3, 0), adapter(params, TARGETS, 3, 1)
    for got, want in [
        (bypass.interpolate(one, two, 0.0), one),
        (bypass.interpolate(one, two, 1.0), two),
        (bypass.average([one]), one),
    ]:
        assert_identical(got, want)


def test_an_average_keeps_the_dtype_and_sums_in_float32():
    params = tree(jnp.bfloat16)
    ones = [adapter(params, TARGETS, 2, 0, dtype=jnp.bfloat16) for _ in range(3)]
    ones = [one._replace(values=jax.tree.map(jnp.ones_like, one.values)) for one in ones]
    for leaf in jax.tree.leaves(bypass.average(ones, [1.0, 1.0, 1.0]).values):
        assert leaf.dtype == jnp.bfloat16
        assert (leaf == 1).all()


def test_mixing_names_the_module_whose_columns_differ():
    params = tree(jnp.float32)
    one = adapter(params, TARGETS, 1, 0)
    with pytest.raises(UserError, match=r"^model.layers.q_proj: .*\(3, 8, 1\), another \(3, 8, 4\).*smaller k"):
        bypass.average([one, one, adapter(params, TARGETS, 4, 1)])
    with pytest.raises(UserError, match=r"^head: only one of two adapters has a bypass there"):
        bypass.interpolate(one, adapter(params, TARGETS[:2], 1, 1), 0.5)
    columns = trees.put(one.columns, ("head",), {"columns": one.columns["head"]["columns"].at[7, 0].add(1)})
    found = one.columns["head"]["columns"][7].tolist()
    with pytest.raises(UserError, match=rf"^head: .*neuron \(7,\): \[{found[0]}\] and \[{found[0] + 1}\]"):
        bypass.interpolate(one, one._replace(columns=columns), 0.5)


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [(0, None, "0 adapters and 0 weights"), (2, [1.0], "2 adapters and 1 weights"), (2, [1.0, -1.0], "sum to 0")],
)
def test_an_average_wants_weights_that_fit(count, weights, message):
    params = tree(jnp.float32)
    with pytest.raises(UserError, match=message):
        bypass.average([adapter(params, TARGETS, 1, 0)] * count, weights)


# Published sizes: total parameters, trainable at k = 1 and 20 in percent.
_LLAMA = {"model_type": "llama", "vocab_size": 32000}
PUBLISHED = {
    "llama-7b": (
        {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        6_738_415_616,
        {1: (1_359_872, 0.0202), 20: (27_197_440, 0.4036)},
    ),
    "llama-13b": (
        {**_LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
        13_015_864_320,
        {1: (2_129_920, 0.0164), 20: (42_598_400, 0.3273)},
    ),
    "llama-3-8b": (
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
        },
        8_030_261_248,
        {1: (1_376_256, 0.0171), 20: (27_525_120, 0.3428)},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    config, total, trainable = PUBLISHED[name]
    model = models.from_hf_config(config, jnp.bfloat16)
    params = model.abstract_params()  # shapes alone: nothing is allocated
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    paths = models.match_targets(params, targets, model.layers_path)
    for k, (count, percent) in trainable.items():
        built = jax.eval_shape(lambda params, k=k: bypass.build(params, paths, k), params)
        assert bypass.count(built.values) == count
        assert round(100 * count / total, 4) == percent
        shapes = {path: leaf.shape for path, leaf in trees.leaves(built.values, "values")}
        assert {path: leaf.shape for path, leaf in trees.leaves(built.columns, "columns")} == shapes
