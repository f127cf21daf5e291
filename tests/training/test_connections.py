"""Connections of a run: statistics against dense NumPy, what trains and what stays zero, files, and refused settings."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import NEURONS, run_config, write_model, write_rows

import neuroada_jax as na
from neuroada_jax.adapters import exchange, inspection, native, on_base
from neuroada_jax.core import bypass, experts, quantise, quantised, random_positions, scores, selection, trees
from neuroada_jax.core.scores import RULES, Needs
from neuroada_jax.errors import UserError
from neuroada_jax.models import match_targets
from neuroada_jax.models.experts import ExpertMap
from neuroada_jax.models.layers import BypassDense
from neuroada_jax.planning.shapes import abstract_run
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.training import config_file, connections, modules, statistics
from neuroada_jax.training.config import BypassSection

DEPTH = 2
VARIANTS = {
    "shared": {"shared_columns": True},
    "neurons": {"neurons": 0.5},
    "layers": {"layers": [1]},
    "exclude": {"exclude_layers": [1], "neurons": 0.3, "shared_columns": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("connections")
    write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return load_model(str(folder / "model"), "float32")


def settings_of(folder, **section):
    return config_file.from_dict(
        run_config(folder, folder / "model", folder / "rows.jsonl", bypass={"k": 2, **section}), "test"
    )


def chosen(folder, base, function=None, **section):
    """(config, bypass) of a run on the model."""
    config = modules.resolved(settings_of(folder, **section), base.model)
    paths = match_targets(base.params, config.bypass.targets, base.model.layers_path)
    return config, connections.choose(config, base.model, base.params, paths, score=function)


# Statistics


class Tokens(NamedTuple):
    inputs: np.ndarray  # (B, T, I)
    label_mask: np.ndarray  # (B, T)


class TwoMaps(nn.Module):
    @nn.compact
    def __call__(self, x):
        return BypassDense(5, name="last")(jnp.tanh(BypassDense(6, name="first")(x)))


def squared_outputs(module, variables, batch):
    return jnp.sum(jnp.square(module.apply(variables, batch.inputs)), axis=-1) * batch.label_mask


@pytest.mark.parametrize("accumulation", [1, 2])
def test_statistics_are_those_of_dense_float64(accumulation):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params = {"first": {"kernel": normal(6, 4)}, "last": {"kernel": normal(5, 6)}}
    batches = [Tokens(normal(2, 3, 4), np.float32([[1, 1, 0], [1, 0, 0]])) for _ in range(2)]
    arguments = (TwoMaps(), jax.tree.map(jnp.asarray, params), [("first",), ("last",)], batches, accumulation)
    squares = statistics.input_squares(*arguments, squared_outputs)
    sums = statistics.gradient_sums(*arguments, squared_outputs)
    want = {"first": np.zeros(4), "last": np.zeros(6)}
    dense = {"first": np.zeros((6, 4)), "last": np.zeros((5, 6))}
    for batch in batches:
        x = batch.inputs.astype(np.float64)[batch.label_mask == 1]
        hidden = np.tanh(x @ params["first"]["kernel"].T.astype(np.float64))
        dy = 2 * hidden @ params["last"]["kernel"].T / len(x)
        before = dy @ params["last"]["kernel"] * (1 - hidden**2)
        dense = {"first": dense["first"] + before.T @ x, "last": dense["last"] + dy.T @ hidden}
        want = {"first": want["first"] + (x**2).sum(0), "last": want["last"] + (hidden**2).sum(0)}
    for name in want:
        np.testing.assert_allclose(squares[name]["squares"], want[name], rtol=1e-5)
        np.testing.assert_allclose(sums[name]["kernel"], dense[name], rtol=1e-4, atol=1e-5)


class Routed(nn.Module):
    @nn.compact
    def __call__(self, x, chosen):
        blocks = experts.blocks_of(chosen, 3)
        return experts.out_of_blocks(ExpertMap(3, 5, name="map")(experts.into_blocks(x, blocks), blocks.experts), blocks)


def test_experts_have_statistics_of_their_own_rows():
    rng = np.random.default_rng(0)
    kernel, chosen = rng.normal(size=(3, 5, 64)).astype(np.float32), np.int32([2, 0, 0, 2, 2, 0, 2])  # expert 1 has no row
    batch = Tokens(rng.normal(size=(7, 64)).astype(np.float32), np.float32([1, 1, 0, 1, 1, 1, 1]))
    outputs = lambda module, variables, batch: (  # noqa: E731
        jnp.sum(jnp.square(module.apply(variables, batch.inputs, jnp.asarray(chosen))), axis=-1) * batch.label_mask
    )
    parts = jax.vmap(lambda own: quantise.quantise(own, "nf4"))(kernel)
    held = quantised.QuantisedKernel(parts, "nf4", jnp.dtype("float32"))
    for own in (jnp.asarray(kernel), held):
        arguments = (Routed(), {"map": {"kernel": own}}, [("map",)], [batch])
        squares = statistics.input_squares(*arguments, losses=outputs)["map"]["squares"]
        counts = batch.label_mask[:, None] * (chosen[:, None] == np.arange(3))
        np.testing.assert_allclose(squares, counts.T @ np.square(batch.inputs), rtol=1e-5)
    norms = statistics._norms(squares)
    assert (norms[1] == 1).all() and np.allclose(norms[0], np.sqrt(squares[0]))
    found, want = (statistics._factors_of(own, 2, jax.random.key(0)) for own in (held, quantised.dense_stack(held)))
    products = [each["by_neuron"] @ each["for_all"] for each in (found, want)]
    np.testing.assert_allclose(*products, atol=1e-4)
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [(3, 5, 2), (3, 2, 64)]
    columns = selection.search(held, 2, scores.lowrank, found)[0]
    np.testing.assert_array_equal(columns, selection.select(quantised.dense_stack(held), 2, scores.lowrank, found))


# What trains


@pytest.mark.parametrize("variant", ["layers", pytest.param("exclude", marks=pytest.mark.slow)])
def test_only_what_is_chosen_trains_and_files_say_so(variant, folder, tmp_path):
    section = VARIANTS[variant]
    model = na.load(folder / "model")
    rows = [{"prompt": "after a,", "completion": "b"}] * 4
    options = {
        "steps": 2,
        "batch_size": 2,
        "max_length": 32,
        "learning_rate": 0.02,
        "k": 3,
        "output": str(tmp_path / "run"),
    }
    tuned = na.fine_tune(model, rows, **options, **section)
    share, layers = section.get("neurons", 1), [0] if "exclude_layers" in section else section.get("layers", [0, 1])
    total = 0
    for module, values in tuned.adapter.values.items():
        trains = (values != 0).any(axis=1).sum()
        count = max(1, round(share * len(values))) if int(module.split(".")[2]) in layers else 0
        total += 3 * count
        assert trains <= count and (trains or not count), module  # a neuron's gradient may be zero
        columns = tuned.adapter.columns[module]
        assert columns.shape == values.shape
        assert (columns == columns[0]).all() == section.get("shared_columns", False), module
    assert tuned.results["trainable"] == total
    report = inspection.inspect(str(tmp_path / "run" / "adapter"), 1)
    assert report["values"] == total
    known = {name: value for name, value in section.items() if name != "exclude_layers"}
    assert known.items() <= report["selection"].items() and (report["selection"]["layers"] or [0, 1]) == layers
    prompts = ["after c,"]
    answer = tuned.generate(prompts, max_new_tokens=4)
    again = na.load(folder / "model", adapter=tmp_path / "run" / "adapter")
    assert again.generate(prompts, max_new_tokens=4) == answer


@pytest.mark.parametrize("over", ["map", "block", "model"])
def test_random_positions_are_as_many_as_k_a_neuron_in_their_scope(over, folder, base):
    section = {"score": "random", "random_over": over, "exclude_layers": [1] if over == "model" else None}
    config, built = chosen(folder, base, **section)
    shapes, counts = {path: kernel.shape for path, kernel in trees.kernels(base.params)}, {}
    of_shapes = connections.of_equal_shapes(config, base.model, base.params, list(shapes))
    for path, mask in trees.leaves(built.columns, "trained"):
        columns = np.asarray(trees.get(built.columns, path)["columns"])
        *_, outputs, inputs = shapes[path]
        assert (np.diff(columns, axis=-1) > 0).all() and columns.min() >= 0 and columns.max() < inputs
        assert columns.shape == mask.shape == trees.get(of_shapes.values, path)["values"].shape
        for layer, own in enumerate(np.asarray(mask)):
            key = {"map": (path, layer), "block": layer, "model": None}[over]
            found, wanted = counts.get(key, (0, 0))
            idle = over == "model" and layer == 1
            assert not (idle and own.any())
            counts[key] = (found + own.sum(), wanted + (0 if idle else 2 * outputs))
    assert all(found == wanted for found, wanted in counts.values())
    assert len(counts) == {"map": 7 * DEPTH, "block": DEPTH, "model": 1}[over]
    assert modules.count_trained(config, base.model, built.values) == sum(found for found, _ in counts.values())
    jax.tree.map(np.testing.assert_array_equal, built.columns, chosen(folder, base, **section)[1].columns)


def test_random_positions_are_uniform_without_repetition():
    matrices = [random_positions.Matrix(3, 4, 3), random_positions.Matrix(2, 6, 2)]  # 24 entries, of which 5
    hits, widths = np.zeros(24), [random_positions.width(matrices, inputs, 5) for inputs in (4, 6)]
    for seed in range(2000):
        first, second = random_positions.draw(matrices, widths, [seed])
        flat = [4 * neuron + column for neuron, own in enumerate(first) for column in own if column < 4]
        flat += [12 + 6 * neuron + column for neuron, own in enumerate(second) for column in own if column < 6]
        assert len(set(flat)) == 5
        hits[flat] += 1
    assert abs(hits - 2000 * 5 / 24).max() < 4.5 * np.sqrt(2000 * 5 / 24 * 19 / 24)
    everything = random_positions.draw([random_positions.Matrix(2, 3, 6)], [3], [0])[0]
    np.testing.assert_array_equal(everything, [[0, 1, 2]] * 2)
    for k in (1, 20):  # 32 layers of LLaMA's widest map: no draw is repeated in practice, and the arrays stay narrow
        widest = random_positions.width([random_positions.Matrix(11008, 4096, 11008 * k)], 4096, 32 * 11008)
        counts = np.random.default_rng(k).binomial(11008 * k, 1 / 11008, (32, 11008))
        assert counts.max() < widest < {1: 16, 20: 60}[k]


def test_training_moves_random_positions_alone(folder, tmp_path):
    section = {"score": "random", "random_over": "block", "k": 1}
    rows = [{"prompt": "after a,", "completion": "b"}] * 4
    options = {"steps": 3, "batch_size": 2, "max_length": 32, "learning_rate": 0.02, "output": str(tmp_path / "run")}
    tuned = na.fine_tune(na.load(folder / "model"), rows, **options, **section)
    adapter = native.read(str(tmp_path / "run" / "adapter"))
    assert native.options_of(adapter.metadata).random_over == "block" and adapter.metadata["k"] == 1
    moved = sum(int((values != 0).sum()) for values in adapter.values.values())
    assert 0 < moved <= tuned.results["trainable"] == NEURONS * DEPTH
    assert max(int((values != 0).sum(axis=1).max()) for values in adapter.values.values()) > 1
    report = inspection.inspect(str(tmp_path / "run" / "adapter"), 1)
    assert report["values"] == moved and report["selection"]["random_over"] == "block"
    pytest.importorskip("torch")
    for form in ("peft-supertuning", "official"):
        exchange.export_adapter(
            str(tmp_path / "run" / "adapter"), form, str(tmp_path / form), verify=form == "peft-supertuning"
        )


def test_neurons_are_drawn_by_the_seed_for_every_layer(folder, base):
    masks = [
        dict(trees.leaves(chosen(folder, base, neurons=0.5, targets=["q_proj"], **more)[1].columns, "trained"))
        for more in ({}, {"score": "reverse"})
    ]
    for path, mask in masks[0].items():
        np.testing.assert_array_equal(mask, masks[1][path])
        assert mask.shape[0] == DEPTH and mask.dtype == bool
        np.testing.assert_array_equal(mask.sum(axis=1)[:, 0], round(0.5 * mask.shape[1]))
    assert any((mask[0] != mask[1]).any() for mask in masks[0].values())


# Files


def built_by(name, base, rng, **options):
    """A bypass of two kinds of maps by a rule, from random statistics, with random values."""
    paths = match_targets(base.params, ["q_proj", "down_proj"], base.model.layers_path)
    rule, statistics = RULES[name], {}
    for path in paths:
        kernel = trees.get(base.params, path)["kernel"]
        statistic = {
            Needs.NOTHING: lambda kernel: None,
            Needs.GRADIENT: lambda kernel: {"kernel": rng.normal(size=kernel.shape).astype(np.float32)},
            Needs.INPUTS: lambda kernel: {"for_all": rng.random((DEPTH, kernel.shape[-1]), np.float32)},
            Needs.FACTORS: lambda kernel: scores.factors(kernel, 4, jax.random.key(0)),
            Needs.SEEDS: lambda kernel: scores.seeds(jax.random.key(0), kernel.shape[:-1]),
        }[rule.needs](kernel)
        statistics = trees.put(statistics, path, statistic)
    needs = None if rule.needs is Needs.NOTHING else statistics
    built = bypass.build(base.params, paths, 2, score=rule.score, statistics=needs, **options)
    values = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32), built.values)
    return bypass.Bypass(values, built.columns)


@pytest.mark.parametrize(("name", "shared"), [*((name, False) for name in RULES), ("magnitude", True)])
def test_every_score_goes_through_every_format(name, shared, folder, base, tmp_path):
    """Values and columns come back from the native format; merged weights are the same, bit for bit, after all others."""
    pytest.importorskip("torch")
    trained = built_by(name, base, np.random.default_rng(5), shared=shared)
    options = native.SelectionOptions(shared_columns=shared, rank=4 if name == "lowrank" else None)
    on_base.save(tmp_path / "own", trained, base, native.Selection(2, ["q_proj", "down_proj"], name, 0, options))
    assert native.options_of(native.read(str(tmp_path / "own")).metadata) == options
    back = on_base.load(str(tmp_path / "own"), base)
    jax.tree.map(np.testing.assert_array_equal, back, trained)
    merged = bypass.merge(base.params, trained)
    for form in ["peft-supertuning", "peft-shira", "official"]:
        exchange.export_adapter(str(tmp_path / "own"), form, str(tmp_path / form))
        exchange.import_adapter(str(tmp_path / form), form, str(folder / "model"), str(tmp_path / f"{form}-back"))
        found = on_base.load(str(tmp_path / f"{form}-back"), base)
        jax.tree.map(np.testing.assert_array_equal, bypass.merge(base.params, found), merged)
        if shared:  # an import has columns for every neuron
            with pytest.raises(UserError, match=r"down_proj: the neurons of one adapter share their columns, those of"):
                bypass.average([trained, found])


@pytest.mark.parametrize(
    "selection",
    [
        {"neurons": 2},
        {"layers": ["a"]},
        {"shared_columns": 1},
        {"rank": 0},
        {"other": 1},
        [],
        {"neurons": True},
        {"random_over": 1},
    ],
)
def test_a_selection_that_no_run_writes_is_refused(selection):
    with pytest.raises(UserError, match=r"adapter.json: selection is"):
        native.options_of({"selection": selection})


# Bad settings


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"score": "lowrank", "rank": 9},
            r"bypass.rank: 9 is more than the rank of model.layers.self_attn.k_proj \(8, 16\)",
        ),
        ({"layers": [0, 2]}, "bypass.layers: 2 is no layer of this model, expected numbers from 0 to 1"),
        ({"exclude_layers": [1, 5]}, "bypass.exclude_layers: 5 is no layer of this model"),
        ({"layers": [1, 1]}, "bypass.layers: 1 is given twice"),
        ({"exclude_layers": [0, 1]}, "bypass.exclude_layers: all 2 layers of this model are named"),
        ({"layers": [0], "exclude_layers": [1]}, "bypass: give either layers or exclude_layers, found both"),
        ({"neurons": 0}, "bypass.neurons"),
        ({"neurons": 1.5}, "bypass.neurons"),
        ({"random_over": "map"}, "bypass: random_over: 'map' needs score random, found magnitude"),
        (
            {"random_over": "model", "score": "random", "neurons": 0.5},
            "bypass: random_over: 'model' needs neurons 1, found 0.5",
        ),
        ({"random_over": "layer", "score": "random"}, "bypass.random_over"),
        ({"statistic_batches": 0}, "bypass.statistic_batches"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_their_field(section, message, folder, base):
    with pytest.raises(UserError, match=message):
        modules.target_paths(settings_of(folder, **section), base.model)


def test_a_function_is_for_python_alone_and_named_with_its_map(folder, base):
    _, built = chosen(folder, base, lambda kernel: kernel, k=1, targets=["up_proj"])
    assert not list(trees.leaves(built.columns, "trained"))  # all of it
    kernel = base.params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    found = built.columns["model"]["layers"]["mlp"]["up_proj"]["columns"]
    np.testing.assert_array_equal(found[..., 0], np.argmax(kernel, axis=-1))
    with pytest.raises(UserError, match=r"^score: model.layers.mlp.down_proj has NaN or infinite scores"):
        chosen(folder, base, lambda kernel: kernel / (kernel.shape[1] - 24), k=1, targets=["down_proj"])
    with pytest.raises(UserError, match=r"bypass.score: 'custom' stands for a Python function"):
        na.fine_tune(na.load(folder / "model"), ROWS, score="custom", steps=1, learning_rate=0.1)


ROWS = [{"prompt": "after a,", "completion": "b"}]


def test_the_table_of_scores_is_the_config_s():
    known = BypassSection.__dataclass_fields__["score"].type
    assert [*RULES, "custom"] == list(known.__args__)


@pytest.mark.parametrize("section", [{}, *VARIANTS.values()])
def test_a_plan_counts_what_trains(section, folder):
    config = settings_of(folder, **section)
    run = abstract_run(config)
    share, depth = section.get("neurons", 1), 1 if {"layers", "exclude_layers"} & section.keys() else DEPTH
    per_map = [16, 8, 8, 16, 24, 24, 16]
    assert sum(per_map) == NEURONS
    want = 2 * depth * sum(max(1, round(share * neurons)) for neurons in per_map)
    assert modules.count_trained(config, run.opened.model, run.state.trainable["bypass"]) == want
    sets = {leaf.shape[-2] for _, leaf in trees.leaves(run.state.columns, "columns")}
    assert sets == ({1} if section.get("shared_columns") else set(per_map))
