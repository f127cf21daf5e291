"""Loading models: every tensor in its place, dtypes, digests, errors of a checkpoint, and host memory while loading."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import write_bert, write_model, write_safetensors

from neuroada_jax import models
from neuroada_jax.core import trees
from neuroada_jax.errors import UserError
from neuroada_jax.models import names
from neuroada_jax.pretrained import tensor_checks
from neuroada_jax.pretrained.load import LoadedModel, load_model, open_model

CONFIG = {
    "model_type": "llama",
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def random_tensors(dtype=np.float32, config=CONFIG, seed=0):
    model = models.from_hf_config(config)
    params = dict(trees.flatten(model.abstract_params()))
    rng = np.random.default_rng(seed)
    shapes = {
        name: params[slot.path].shape[0 if slot.layer is None else 1 :]
        for name, slot in names.checkpoint_names(model.abstract_params(), model.layers_path).items()
    }
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(directory, tensors, shards=1, config=CONFIG):
    """A Hugging Face directory with one model.safetensors, or several files and their index."""
    write_safetensors(directory, tensors, shards)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def leaf(params, name, layers_path=("model", "layers")):
    """The array that a checkpoint tensor became."""
    slot = names.checkpoint_names(params, layers_path)[name]
    for key in slot.path:
        params = params[key]
    return params if slot.layer is None else params[slot.layer]


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_every_tensor_arrives_in_its_place(tmp_path):
    tensors = random_tensors()
    seen = []
    loaded = load_model(str(write(tmp_path, tensors)), on_progress=lambda done, total: seen.append((done, total)))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(leaf(loaded.params, name), tensor)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), loaded.params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), loaded.model.abstract_params()
    )
    assert loaded.digests.keys() == tensors.keys()
    assert (loaded.path, loaded.source) == (str(tmp_path), str(tmp_path))
    assert seen == [(i + 1, len(tensors)) for i in range(len(tensors))]


def test_shards_equal_a_single_file(tmp_path):
    tensors = random_tensors()
    single = load_model(str(write(tmp_path / "single", tensors)))
    sharded = load_model(str(write(tmp_path / "sharded", tensors, shards=3)))
    assert_identical(sharded.params, single.params)
    assert sharded.digests == single.digests


def test_tensors_that_the_model_does_not_have_are_left_alone(tmp_path):
    tensors = random_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    loaded = load_model(str(write(tmp_path, tensors)))
    assert loaded.digests.keys() == random_tensors().keys()


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes(tmp_path, stored, wanted):
    tensors = random_tensors(stored)
    loaded = load_model(str(write(tmp_path, tensors)), dtype=wanted)
    assert {a.dtype for a in jax.tree.leaves(loaded.params)} == {jnp.dtype(wanted)}
    assert loaded.model.config.dtype == jnp.dtype(wanted)
    for name in (Q_PROJ, "model.norm.weight", "lm_head.weight"):
        want = tensors[name].astype(np.float32).astype(jnp.dtype(wanted))
        assert np.asarray(leaf(loaded.params, name)).tobytes() == want.tobytes()


def test_a_digest_changes_if_and_only_if_its_bytes_change(tmp_path):
    tensors = random_tensors()
    before = load_model(str(write(tmp_path / "a", tensors))).digests
    assert load_model(str(write(tmp_path / "b", tensors, shards=2)), dtype="bfloat16").digests == before
    changed = tensors | {Q_PROJ: tensors[Q_PROJ].copy()}
    changed[Q_PROJ].view(np.uint32)[3, 5] ^= 1  # the last bit of one number
    after = load_model(str(write(tmp_path / "c", changed))).digests
    assert {name for name in before if before[name] != after[name]} == {Q_PROJ}
    assert len(set(before.values())) == len(before)


def test_an_opened_encoder_knows_the_tensors_that_its_checkpoint_lacks(tmp_path):
    opened = open_model(str(write_bert(tmp_path / "bert"))).with_labels(["no", "perhaps", "yes"])
    loaded = opened.load(seed=3)
    classifier = ["classifier.bias", "classifier.weight"]
    assert [name for name in opened.missing() if name in classifier] == classifier
    assert opened.missing() == loaded.initialised == loaded.without_params().initialised
    assert not isinstance(loaded.without_params(), LoadedModel) and loaded.without_params().digests == loaded.digests
    assert loaded.params["classifier"]["kernel"].shape == (3, 16)


def error_of(path):
    with pytest.raises(UserError) as error:
        load_model(str(path))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_missing_tensor(tmp_path):
    tensors = random_tensors()
    del tensors[Q_PROJ]
    write(tmp_path, tensors)
    assert error_of(tmp_path) == f"{tmp_path}: tensor {Q_PROJ!r} is missing from the checkpoint; expected shape [16, 16]"


def test_wrong_shape(tmp_path):
    write(tmp_path, random_tensors() | {Q_PROJ: np.zeros((16, 8), np.float32)})
    assert error_of(tmp_path) == f"{tmp_path}: tensor {Q_PROJ!r} has shape [16, 8], expected [16, 16]"


def test_unsupported_architecture_from_a_directory(tmp_path):
    write(tmp_path, random_tensors(), config=CONFIG | {"model_type": "mamba"})
    assert "model_type 'mamba' is not supported" in error_of(tmp_path)


MEASURE = """
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", 1)
    from neuroada_jax.pretrained.load import LoadedModel, load_model, open_model
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.ones(8)))
    # Not getrusage: its ru_maxrss starts at what the process that started this one held.
    status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1024
    load_model(sys.argv[2])  # a tiny one: compiles nothing that counts, imports everything
    before = status("VmRSS")
    loaded = load_model(sys.argv[1])
    jax.block_until_ready(loaded.params)
    size = sum(a.nbytes for a in jax.tree.leaves(loaded.params)) / 2**20
    print(f"{status('VmHWM') - before:.1f} {size:.1f}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_stays_near_the_size_of_the_model(tmp_path):
    """A checkpoint of 194 MB in tensors of up to 8 MB: the peak is the model, a few tensors and what compiling takes."""
    config = CONFIG | {"vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 2000, "num_hidden_layers": 5}
    large = write(tmp_path / "large", random_tensors(config=config), shards=3, config=config)
    small = write(tmp_path / "small", random_tensors())
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(large), str(small)],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},  # else glibc keeps up to 64 MB of what was freed
    )
    assert run.returncode == 0, run.stderr
    growth, size = map(float, run.stdout.split())
    print(f"peak {growth:.1f} MiB over the baseline for a model of {size:.1f} MiB: {growth / size:.2f}")
    assert size > 180
    assert growth < 1.3 * size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path, dtype, value):
    name = "model.layers.1.mlp.up_proj.weight"
    weight = np.full((24, 16), 3.0, np.float32)
    weight[3, 4] = value
    with np.errstate(invalid="ignore"):
        with pytest.raises(UserError, match=rf"tensor '{name}' holds 1 (NaN|infinite entries) in 384, expected finite"):
            tensor_checks.check_finite(name, weight.astype(jnp.dtype(dtype)))
        path = write_model(tmp_path / "m", None, weights={name: weight})
        with pytest.raises(UserError, match=rf"{path}: tensor '{name}' holds 1"):
            load_model(str(path))


def test_large_weights_are_finite():
    tensor_checks.check_finite("x", np.full((100,), 3e38, np.float32))


@pytest.mark.parametrize("shardings", [False, True])
def test_a_model_larger_than_the_machine_is_one_line_before_memory_is_taken(shardings):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    leaf = jax.ShapeDtypeStruct((2**20, 2**24), jnp.float32)
    with pytest.raises(
        UserError, match=r"the parameters take 70.37 TB, more than all of the .* of memory that this machine"
    ):
        tensor_checks.check_memory({"w": leaf}, {"w": sharding if shardings else None})
