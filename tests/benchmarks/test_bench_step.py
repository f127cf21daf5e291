"""benchmarks/step.py and both frameworks' methods on a tiny model."""

import json

import contract
import numpy as np
import pytest
from data_helpers import CHAT
from helpers import NEURONS, write_model

from benchmarks import common, jax_methods, methods, process_memory, step
from neuroada_jax.errors import UserError
from neuroada_jax.models import Remat

LAYERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("step") / "model"))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"number {i}?", "answer": "true"}) + "\n" for i in range(40)))
    return str(path)


def run(folder, model, *arguments):
    shape = ["--batch", "2", "--length", "16", "--k", "2", "--remat", "none"]
    run_once = ["--repeats", "2", "--warmups", "1", "--no-memory", "--out", str(folder)]
    step.main(["--model", model, *shape, *run_once, *arguments])
    return contract.read(folder, "step")


@pytest.mark.slow
def test_without_data_and_pytorch_the_rest_runs(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "installed", lambda package: package not in ("torch", "peft"))
    settings, rows = run(tmp_path, model, "--data", "nowhere.jsonl")
    printed = capsys.readouterr()
    assert 'torch, peft missing, so their rows are omitted: pip install -e ".[torch]"' in printed.err
    assert "nowhere.jsonl: no such file or directory: random tokens instead" in printed.err
    assert contract.printed_rows(printed.out) == len(rows)
    assert settings["labels"] == ["every"]
    assert [(row["method"], row["k"], row["trained"]) for row in rows] == [
        ("frozen floor", None, 0),
        ("neuroada-jax", 2, LAYERS * NEURONS * 2),
        ("LoRA", 2, LAYERS * 232),  # rank 1: the inputs and outputs of a layer's maps
        ("autodiff scatter", 2, LAYERS * NEURONS * 2),
    ]
    # Every method starts from the same weights.
    np.testing.assert_allclose([row["first_loss"] for row in rows], rows[0]["first_loss"], rtol=1e-5)
    assert rows[0]["ratio_to_floor"] == 1
    assert all(row["ratio_to_released"] is None for row in rows)


@pytest.mark.slow  # a benchmark in full
def test_real_rows_are_measured_under_both_settings(model, rows_file, tmp_path):
    settings, rows = run(tmp_path, model, "--data", rows_file, "--methods", "neuroada-jax")
    assert settings["labels"] == ["every", "answers"]
    assert settings["data"] == "rows.jsonl"
    ours = {row["labels"]: row for row in rows if row["method"] == "neuroada-jax"}
    assert ours["every"]["labelled"] == 2 * 15
    assert 0 < ours["answers"]["labelled"] < 2 * 15


def test_real_tokens_fill_the_batch_and_label_answers(rows_file):
    every, answers = methods.real_tokens(rows_file, CHAT, 2, 64)
    np.testing.assert_array_equal(every.ids, answers.ids)
    assert every.labelled[:, 1:].all() and not every.labelled[:, 0].any()
    text = CHAT.decode(answers.ids[0][answers.labelled[0]])
    assert text.startswith("the correct answer is true")


def test_real_tokens_say_when_rows_are_too_few(rows_file):
    with pytest.raises(UserError, match="expected at least 80000"):
        methods.real_tokens(rows_file, CHAT, 200, 400)


@pytest.mark.skipif(not process_memory.available(), reason="resident memory is read from Linux's /proc")
def test_the_peak_of_one_method(model, capsys):
    label = methods.label_of("JAX", "frozen floor", None)
    shape = ["--model", model, "--batch", "2", "--length", "16", "--data", "nowhere", "--repeats", "0"]
    step.main([*shape, "--peak-of", label, "every"])
    peak = json.loads(capsys.readouterr().out)
    assert peak.keys() == {"seconds", "first_loss", "trained", "peak_bytes", "peak_bytes_with_compilation", "total_bytes"}
    assert peak["seconds"] == [] and peak["trained"] == 0 and peak["total_bytes"] is None


@pytest.mark.slow  # a benchmark in full
def test_pytorch_methods_start_from_our_loss_and_train_equal_budgets(model):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("peft", reason="PEFT is not installed")
    from benchmarks import torch_methods

    k, tokens = 2, methods.random_tokens(2, 16, 304)
    loaded = torch_methods.load(model, "float32")
    expected = jax_methods.methods([k], [Remat.NONE])[0].build(jax_methods.load(model, "float32")).step(tokens)
    trained = {}
    for method in torch_methods.methods([k], [Remat.NONE, Remat.FULL]):
        running = method.build(torch_methods.own(loaded))
        first = running.step(tokens)
        assert first == pytest.approx(expected, rel=1e-5), method.name
        for _ in range(3):
            later = running.step(tokens)
        if running.trained:
            assert later < first, method.name  # it does train
        trained[method.name] = running.trained
    budget = LAYERS * NEURONS * k
    assert trained["released NeuroAda"] == trained["mask-based NeuroAda"] == budget
    assert 0.9 * budget < trained["PEFT Super-Tuning"] <= budget
    assert trained["PEFT LoRA"] == trained["PEFT SHiRA"] == trained["PEFT LoRA, remat full"]


def test_the_mask_keeps_all_other_weights(model):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("peft", reason="PEFT is not installed")
    from benchmarks import torch_methods

    loaded = torch_methods.load(model, "float32")
    before = {name: tensor.clone() for name, tensor in loaded.tensors.items()}
    masked = next(method for method in torch_methods.methods([2], []) if method.name == "mask-based NeuroAda")
    masked.build(loaded).step(methods.random_tokens(2, 16, 304))
    changed = {name: int((tensor != before[name]).sum()) for name, tensor in loaded.tensors.items()}
    assert 0.8 * LAYERS * NEURONS * 2 < sum(changed.values()) <= LAYERS * NEURONS * 2
    assert torch.equal(loaded.tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
