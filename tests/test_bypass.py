"""The Bypass tree: build, count, merge, resident writes and exact unmerging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from neuroada_jax import bypass, models, selection

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
    names = [path for path, _ in bypass.kernels(tree(jnp.float32))]
    assert names == [TARGETS[0], TARGETS[1], ("model", "layers", "o_proj"), TARGETS[2]]


def test_build_gives_zero_values_and_the_selected_columns():
    params = tree(jnp.bfloat16)
    built = bypass.build(params, TARGETS, 3)
    assert [path for path, _ in bypass.leaves(built.columns, "columns")] == TARGETS
    for path in TARGETS:
        kernel = bypass.get(params, path)["kernel"]
        columns, values = bypass.get(built.columns, path)["columns"], bypass.get(built.values, path)["values"]
        np.testing.assert_array_equal(columns, selection.select(kernel, 3))
        assert (columns.dtype, values.dtype) == (jnp.int32, jnp.float32)
        assert values.shape == columns.shape
        assert not values.any()
    assert bypass.count(built.values) == 3 * (3 * 8 + 3 * 6 + 11)


def test_build_clips_k_to_the_inputs_and_takes_another_score_and_dtype():
    params = tree(jnp.float32)
    built = bypass.build(params, TARGETS, 8, score=lambda kernel: -jnp.abs(kernel), dtype=jnp.bfloat16)
    assert bypass.get(built.values, TARGETS[0])["values"].shape == (3, 8, 6)
    assert bypass.get(built.values, TARGETS[1])["values"].shape == (3, 6, 8)
    assert bypass.get(built.values, TARGETS[1])["values"].dtype == jnp.bfloat16
    kernel, columns = params["model"]["layers"]["deep"]["down_proj"]["kernel"], bypass.get(built.columns, TARGETS[1])
    np.testing.assert_array_equal(columns["columns"], selection.select(kernel, 8, lambda kernel: -jnp.abs(kernel)))


@pytest.mark.parametrize("path", [("nowhere",), ("model", "layers", "deep", "norm"), ("model", "layers", "deep")])
def test_build_refuses_a_path_without_a_kernel(path):
    with pytest.raises(KeyError):
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
        np.testing.assert_array_equal(bypass.get(merged, path)["kernel"], want)


def _arrays(params, built, path):
    get = bypass.get
    return get(params, path)["kernel"], get(built.columns, path)["columns"], get(built.values, path)["values"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_rounds_the_float32_sum_once(dtype):
    params = tree(dtype)
    built = random_values(bypass.build(params, TARGETS, 3))
    merged = merge(params, built)
    for path in TARGETS:
        kernel, columns, values = _arrays(params, built, path)
        want = np.array(kernel)
        base = np.take_along_axis(np.asarray(kernel), np.asarray(columns), axis=-1).astype(np.float32)
        np.put_along_axis(want, np.asarray(columns), (base + np.asarray(values)).astype(want.dtype), axis=-1)
        np.testing.assert_array_equal(bypass.get(merged, path)["kernel"], want)
        assert bypass.get(merged, path)["kernel"].dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_unmerge_gives_the_base_back_bit_for_bit(dtype):
    params = tree(dtype)
    built = random_values(bypass.build(params, TARGETS, 4), scale=3.0)
    base = read(params, built.columns)
    assert_identical(unmerge(merge(params, built), built.columns, base), params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_many_resident_writes_neither_drift_nor_lose_the_base(dtype):
    params = tree(dtype)
    built = bypass.build(params, TARGETS, 4)
    base = read(params, built.columns)
    write = jit(bypass.make_resident, donate_argnums=0)
    resident = jax.tree.map(jnp.copy, params)
    for step in range(30):
        built = random_values(built, seed=step, scale=10.0 ** (step % 5 - 3))
        resident = write(resident, built, base)
    assert_identical(resident, merge(params, built))  # whatever was written before
    assert_identical(unmerge(resident, built.columns, base), params)


def test_a_resident_write_from_unmerged_or_merged_params_is_the_same():
    params = tree(jnp.float32)
    built = random_values(bypass.build(params, TARGETS, 2))
    base = read(params, built.columns)
    once = make_resident(params, built, base)
    assert_identical(make_resident(once, built, base), once)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_resident_write_aliases_the_donated_parameters(dtype):
    params = {"layers": {"q_proj": {"kernel": jax.ShapeDtypeStruct((4, 256, 192), dtype)}}}
    built = jax.eval_shape(lambda params: bypass.build(params, [("layers", "q_proj")], 2), params)
    base = jax.eval_shape(bypass.read, params, built.columns)
    memory = jax.jit(bypass.make_resident, donate_argnums=0).lower(params, built, base).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * 256 * 192 * dtype.dtype.itemsize


def test_other_leaves_are_the_same_objects():
    params = tree(jnp.float32)
    built = random_values(bypass.build(params, TARGETS, 2))
    base = bypass.read(params, built.columns)
    before = others(params)
    kernels = {path: bypass.get(params, path)["kernel"] for path in TARGETS}
    for changed in (
        bypass.merge(params, built),
        bypass.make_resident(params, built, base),
        bypass.unmerge(params, built.columns, base),
    ):
        after = others(changed)
        assert after.keys() == before.keys()
        assert all(after[path] is before[path] for path in before)
    assert all(bypass.get(params, path)["kernel"] is kernels[path] for path in TARGETS)  # the input tree is untouched


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
    paths = models.match_targets(params, targets, model.stack)
    for k, (count, percent) in trainable.items():
        built = jax.eval_shape(lambda params, k=k: bypass.build(params, paths, k), params)
        assert bypass.count(built.values) == count
        assert round(100 * count / total, 4) == percent
        shapes = {path: leaf.shape for path, leaf in bypass.leaves(built.values, "values")}
        assert {path: leaf.shape for path, leaf in bypass.leaves(built.columns, "columns")} == shapes
