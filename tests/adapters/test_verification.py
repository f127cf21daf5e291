"""`--verify` compares with transformers on the original checkpoint: a base model that is read wrongly here is caught."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from helpers import BERT, needs_peft, random_tensors, write_model

from neuroada_jax import cli, models
from neuroada_jax.adapters import exchange, native, on_base, verification
from neuroada_jax.errors import UserError
from neuroada_jax.models.rope import Rope
from neuroada_jax.pretrained import load
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.pretrained.safetensors_directory import SafetensorsDirectory

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}  # from max_position_embeddings on


def write_adapter(directory, base, labels=None):
    """An adapter with random values on three connections of two square maps, and an encoder's dense parameters."""
    base_model, rng = load_model(str(base), labels=labels), np.random.default_rng(3)
    maps = [name for name, shape in base_model.model.linear_maps().items() if shape == (16, 16)][:2]
    columns = {name: np.sort(rng.permuted(np.tile(np.arange(16), (16, 1)), axis=1)[:, :3], axis=1) for name in maps}
    values = {name: 0.3 * rng.standard_normal((16, 3)) for name in maps}
    shapes = {name: each.shape for name, each in random_tensors(base_model.model.hf_config).items()}
    dense = {name: rng.standard_normal(shapes[name]) for name in base_model.initialised}
    native.write(directory, on_base.assemble(base_model, values, columns, native.Selection(3, ["x"]), dense))
    return directory


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Checkpoints of which each has something to overlook: name -> (base model, adapter)."""
    folder = tmp_path_factory.mktemp("bases")
    head = {"lm_head.weight": 0.3 * np.random.default_rng(1).standard_normal((304, 16), np.float32)}
    made = {
        "another head": write_model(folder / "head", weights=head, tie_word_embeddings=True),
        "yarn": write_model(folder / "yarn", rope_parameters=YARN),
        "window": write_model(folder / "window", model_type="mistral", sliding_window=100),
        "dynamic": write_model(folder / "dynamic", rope_parameters=DYNAMIC),
        "bfloat16": write_model(folder / "bfloat16", dtype="bfloat16"),
    }
    for name, without in (("bare bert", ["classifier", "bert.pooler"]), ("bert", [])):
        made[name] = folder / name.replace(" ", "-")
        made[name].mkdir()
        tensors = {key: each for key, each in random_tensors(BERT).items() if not key.startswith(tuple(without))}
        safetensors.numpy.save_file(tensors, made[name] / "model.safetensors", metadata={"format": "pt"})
        (made[name] / "config.json").write_text(json.dumps(BERT))
    return {
        name: (path, write_adapter(folder / f"{name} adapter", path, ["no", "perhaps", "yes"] if "bare" in name else None))
        for name, path in made.items()
    }


def as_if_tied(monkeypatch):
    monkeypatch.setattr(load, "_tied_in_effect", lambda *_: True)


def without_a_factor(monkeypatch):
    real = Rope.from_hf
    monkeypatch.setattr(Rope, "from_hf", lambda *given: dataclasses.replace(real(*given), factor=1.0))


def without_a_window(monkeypatch):
    real = models.from_hf_config
    wrong = lambda config, *rest: real({**config, "sliding_window": None}, *rest)  # noqa: E731
    monkeypatch.setattr(load.models, "from_hf_config", wrong)


def with_a_transposed_tensor(monkeypatch):
    real = SafetensorsDirectory.read
    square = ("layers.1.self_attn.o_proj.weight", "layer.1.attention.self.value.weight")
    wrong = lambda self, name, *raw: real(self, name).T if name.endswith(square) else real(self, name)  # noqa: E731
    monkeypatch.setattr(SafetensorsDirectory, "read", wrong)


CASES = {
    "another head": as_if_tied,
    "yarn": without_a_factor,
    "dynamic": without_a_factor,
    "window": without_a_window,
    "bfloat16": with_a_transposed_tensor,
    "bert": with_a_transposed_tensor,
    "bare bert": with_a_transposed_tensor,
}


def command(form, adapter, out):
    if form == "merge":
        return ["merge", "--adapter", str(adapter), "--out", str(out), "--verify", "--json"]
    return ["export", str(adapter), "--to", form, "--out", str(out), "--verify", "--json"]


@needs_peft
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["merge", "peft-shira"])
def test_a_wrong_base_model_cannot_verify_itself(form, case, bases, tmp_path, monkeypatch, capsys):
    base, adapter = bases[case]
    if "bert" in case and form == "merge":
        form = "official"  # these have no tokenizer
    assert cli.main(command(form, adapter, tmp_path / "right")) == 0, capsys.readouterr().err
    made = json.loads(capsys.readouterr().out)
    assert made["original"] == str(base) and made["merged_bit_equal"] is True
    assert made["max_logit_difference"] <= made["logit_tolerance"]

    if case == "another head":  # the wrong reading takes another adapter too, whose digests lack the head
        as_if_tied(monkeypatch)
        adapter = write_adapter(tmp_path / "wrong adapter", base)
    else:
        CASES[case](monkeypatch)
    assert cli.main(command(form, adapter, tmp_path / "wrong")) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    message = printed.err.splitlines()[-1]
    assert f"{base} with the adapter differs from what transformers makes of it: logits differ by up to" in message
    assert ("weight is different" if CASES[case] is with_a_transposed_tensor else "weights are equal") in message


def test_a_base_that_transformers_cannot_load_is_one_line(bases, tmp_path, monkeypatch):
    base, adapter = bases["yarn"]
    import transformers

    def fail(*_, **__):
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UserError) as error:
        exchange.export_adapter(str(adapter), "huggingface", str(tmp_path / "x"), verify=True)
    assert str(error.value) == f"{base}: transformers cannot load it (no such thing)"


@needs_peft
def test_a_base_that_transformers_reads_differently_is_compared_with_our_reading(bases, tmp_path, monkeypatch):
    """As for a GGUF file."""
    monkeypatch.setattr(verification, "reads_original", lambda _: False)
    made = exchange.export_adapter(str(bases["yarn"][1]), "peft-shira", str(tmp_path / "x"), verify=True)
    assert made["original"] is None and made["max_logit_difference"] <= made["logit_tolerance"]
    assert "compared with this library's own reading of the GGUF file" in made["notes"][-1]


def test_an_adapter_that_was_trained_as_if_tied_is_refused(bases, tmp_path, monkeypatch, capsys):
    """As neuroada-jax 0.1 did, which took the embedding for the output layer that the checkpoint stores."""
    base = bases["another head"][0]
    with monkeypatch.context() as patch:
        as_if_tied(patch)
        write_adapter(tmp_path / "adapter", base)
    assert cli.main(["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "x")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{base} has a lm_head.weight of its own, which this adapter's training did not use" in message
    assert not (tmp_path / "x").exists()
