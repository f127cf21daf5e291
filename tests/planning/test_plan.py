"""Plans from a config.json alone: what they count, what they add up to, what they suggest, and bad input."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from data_helpers import message_of
from helpers import CONFIG, NEURONS, run_config, write_config

from neuroada_jax import cli
from neuroada_jax.planning import machines, plan, roofline, shapes
from neuroada_jax.planning.changes import with_changes
from neuroada_jax.planning.machines import Machine, this_machine
from neuroada_jax.planning.result import Footprint, Plan
from neuroada_jax.training import config_file

LAYERS, WIDTH, FEED, HEADS, HEAD, VOCABULARY = 2, 16, 24, 2, 8, 304
ROWS, LENGTH = 4, 64
HAS_PLUGIN = machines.compiler_for(machines.find("h100", "bfloat16")).platform == "gpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs are planned, with a model directory that has nothing but a config.json."""
    made = tmp_path_factory.mktemp("planning")
    (made / "bare").mkdir()
    (made / "bare" / "config.json").write_text(json.dumps(CONFIG))
    return made


@pytest.fixture(scope="module")
def bare(folder):
    """Builds a run of that model with a bypass on one linear map; keywords are sections of the run."""
    return lambda **sections: run_config(
        folder, folder / "bare", folder / "no-rows.jsonl", **{"bypass": {"targets": ["q_proj"]}, **sections}
    )


@pytest.fixture(scope="module")
def planned():
    """`plan.plan` of a run's content; the same content is compiled once."""
    known = {}

    def planned_once(content, *arguments):
        key = json.dumps([content, arguments])
        if key not in known:
            known[key] = plan.plan(config_file.from_dict(content, "test"), *arguments).to_json()
        return known[key]

    return planned_once


@pytest.fixture
def neuroada_plan(tmp_path, capsys):
    """Runs `neuroada plan` and returns (exit code, standard output, standard error)."""

    def run(content, *arguments):
        path = write_config(tmp_path / "run.yaml", content)
        capsys.readouterr()
        return cli.main(["plan", str(path), *arguments]), *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def quick_cpu(monkeypatch):
    """This machine without its timings."""
    monkeypatch.setattr(machines, "this_machine", lambda dtype: cpu())


def cpu(memory=16 * 10**9):
    return Machine("cpu", memory, 1e10, {"float32": 1e11, "bfloat16": 1e11})


def test_one_object_on_standard_output_and_nothing_else(bare, neuroada_plan):
    code, out, err = neuroada_plan(bare(bypass={}), "--json", "bypass.k=2")
    assert code == 0 and err == "" and out.count("\n") == 1
    made = json.loads(out)
    assert made["trainable"] == LAYERS * NEURONS * 2
    assert made["parameters"] == VOCABULARY * WIDTH + LAYERS * (2 * WIDTH + 3 * WIDTH * FEED + 3 * WIDTH * WIDTH) + WIDTH
    assert made["trainable_percent"] == pytest.approx(100 * made["trainable"] / made["parameters"])
    assert set(made["bytes"]) == {"weights", "bypass", "optimizer", "batch", "temporaries"}
    assert made["total_bytes"] == sum(made["bytes"].values())
    assert made["bytes"]["weights"] == 4 * made["parameters"]
    assert made["bytes"]["bypass"] == 3 * 4 * made["trainable"]  # values, columns and base entries
    assert made["bytes"]["batch"] == 4 * (4 * ROWS * LENGTH + ROWS)
    assert made["adapter_bytes"] == 8 * made["trainable"]
    # AdamW's two moments in float32, and counters beside them.
    assert 8 * made["trainable"] < made["bytes"]["optimizer"] < 8 * made["trainable"] + 64
    assert made["checkpoint_bytes"] == 8 * made["trainable"] + made["bytes"]["optimizer"] + 4  # values, columns; the step
    assert made["fits"] and made["change_first"] is None and made["changes"] == []
    assert made["compiled_for"] == "cpu" and made["device_memory_bytes"] == 16e9 and made["collective_bytes"] == 0
    assert made["floor_seconds"] == max(made["flops"] / 1e11, made["bytes_moved"] / 1e10)


def test_table(bare, planned, capsys):
    plan.plan(config_file.from_dict(bare(), "test")).print_table()
    out = capsys.readouterr().out
    for row in ("trained values", "weights, float32", "remat none", "fits", "floor of a step (roofline)", "compiled for"):
        assert row in out
    assert f"{LAYERS * WIDTH} (" in out


def hand_counted_flops(rows, forwards):
    """2 for every multiplication of every matrix product, with a forward pass through the layers `forwards` times."""
    tokens = rows * LENGTH
    kernels = WIDTH * (16 + 8 + 8 + 16) + 3 * WIDTH * FEED
    scores = rows * HEADS * LENGTH * LENGTH * HEAD
    # Backward: one product for the gradient of each linear map's input, two for each of attention's two products.
    # Attention forms its scores once more there.
    layer = forwards * (tokens * kernels + 2 * scores) + tokens * kernels + 5 * scores
    return 2 * (LAYERS * layer + 2 * tokens * WIDTH * VOCABULARY)


