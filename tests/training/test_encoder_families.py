"""Every family of encoders on own labels: trained, resumed, scored, merged, exported, and the same in transformers."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from data_helpers import sentence_pairs, write_lines
from helpers import needs_peft, write_config
from test_run_labels import NAMES, neuroada, tickets

from neuroada_jax import cli

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,  # as nf4 needs
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "initializer_range": 0.2,  # else a new model hardly distinguishes texts
}
DEBERTA = {"relative_attention": True, "type_vocab_size": 0, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
BUCKETS = {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
# name -> (model_type, fields, the kind of tokenizer, its maps)
FAMILIES = {
    "electra": ("electra", {"embedding_size": 8}, "bert", ["query", "intermediate.dense"]),
    "distilbert": ("distilbert", {"hidden_dim": 64}, "roberta", ["q_lin", "lin1"]),
    "deberta-v2": (
        "deberta-v2",
        {**DEBERTA, "type_vocab_size": 2, "conv_kernel_size": 3},
        "bert",
        ["query_proj", "intermediate.dense"],
    ),
    "deberta-v3": ("deberta-v2", {**DEBERTA, **BUCKETS}, "bert", ["query_proj", "intermediate.dense"]),
    "modernbert": ("modernbert", {"local_attention": 6}, "roberta", ["Wqkv", "mlp.Wo"]),
    "mpnet": ("mpnet", {}, "roberta", ["q", "intermediate.dense"]),
}


def write_base(directory, family):
    """A bare random model of the family with its tokenizer, as transformers writes them."""
    kind, fields, pairs, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **fields})
    transformers.AutoModel.from_config(config).save_pretrained(directory)
    sentence_pairs(pairs).save_pretrained(directory)
    return directory


def content(folder, family, out, **sections):
    made = {
        "name": "tickets",
        "output": str(out),
        "model": {"path": str(folder / family)},
        "bypass": {"k": 2, "targets": FAMILIES[family][3]},
        "data": {"train": str(folder / "train.jsonl"), "task": "classification", "max_length": 16, "buckets": [16]},
        "optimizer": {"learning_rate": 0.02, "schedule": "constant"},
        "training": {"steps": 4, "batch_size": 8, "remat": "none", "log_every": 1},
        "evaluation": {"sets": [{"name": "dev", "data": str(folder / "dev.jsonl")}], "before": False, "batch_size": 16},
        "merge": True,
    }
    for name, value in sections.items():
        made[name] = {**made.get(name, {}), **value} if isinstance(value, dict) else value
    return made


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(path, made, *arguments):
    """Train by a config; (losses, tensors of the adapter)."""
    assert cli.main(["train", str(write_config(path, made)), *arguments]) == 0
    out = path.parent / "out"
    losses = [line["loss"] for line in lines(out / "metrics.jsonl") if "loss" in line]
    return losses, safetensors.numpy.load_file(out / "adapter" / "adapter.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("families")
    for name, seed in (("train", 0), ("dev", 1)):
        write_lines(found / f"{name}.jsonl", tickets(20, seed))
    write_lines(found / "numbers.jsonl", [{"text": "a" * (i % 9 + 1), "label": i % 9 / 4} for i in range(16)])
    for family in FAMILIES:
        write_base(found / family, family)
    return found


def shares_of(model, texts, capsys):
    """The probabilities of all labels that `classify` gives to texts."""
    told = [each for text in texts for each in ("--text", text)]
    code, printed, _ = neuroada(capsys, "classify", *model, *told, "--all", "--json")
    assert code == 0
    return [each["probabilities"] for each in json.loads(printed)["predictions"]]


def check_transformers(out, folder, capsys):
    """The adapter and the merged model say what transformers says of the merged directory."""
    texts = [each["text"] for each in lines(folder / "dev.jsonl")[:6]]
    ask = transformers.pipeline("text-classification", model=str(out / "merged"), top_k=None)
    wanted = [{each["label"]: each["score"] for each in found} for found in ask(texts)]
    assert np.std([each[NAMES[0]] for each in wanted]) > 0.001
    for model in (["--adapter", out / "adapter"], ["--model", out / "merged"]):
        for found, want in zip(shares_of(model, texts, capsys), wanted, strict=True):
            assert tuple(found) == NAMES and found == pytest.approx(want, rel=1e-4)


QUICK = "deberta-v3"


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_own_labels_from_a_config_to_transformers(family, folder, tmp_path, capsys):
    made, out = content(folder, family, tmp_path / "out", training={"save_every": 2}), tmp_path / "out"
    losses, tensors = train(tmp_path / "run.yaml", made)
    results = json.loads((out / "results.json").read_text())
    for path, name in ((tmp_path / "run.yaml", "plan"), (out / "adapter", "inspect")):
        code, printed, _ = neuroada(capsys, name, path, "--json")
        found = json.loads(printed)
        assert code == 0 and (name == "inspect" or found["trainable"] == results["trainable"])
        assert name == "inspect" or found["parameters"] == results["total_parameters"]
    for model in (["--adapter", out / "adapter"], ["--model", out / "merged"]):
        arguments = ["--data", folder / "dev.jsonl", "--task", "classification", "--out", tmp_path / "p.jsonl", "--json"]
        code, printed, _ = neuroada(capsys, "evaluate", *model, *arguments)
        assert code == 0 and json.loads(printed)["value"] == results["after"]["dev"]["value"]
    check_transformers(out, folder, capsys)
    shutil.rmtree(out / "checkpoints" / "4")  # as if it had ended after step 2
    shutil.rmtree(out / "adapter")
    again, same = train(tmp_path / "run.yaml", made, "--resume")
    assert again == losses and same.keys() == tensors.keys()
    assert all(same[name].tobytes() == tensors[name].tobytes() for name in tensors)


@needs_peft
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["lora", "nf4", "int8", "none"])
def test_other_methods_and_bases(form, family, folder, tmp_path, capsys):
    sections = {"method": "lora", "lora": {"r": 2, "targets": FAMILIES[family][3]}} if form == "lora" else {}
    held = {} if form == "lora" else {"model": {"quantization": form}}
    train(tmp_path / "run.yaml", content(folder, family, tmp_path / "out", **sections, **held))
    check_transformers(tmp_path / "out", folder, capsys)
    exports = {"lora": ["peft-lora"], "none": ["peft-shira", "peft-supertuning"]}.get(form, [])
    for name in exports:
        options = ["--to", name, "--out", tmp_path / name, "--verify"]
        code, _, err = neuroada(capsys, "export", tmp_path / "out" / "adapter", *options)
        assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers(family, folder, tmp_path):
    rows, out = str(folder / "numbers.jsonl"), tmp_path / "out"
    sections = {"data": {"train": rows, "task": "regression"}, "evaluation": {"sets": [{"name": "dev", "data": rows}]}}
    train(tmp_path / "run.yaml", content(folder, family, out, **sections))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out / "merged").eval()
    for each in lines(out / "predictions-dev-after.jsonl")[:3]:
        with torch.no_grad():
            want = model(**tokenizer(each["text"], return_tensors="pt")).logits.item()
        assert each["prediction"] == pytest.approx(want, abs=1e-4)
