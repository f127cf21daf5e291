"""Adapters on their base model: densely trained classifiers, on disk, in transformers and on the command line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from data_helpers import CHAT, message_of
from helpers import CONFIG, load_in_transformers, random_tensors, run_config, write_config, write_model, write_rows

from neuroada_jax import cli, models
from neuroada_jax.adapters import exchange, native, on_base
from neuroada_jax.core import bypass
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.models import dense_modules
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.training import modules
from neuroada_jax.training.config_file import from_dict

SIZES = {
    "vocab_size": CONFIG["vocab_size"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "pad_token_id": 1,
    "dtype": "float32",
}
LABELS = ["no", "perhaps", "yes"]
TARGETS = ["query", "output.dense"]


def write_encoder(directory, kind, bare=False, dtype="float32"):
    """A checkpoint directory with a tokenizer; `bare`: of the model without classifier and pooler, names without prefix."""
    config = {"model_type": kind, **SIZES, "dtype": dtype}
    config |= {} if bare else {"id2label": {str(number): label for number, label in enumerate(LABELS)}}
    config |= {"architectures": [f"{kind.capitalize()}Model"]} if bare else {}
    tensors = random_tensors(config)
    if bare:
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
        tensors = {name.removeprefix(f"{kind}."): kept[name] for name in kept if "pooler" not in name}
    directory.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    CHAT.save_pretrained(str(directory))
    return directory


def trained(base_model, paths=None, k=2):
    """A bypass with random values and a random classifier, as after training."""
    params = base_model.params
    built = bypass.build(params, models.match_targets(params, TARGETS, base_model.model.layers_path), k)
    rng = np.random.default_rng(0)
    noise = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32))  # noqa: E731
    _, classifier = dense_modules.split(params, base_model.model.architecture.classifier if paths is None else paths)
    return Bypass(jax.tree.map(noise, built.values), built.columns), jax.tree.map(noise, classifier)


@pytest.fixture(scope="module", params=["bert", "roberta"])
def bare(request, tmp_path_factory):
    """(base with an initialised classifier of three labels, trained bypass, trained classifier, adapter directory)."""
    folder = tmp_path_factory.mktemp(request.param)
    directory = write_encoder(folder / "model", request.param, bare=True)
    base_model = load_model(str(directory), labels=LABELS)
    paths = base_model.model.architecture.optional
    values, classifier = trained(base_model, paths)
    on_base.save(folder / "adapter", values, base_model, native.Selection(2, TARGETS, seed=0), classifier=classifier)
    return base_model, values, classifier, folder / "adapter"


def test_a_classifier_comes_back_bit_for_bit(bare):
    base_model, values, classifier, directory = bare
    adapter = native.read(str(directory))
    assert set(adapter.dense_parameters) == set(base_model.initialised) and adapter.metadata["base"]["labels"] == LABELS
    again = load_model(
        base_model.source, labels=adapter.metadata["base"]["labels"], seed=9
    )  # another classifier to begin with
    jax.tree.map(np.testing.assert_array_equal, on_base.classifier(adapter, again), classifier)
    want = dense_modules.join(bypass.merge(base_model.params, values), classifier)
    jax.tree.map(np.testing.assert_array_equal, on_base.merge(adapter, again), want)


def test_the_merged_model_loads_in_transformers_with_the_same_logits(bare, tmp_path, caplog, capfd):
    base_model, *_, directory = bare
    params = on_base.merge(native.read(str(directory)), base_model)
    save.save(tmp_path / "merged", base_model, params, CHAT)
    reference = load_in_transformers(tmp_path / "merged", caplog, capfd, "AutoModelForSequenceClassification")
    assert type(reference).__name__ == base_model.model.architecture.transformers_class
    assert [reference.config.id2label[number] for number in range(3)] == LABELS
    assert not (tmp_path / "merged" / "generation_config.json").exists()
    ids = np.random.default_rng(0).integers(5, SIZES["vocab_size"], (3, 9)).astype(np.int32)
    mask = np.arange(9)[None] < np.array([9, 5, 2])[:, None]
    ids = np.where(mask, ids, SIZES["pad_token_id"]).astype(np.int32)
    with torch.no_grad():
        want = reference(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).logits.numpy()
    found = base_model.model.module().apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask))
    np.testing.assert_allclose(found, want, atol=1e-4)
    assert np.ptp(want) > 0.1
    again = load_model(str(tmp_path / "merged"))
    assert again.initialised == []
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_classifiers_that_do_not_fit_or_are_missing(bare):
    base_model, *_, directory = bare
    adapter = native.read(str(directory))
    name = min(adapter.dense_parameters)
    without = adapter._replace(
        dense_parameters={key: leaf for key, leaf in adapter.dense_parameters.items() if key != name}
    )
    assert (
        message_of(on_base.classifier, without, base_model)
        == f"adapter: neither {base_model.source} nor the adapter has {name!r}"
    )
    wide = adapter._replace(dense_parameters={**adapter.dense_parameters, name: np.zeros(7, np.float32)})
    assert message_of(on_base.classifier, wide, base_model).startswith(
        f"adapter: dense parameter {name!r} has shape [7], the base model has ["
    )
    layer = f"{base_model.model.architecture.prefix}encoder.layer.0.output.dense.bias"
    stacked = adapter._replace(dense_parameters={**adapter.dense_parameters, layer: np.zeros(16, np.float32)})
    assert message_of(on_base.classifier, stacked, base_model).endswith("the base model has no such tensor")


def test_labels_of_an_adapter_are_checked(bare, tmp_path):
    metadata = json.loads((bare[3] / "adapter.json").read_text())
    for labels in ("yes", [], [1]):
        metadata["base"]["labels"] = labels
        (tmp_path / "adapter.json").write_text(json.dumps(metadata))
        assert "'labels' of the base must be a list of names" in message_of(native.read, str(tmp_path))


def run(folder, model, **sections):
    return from_dict(run_config(folder, model, write_rows(folder / "rows.jsonl"), **sections), "here")


def test_which_modules_train_densely(bare, tmp_path):
    base_model, _, classifier, _ = bare
    config = run(tmp_path, base_model.source)
    assert config.bypass.targets is None
    assert modules.resolved(config, base_model.model).bypass.targets == list(models.ENCODER_TARGETS)
    targets = modules.target_paths(config, base_model.model)
    assert len(targets) == 6
    paths = modules.dense_paths(config, base_model, base_model.initialised, targets)
    assert jax.tree.structure(dense_modules.split(base_model.params, paths)[1]) == jax.tree.structure(classifier)
    message = message_of(
        modules.dense_paths,
        run(tmp_path, base_model.source, classifier={"train": False}),
        base_model,
        base_model.initialised,
        targets,
    )
    assert message.startswith(f"classifier.train: {base_model.source} has no ")
    message = message_of(modules.dense_paths, config, base_model, base_model.initialised, [("classifier",)])
    assert message == "bypass.targets: classifier belongs to the classifier, which trains densely; remove it"

    whole = load_model(str(write_encoder(tmp_path / "whole", "bert")))
    assert whole.initialised == [] and modules.dense_paths(config, whole, [], targets) == [("classifier",)]
    assert modules.dense_paths(run(tmp_path, base_model.source, classifier={"train": False}), whole, [], targets) == []


def test_the_command_line_on_an_encoder(bare, tmp_path, capsys):
    base_model, *_, directory = bare
    kind = base_model.model.hf_config["model_type"]

    def neuroada(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    code, out, _ = neuroada("inspect", base_model.source, "--json")
    names = [row["module"] for row in json.loads(out)["modules"]]
    assert code == 0 and f"{kind}.encoder.layer.1.attention.self.query" in names
    code, out, _ = neuroada("inspect", directory, "--json")
    assert code == 0 and len(json.loads(out)["modules"]) == 4

    code, _, err = neuroada("merge", "--adapter", directory, "--out", tmp_path / "merged")
    assert code == 0 and "initialised from seed" not in err  # the adapter has the classifier
    merged = load_model(str(tmp_path / "merged"))
    jax.tree.map(np.testing.assert_array_equal, merged.params, on_base.merge(native.read(str(directory)), base_model))

    rows = write_rows(tmp_path / "rows.jsonl")
    for command in ("train", "plan"):
        path = write_config(tmp_path / "run.yaml", run_config(tmp_path, base_model.source, rows))
        code, _, err = neuroada(command, path)
        assert code == 2 and f"error: data.task: 'instruct' trains a decoder to continue texts, and {kind} is" in err
        code, _, err = neuroada(command, path, "data.packing=true")
        assert code == 2 and f"error: data.packing: {kind} is an encoder" in err
        assert not (tmp_path / "out").exists()
    code, _, err = neuroada("generate", "--adapter", directory, "--prompt", "a")
    assert code == 2 and f"{kind} is an encoder, which cannot continue a text" in err


def test_a_decoder_has_no_classifier_to_train(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    content = run_config(tmp_path, model, write_rows(tmp_path / "rows.jsonl"), classifier={"learning_rate": 0.1})
    path = write_config(tmp_path / "run.yaml", content)
    assert cli.main(["train", str(path)]) == 2
    assert "classifier: llama is a decoder, which has no classifier to train" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["peft-supertuning", "peft-shira", "official", "huggingface"])
@pytest.mark.parametrize(
    ("kind", "dtype", "k"),
    [("bert", "float32", 1), ("bert", "bfloat16", 20), ("roberta", "float32", 5), ("roberta", "bfloat16", 2)],
)
def test_a_trained_classifier_in_pytorch_and_back(kind, dtype, k, form, tmp_path, capsys):
    directory = write_encoder(tmp_path / "model", kind, dtype=dtype)
    base_model = load_model(str(directory), "auto", labels=LABELS)
    values, classifier = trained(base_model, k=k)
    on_base.save(tmp_path / "adapter", values, base_model, native.Selection(k, TARGETS, seed=0), classifier=classifier)

    made = exchange.export_adapter(str(tmp_path / "adapter"), form, str(tmp_path / "x"), verify=True)
    assert made["merged_bit_equal"] is True and made["max_logit_difference"] <= 1e-4
    if form == "huggingface":
        assert len(json.loads((tmp_path / "x" / "config.json").read_text())["id2label"]) == len(LABELS)
        return
    exchange.import_adapter(str(tmp_path / "x"), form, str(directory), str(tmp_path / "back"))
    before, after = native.read(str(tmp_path / "adapter")), native.read(str(tmp_path / "back"))
    assert before.dense_parameters.keys() == after.dense_parameters.keys() and before.values.keys() == after.values.keys()
    rounds = form == "official" and dtype == "bfloat16"
    for ours, theirs in ((before.values, after.values), (before.dense_parameters, after.dense_parameters)):
        for name in ours:
            expected = ours[name].astype(jnp.bfloat16).astype(np.float32) if rounds else ours[name]
            np.testing.assert_array_equal(theirs[name], expected, err_msg=name)
    for name in before.columns:
        np.testing.assert_array_equal(after.columns[name], before.columns[name], err_msg=name)