def test_flops_are_those_counted_by_hand(bare, planned):
    """k = 1 on a CPU sums products elementwise for the values' gradient, so that nothing but the frozen model is left."""
    assert planned(bare(training={"remat": "none"}))["flops"] == hand_counted_flops(ROWS, 1)
    # The backward pass needs no output of a layer's last linear map again, so that full remat leaves that product out.
    again = 2 * LAYERS * ROWS * LENGTH * WIDTH * FEED
    assert planned(bare(training={"remat": "full"}))["flops"] == hand_counted_flops(ROWS, 2) - again
    assert planned(bare(training={"accumulation": 2}))["flops"] == hand_counted_flops(ROWS, 1)


def test_bytes_moved_by_hand(bare, planned):
    """Every kernel is read forward, again but for the last one, and backward; and all that for each micro batch."""
    one, two = (planned(bare(training={"remat": "full", "accumulation": parts})) for parts in (1, 2))
    kernels = WIDTH * (16 + 8 + 8 + 16) + 3 * WIDTH * FEED
    read = 4 * (LAYERS * (3 * kernels - WIDTH * FEED) + 2 * VOCABULARY * WIDTH)
    trained = 2 * (one["checkpoint_bytes"] - 4) + one["adapter_bytes"]  # in and out; then columns and base entries
    inputs = 2 * 4 * LAYERS * ROWS * LENGTH * WIDTH  # of the layers, saved and read
    # Beyond these, gradients of the values, which loops stack up too.
    gradients = 2 * 4 * one["trainable"]
    assert read + trained + inputs < one["bytes_moved"] <= read + trained + inputs + 4 * gradients
    assert read < two["bytes_moved"] - one["bytes_moved"] <= read + 4 * gradients


def test_work_of_loops_branches_and_views():
    kernel, x = jnp.ones((3, 5)), jnp.ones((2, 3))

    def program(kernel, x, flag):
        once = x @ kernel.T.T.reshape(3, 5)
        looped = jax.lax.map(lambda row: row @ kernel, x)  # stacks (2, 5) up
        return jax.lax.cond(flag, lambda: once @ kernel.T, lambda: x), looped

    work = roofline.work(jax.make_jaxpr(program)(kernel, x, True), [True, False, False])
    product = 2 * 2 * 3 * 5
    assert work == roofline.Work(flops=3 * product, weight_bytes=(1 + 2 + 1) * 60, stacked_bytes=4 * 2 * 5)


def test_more_rows_need_more(bare, planned):
    two, four = (planned(bare(training={"batch_size": rows})) for rows in (2, 4))
    for key in ("flops", "bytes_moved", "total_bytes"):
        assert two[key] < four[key]
    split = planned(bare(training={"accumulation": 2}))
    assert split["bytes"]["temporaries"] < four["bytes"]["temporaries"]


@pytest.mark.parametrize(
    ("data", "length"),
    [
        ({"max_length": 60}, 64),  # buckets that follow from the data are multiples of 8
        ({"max_length": 60, "buckets": [96, 16, 61]}, 61),
        ({"max_length": 60, "buckets": [32, 48]}, 48),
    ],
)
def test_length_of_the_longest_batch(bare, data, length):
    batch = shapes.longest_batch(config_file.from_dict(bare(data=data), "test"), ROWS)
    assert batch.input_ids.shape == batch.label_ids.shape == (ROWS, length)


def test_a_packed_run_is_planned_with_its_positions(bare, planned):
    packed = bare(data={"max_length": 60, "packing": True})
    batch = shapes.longest_batch(config_file.from_dict(packed, "test"), ROWS)
    assert batch.input_ids.shape == batch.positions.shape == (ROWS, 60)
    made = planned(packed)
    assert made["attention"] == "xla"
    assert made["bytes"]["batch"] == 4 * ROWS * (5 * 60 + 1)  # ids, three arrays of targets, positions; and lengths


def test_devices_share_the_rows_and_sum_the_gradients(bare, planned):
    alone, shared = planned(bare()), planned(bare(), "cpu", 2)
    assert (alone["rows"], shared["rows"]) == (4, 2)
    assert shared["flops"] * 2 == alone["flops"]
    assert alone["collectives"] == {} and alone["collective_bytes"] == 0
    values_and_counts = 4 * shared["trainable"] + 8  # beside the gradient the loss and how many targets there were
    assert shared["collectives"] == {"all-reduce": {"count": 1, "bytes": values_and_counts}}
    assert shared["collective_bytes"] == values_and_counts
    assert (shared["devices"], shared["mode"], shared["mesh"]) == (2, "shard_map", {"data": 2, "fsdp": 1, "tensor": 1})
    for kind in ("weights", "bypass", "optimizer"):
        assert shared["bytes"][kind] == alone["bytes"][kind]
    assert planned(bare(parallel={"devices": 2}))["collectives"] == shared["collectives"]
    assert planned(bare(), "cpu", 3)["rows"] == 2  # two empty ones fill the batch up


