"""`neuroada export`, `import` and `--verify`: every direction through the command line, and what makes it fail."""

import importlib.util
import json
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from data_helpers import CHAT
from helpers import needs_peft, write_model
from transformers import AutoModelForCausalLM

from neuroada_jax import cli
from neuroada_jax.adapters import exchange, inspection, native, on_base, peft
from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.pretrained import prompt_form
from neuroada_jax.pretrained.load import load_model

FORMATS = ["peft-supertuning", "peft-shira"]
if importlib.util.find_spec("neuroada_jax.adapters.official"):
    FORMATS.append("official")
Q = "model.layers.0.self_attn.q_proj"
TARGETS = ["mlp.down_proj", "self_attn.q_proj"]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {dtype: write_model(folder / dtype, CHAT, dtype=dtype, **WIDE) for dtype in ("float32", "bfloat16")}


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """A native adapter of each base: two connections of q_proj and down_proj, and the output layer trained densely."""
    made = {}
    for dtype, directory in bases.items():
        base_model, rng = load_model(str(directory), "auto"), np.random.default_rng(3)
        columns, values = {}, {}
        for module, outputs in (
            (f"model.layers.{n}.{m}", 64) for n in range(2) for m in ("self_attn.q_proj", "mlp.down_proj")
        ):
            columns[module] = np.sort(rng.permuted(np.tile(np.arange(64), (outputs, 1)), axis=1)[:, :2], axis=1)
            values[module] = 0.05 * rng.standard_normal((outputs, 2))
        dense_parameters = {"lm_head.weight": 0.3 * rng.standard_normal((304, 64))}
        adapter = on_base.assemble(base_model, values, columns, native.Selection(2, TARGETS), dense_parameters)
        made[dtype] = tmp_path_factory.mktemp("adapters") / dtype
        native.write(made[dtype], adapter)
    return made


def run(capsys, *arguments):
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def export(capsys, adapter, form, out, *arguments):
    code, printed, errors = run(capsys, "export", adapter, "--to", form, "--out", out, "--json", *arguments)
    assert code == 0, errors
    return json.loads(printed)


def failed(capsys, *arguments):
    code, printed, errors = run(capsys, *arguments)
    assert code == 2 and printed == "" and "Traceback" not in errors
    return errors.splitlines()[-1].removeprefix("neuroada: error: ")


@needs_peft
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back(form, dtype, bases, adapters, tmp_path, capsys):
    made = export(capsys, adapters[dtype], form, tmp_path / "x", "--verify")
    assert (
        made["merged_bit_equal"] is True
        and made["max_logit_difference"] <= 1e-4 <= made["logit_tolerance"] < 1e-2
        and made["compared_in"] == dtype
    )
    reports = [inspection.inspect(str(path), 1) for path in (adapters[dtype], tmp_path / "x")]
    assert all({"kind", "path", "version", "base", "values", "bytes", "modules"} <= set(report) for report in reports)
    assert [report["dense_parameters"] for report in reports] == [["lm_head.weight"]] * 2
    found = sorted(str(path.relative_to(tmp_path / "x")) for path in (tmp_path / "x").rglob("*") if path.is_file())
    assert made["files"] == found
    arguments = ("import", tmp_path / "x", "--from", form, "--base", bases[dtype], "--out", tmp_path / "back")
    code, printed, errors = run(capsys, *arguments)
    assert (
        code == 0
        and printed == ""
        and f"wrote {tmp_path / 'back'}" in errors
        and "4 modules, 1 dense parameters, k=2" in errors
    )
    assert ("padding entries" in errors) == (form != "official")
    before, after = native.read(str(adapters[dtype])), native.read(str(tmp_path / "back"))
    for name in before.values:
        rounded = ml_dtypes.bfloat16 if (form, dtype) == ("official", "bfloat16") else np.float32
        np.testing.assert_array_equal(after.values[name], before.values[name].astype(rounded).astype(np.float32))
        np.testing.assert_array_equal(after.columns[name], before.columns[name])
    assert after.dense_parameters.keys() == before.dense_parameters.keys()
    assert sorted(after.metadata["targets"]) == TARGETS
    for key in ("k", "inputs", "dense_parameters", "base"):
        assert after.metadata[key] == before.metadata[key]