def test_devices_that_share_the_weights_hold_less_and_send_more(bare, planned):
    alone, shared = planned(bare(bypass={})), planned(bare(bypass={}, parallel={"fsdp": 8}))
    assert shared["devices"] == 8 and shared["mode"] == "jit" and shared["rows"] == 1
    norms = 4 * WIDTH * (2 * LAYERS + 1)
    assert shared["bytes"]["weights"] == (alone["bytes"]["weights"] - norms) // 8 + norms
    assert shared["bytes"]["bypass"] * 8 == alone["bytes"]["bypass"]
    gathered = shared["collectives"]["all-gather"]["bytes"]
    columns = 4 * shared["trainable"]
    # Every kernel forward and backward, the embedding once.
    assert gathered == 2 * (alone["bytes"]["weights"] - norms) - 4 * VOCABULARY * WIDTH + columns
    assert shared["adapter_bytes"] == alone["adapter_bytes"]
    found = [planned(bare(parallel={"mode": mode}), "cpu", 2)["can_share_weights"] for mode in ("auto", "pmap")]
    assert found == [True, False] and not alone["can_share_weights"] and not shared["can_share_weights"]


@pytest.mark.parametrize(
    ("section", "devices", "message"),
    [
        ({}, 0, "--devices: expected at least 1, found 0"),
        ({}, 9, "--devices: 9 need as many virtual CPU devices, found 8"),
        ({"mode": "single"}, 2, "--devices: parallel.mode: single of the config uses 1, found 2"),
        ({"fsdp": 4}, 6, "parallel: fsdp 4 x tensor 1 does not divide 6 devices"),
        ({"fsdp": 4}, 2, "parallel: fsdp 4 x tensor 1: needs 4 devices, found 2"),
        ({"mode": "pmap"}, 3, "training.batch_size: 4 examples cannot be divided over 3 devices in 1 micro batch(es) each"),
    ],
)
def test_devices_that_cannot_be(bare, planned, section, devices, message):
    assert message_of(planned, bare(parallel=section), "cpu", devices).startswith(message)


def test_more_devices_than_jax_has_are_started_by_the_command(tmp_path, bare):
    """As a person calls it: on a machine with one CPU device, in a process of its own."""
    path = write_config(tmp_path / "run.yaml", bare(training={"batch_size": 16}))
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "neuroada_jax.cli", "plan", str(path), "--devices", "16", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    assert made["devices"] == 16 and made["collectives"]["all-reduce"]["bytes"] == 4 * made["trainable"] + 8


def test_what_to_change_is_found_by_planning_again(bare, planned, monkeypatch):
    total, full = (planned(bare(training={"remat": remat}))["total_bytes"] for remat in ("none", "full"))
    monkeypatch.setattr(machines, "this_machine", lambda dtype: cpu(memory=full))
    made = plan.plan(config_file.from_dict(bare(), "test")).to_json()
    assert not made["fits"] and made["total_bytes"] == total > full
    assert (made["change_first"], made["changes"]) == ("training.remat=full", ["training.remat=full"])
    assert made["changed_total_bytes"] == full


def fake_plan(changes, memory, dtype="float32", remat="none"):
    """A plan whose weights take 100 bytes in float32, and a batch of 12 rows as much per row, a fifth with full remat."""
    changed = dict(change.split("=") for change in changes)
    dtype, remat = changed.get("model.dtype", dtype), changed.get("training.remat", remat)
    parts = int(changed.get("training.accumulation", 1))
    weights = 100 if dtype == "float32" else 50
    activations = weights * 12 // parts // (5 if remat == "full" else 1)
    return Plan(
        name="run",
        model="model",
        method="neuroada",
        machine=cpu(memory),
        devices=8,
        mode="shard_map",
        mesh={"data": 8, "fsdp": 1, "tensor": 1},
        can_share_weights=False,
        dtype=dtype,
        remat=remat,
        accumulation=parts,
        examples=12,
        tokens=64,
        labels=64,
        trainable=1,
        parameters=100,
        memory=Footprint(weights, 0, 0, 0, activations),
        flops=1,
        bytes_moved=1,
        collectives={},
        adapter_bytes=1,
        checkpoint_bytes=1,
        compiled_for="cpu",
        compile_seconds=1.0,
        attention="xla",
    )


@pytest.mark.parametrize(
    ("memory", "settings", "first", "changes"),
    [
        (1300, {}, None, []),
        (340, {}, "training.remat=full", ["training.remat=full"]),
        (200, {}, "training.remat=full", ["training.remat=full", "training.accumulation=4"]),
        (220, {"remat": "full"}, "training.accumulation=2", ["training.accumulation=2"]),
        (
            110,
            {},
            "training.remat=full",
            ["training.remat=full", "training.accumulation=12", "model.dtype=bfloat16"],
        ),
        (90, {}, "model.dtype=bfloat16", ["model.dtype=bfloat16", "training.remat=full", "training.accumulation=4"]),
        (40, {}, "model.path", ["model.dtype=bfloat16"]),
        (40, {"dtype": "bfloat16"}, "model.path", []),
        (55, {"dtype": "bfloat16"}, "training.remat=full", ["training.remat=full", "training.accumulation=12"]),
    ],
)
def test_order_of_what_to_change(memory, settings, first, changes):
    """What costs nothing but time first, the dtype then; only the dtype helps where the weights alone are too many."""
    made = with_changes(fake_plan([], memory, **settings), lambda tried: fake_plan(tried, memory, **settings)).to_json()
    assert (made["change_first"], made["changes"]) == (first, changes)


@pytest.mark.parametrize(("can", "change"), [(True, "parallel.fsdp=8"), (False, "model.dtype=bfloat16")])
def test_weights_that_do_not_fit_are_shared_where_that_can_be(can, change):
    found = dataclasses.replace(fake_plan([], 90), can_share_weights=can)
    smaller = fake_plan(["model.dtype=bfloat16"], 1000, remat="full")
    assert with_changes(found, lambda _: smaller).changes.first == change


def test_a_row_that_is_too_long_however_it_is_computed():
    alone = dataclasses.replace(fake_plan([], 60, dtype="bfloat16", remat="full"), examples=1)
    assert with_changes(alone, fake_plan).changes.first == "data.max_length"


@pytest.mark.parametrize(
    ("sections", "fields", "message"),
    [
        ({"data": {"max_length": 500}}, {}, "data.max_length: 500 is more than the model's 128 positions"),
        ({"bypass": {"targets": ["q_prj"]}}, {}, "bypass.targets: 'q_prj' matches no linear map"),
        ({"bypass": {"targets": ["lm_head"]}}, {}, "bypass.targets: 'lm_head' shares its weights with the embedding"),
        ({}, {"hidden_size": None}, "config.json: hidden_size must be a positive integer, found None"),
        ({}, {"num_hidden_layers": 0}, "config.json: num_hidden_layers must be a positive integer, found 0"),
        ({}, {"num_attention_heads": 3, "num_key_value_heads": 2}, "config.json: num_attention_heads 3 is no multiple of"),
        ({}, {"head_dim": 7}, "config.json: head_dim must be even, found 7"),
        ({}, {"model_type": "mamba"}, "config.json: model_type 'mamba' is not supported"),
        ({"model": {"path": "/nowhere/at/all"}}, {}, "model /nowhere/at/all does not exist"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(tmp_path, bare, neuroada_plan, sections, fields, message):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **fields}))
    code, out, err = neuroada_plan(bare(**{"model": {"path": str(tmp_path)}, **sections}))
    assert code == 2 and out == ""
    assert message in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize("option", ["--machine", "--target"])
def test_an_unknown_machine_lists_the_known_ones(bare, neuroada_plan, option):
    code, out, err = neuroada_plan(bare(), option, "tpu")
    assert code == 2 and out == ""
    assert err == "neuroada: error: --machine: expected one of cpu, h100, h200, a100, l40s, rtx4090, found 'tpu'\n"


@pytest.mark.skipif(HAS_PLUGIN, reason="JAX's CUDA plugin is installed")
def test_a_gpu_without_the_plugin_is_compiled_for_the_cpu_and_says_so(bare, planned):
    made = planned(bare(), "rtx4090")
    assert made["compiled_for"] == "cpu" and made["device_memory_bytes"] == 24e9
    assert "CUDA plugin is not installed" in made["notes"][0]
    assert made["floor_seconds"] == max(made["flops"] / 82.6e12, made["bytes_moved"] / 1.008e12)


@pytest.mark.skipif(not HAS_PLUGIN, reason="JAX's CUDA plugin is not installed")
@pytest.mark.parametrize("name", [name for name in machines.NAMES if name != "cpu"])
def test_every_gpu_is_compiled_for(bare, planned, name):
    made = planned(bare(model={"dtype": "bfloat16"}), name)
    assert made["compiled_for"].startswith(f"{name} (sm_") and made["bytes"]["temporaries"] > 0


def test_this_machine_is_measured():
    cpu = this_machine("float32")
    assert min(cpu.memory, cpu.bandwidth, cpu.flops["float32"]) > 1e8