@needs_peft
@pytest.mark.parametrize(
    ("trained_in", "saved_in"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_merged_models(trained_in, saved_in, bases, adapters, tmp_path, capsys):
    adapter = native.read(str(adapters[trained_in]))
    made = export(capsys, adapters[trained_in], "huggingface", tmp_path / "x", "--verify", "--dtype", saved_in)
    assert made["merged_bit_equal"] is True and made["max_logit_difference"] <= 1e-4
    assert made["notes"] == [f"merged in float32, saved as {saved_in}"]
    stored = safetensors.numpy.load_file(str(bases[trained_in] / "model.safetensors"))[f"{Q}.weight"].astype(np.float32)
    stored[np.arange(64)[:, None], adapter.columns[Q]] += adapter.values[Q]
    merged = safetensors.numpy.load_file(str(tmp_path / "x" / "model.safetensors"))
    want = stored.astype(ml_dtypes.bfloat16 if saved_in == "bfloat16" else np.float32)
    assert merged[f"{Q}.weight"].tobytes() == want.tobytes()  # rounded once, after the merge
    np.testing.assert_array_equal(merged["lm_head.weight"], adapter.dense_parameters["lm_head.weight"].astype(want.dtype))
    AutoModelForCausalLM.from_pretrained(tmp_path / "x")


def test_a_base_that_moved_and_no_verification(bases, adapters, tmp_path, capsys):
    moved = bases["float32"].rename(tmp_path / "moved")
    try:
        assert "does not exist" in failed(
            capsys, "export", adapters["float32"], "--to", FORMATS[0], "--out", tmp_path / "x"
        )
        made = export(capsys, adapters["float32"], FORMATS[0], tmp_path / "x", "--model", moved)
        assert set(made) == {"out", "files", "notes"}
        config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(moved)
    finally:
        moved.rename(bases["float32"])


def test_the_form_of_the_prompts_goes_with_the_merged_model(adapters, tmp_path, capsys):
    adapter = shutil.copytree(adapters["float32"], tmp_path / "adapter")
    file = adapter / "adapter.json"
    content = json.loads(file.read_text())
    assert content["prompt"] is None
    del content["fields_digest"]
    form = PromptForm(PromptStyle.PLAIN, task="gsm8k", end_tokens=("</s>",))
    for name, trained in (("none", None), ("known", form)):
        file.write_text(json.dumps(content | {"prompt": trained and prompt_form.to_json(trained)}))
        code, _, errors = run(capsys, "merge", "--adapter", adapter, "--out", tmp_path / name)
        assert code == 0, errors
        assert prompt_form.read(str(tmp_path / name)) == trained
    ends = json.loads((tmp_path / "known" / "generation_config.json").read_text())["eos_token_id"]
    assert CHAT.convert_ids_to_tokens(ends) == ["<|im_end|>", "</s>"]
    foreign = prompt_form.to_json(PromptForm(end_tokens=("<|eot_id|>",)))
    file.write_text(json.dumps(content | {"prompt": foreign}))
    for command in (("merge", "--adapter", adapter), ("export", adapter, "--to", "huggingface")):
        message = failed(capsys, *command, "--out", tmp_path / "foreign")
        assert "end token '<|eot_id|>' of the trained prompts is not one token" in message
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}')
    for command in (("generate", "--prompt", "a"), ("evaluate", "--data", rows)):
        assert "end token '<|eot_id|>'" in failed(capsys, command[0], "--adapter", adapter, *command[1:])
    assert not (tmp_path / "foreign").exists()


@needs_peft
def test_an_export_that_is_not_what_we_hold_fails(adapters, tmp_path, capsys, monkeypatch):
    real = peft.export

    def wrong(adapter, directory, kind, base_model):
        values = {name: leaf.copy() for name, leaf in adapter.values.items()}
        values[Q][0, 0] += 1
        return real(adapter._replace(values=values), directory, kind, base_model)

    monkeypatch.setattr(exchange.peft, "export", wrong)
    arguments = ("export", adapters["float32"], "--to", "peft-shira", "--verify", "--json", "--out", tmp_path / "x")
    message = failed(capsys, *arguments)
    assert message.startswith(f"{tmp_path / 'x'} differs from the adapter") and not (tmp_path / "x").exists()
    assert "merged weights are different" in message


@needs_peft
def test_another_base_is_refused(adapters, tmp_path, capsys):
    other = write_model(tmp_path / "other", CHAT, seed=1, **WIDE)
    for form in ("peft-shira", "huggingface"):
        arguments = ("export", adapters["float32"], "--to", form, "--verify", "--model", other, "--out", tmp_path / "x")
        assert f"{other} is not the base model of this adapter" in failed(capsys, *arguments)
        assert not (tmp_path / "x").exists()


def test_errors(bases, adapters, tmp_path, capsys, monkeypatch):
    base_model, adapter = bases["float32"], adapters["float32"]
    exported = tmp_path / "x"
    export(capsys, adapter, "peft-shira", exported)
    assert "exists already" in failed(capsys, "export", adapter, "--to", "peft-shira", "--out", exported)
    arguments = ("import", exported, "--from", "peft-supertuning", "--base", base_model, "--out", tmp_path / "y")
    assert failed(capsys, *arguments) == f"{exported}: this is a SHIRA adapter, not SUPERTUNING"
    arguments = ("import", exported, "--from", "peft-shira", "--base", base_model, "--out", exported)
    assert "exists already" in failed(capsys, *arguments)
    assert "no adapter here" in failed(capsys, "export", exported, "--to", "peft-shira", "--out", tmp_path / "y")
    other = write_model(tmp_path / "small", None)
    message = failed(capsys, "import", exported, "--from", "peft-shira", "--base", other, "--out", tmp_path / "y")
    assert "but the config gives" in message
    monkeypatch.setitem(sys.modules, "peft", None)
    message = failed(capsys, "export", adapter, "--to", "peft-shira", "--verify", "--out", tmp_path / "y")
    assert 'pip install -e ".[torch]"' in message
    assert not (tmp_path / "y").exists()


def test_there_is_no_consent_to_pickles(capsys):
    """Positions are never unpickled, so the flag of neuroada-jax 0.1 that consented to it is gone."""
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "import", "x", "--from", "official", "--base", "m", "--out", "y", "--allow-pickle")
    assert "unrecognized arguments: --allow-pickle" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["official", "peft-supertuning", "peft-shira", "peft-lora"])
def test_experts_have_no_names_in_other_libraries(adapters, form, tmp_path, capsys):
    adapter = native.read(str(adapters["float32"]))
    expert = "model.layers.0.mlp.experts.3.down_proj"
    module = "model.layers.0.mlp.down_proj"
    of = lambda tree: {expert if name == module else name: leaf for name, leaf in tree.items()}  # noqa: E731
    native.write(tmp_path / "experts", adapter._replace(values=of(adapter.values), columns=of(adapter.columns)))
    said = failed(capsys, "export", tmp_path / "experts", "--to", form, "--out", tmp_path / "out")
    assert f"--to {form} has no name for {expert}, which belongs to experts" in said and said.endswith("use huggingface")
