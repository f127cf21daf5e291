"""The rate to start with: near every chosen rate of docs/choosing.md, and a warning far from it."""

import dataclasses
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers import write_config, write_model

from neuroada_jax.errors import NeuroadaWarning
from neuroada_jax.pretrained.load import open_with_tokenizer
from neuroada_jax.training import config_file, starting_rate

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")


def test_every_chosen_rate_of_the_page_is_within_a_factor_of_4_and_its_ratio_is_right():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.partition("## Which k")[0].splitlines()
        if re.match(r"\| .* \d", line)
    ]
    width, checked = None, 0
    for model, k, _, chosen, rule, ratio in (row for row in rows if len(row) == 6):
        width = int(found[1]) if (found := re.search(r"\((\d+)\)", model)) else width
        width = {"SmolLM2": 576, "MiniLM": 384}.get(re.split("[- (,]", model)[0], width)
        expected = starting_rate._rule(int(k), width)
        assert float(rule) == pytest.approx(expected, rel=0.03), model
        for rate, said in zip(re.findall(r"[\d.]+e-\d", chosen), ratio.split(","), strict=True):
            assert 1 / 4.1 < float(rate) / expected < 4.1  # the rates of the page have one digit
            assert float(said) == pytest.approx(float(rate) / expected, abs=0.06), (model, k)
            checked += 1
    assert checked == 15


def test_one_digit():
    assert starting_rate.starting_rate(1, 576) == 0.02
    assert starting_rate.starting_rate(8, 384) == 0.005


@pytest.mark.parametrize(
    "factor, width, side",
    [(0.05, 384, "below"), (0.5, 384, None), (5.0, 384, None), (20.0, 384, "above"), (20.0, 16, None)],
)
def test_far_rates_are_a_warning(tmp_path, factor, width, side):
    model = open_with_tokenizer(str(write_model(tmp_path / "model")), "float32")[0].model
    content = {"model": {"path": "m"}, "data": {"train": "r"}, "optimizer": {"learning_rate": 1e-3}, "bypass": {"k": 2}}
    config = config_file.load(str(write_config(tmp_path / "c.yaml", {"name": "c", "training": {"steps": 1}, **content})))
    model = model._replace(config=dataclasses.replace(model.config, hidden_size=width))
    rate = factor * starting_rate._rule(2, width)
    far = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))
    seen = pytest.warns(NeuroadaWarning, match=f"is far {side} what has worked for k = 2") if side else nullcontext()
    with seen:
        starting_rate.check(far, model)


def test_the_width_of_a_local_model_is_used(tmp_path):
    from neuroada_jax import cli

    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text('{"hidden_size": 4096}')
    for name, model in (("narrow", []), ("wide", ["--model", str(tmp_path / "wide")])):
        assert cli.main(["init", "--kind", "chat", "--out", str(tmp_path / f"{name}.yaml"), *model]) == 0
    rates = [config_file.load(str(tmp_path / f"{name}.yaml")).optimizer.learning_rate for name in ("narrow", "wide")]
    assert rates == [0.005, 0.002]


@pytest.mark.parametrize("width", [768, 10**400, "wide", None])
def test_the_width_is_that_of_the_model_whatever_its_config_calls_it(tmp_path, capsys, width):
    from neuroada_jax import cli

    folder = tmp_path / "model"
    folder.mkdir()
    own = {"vocab_size": 100, "n_layers": 1, "n_heads": 12, "hidden_dim": 8} | ({} if width is None else {"dim": width})
    (folder / "config.json").write_text(json.dumps({"model_type": "distilbert", **own}))
    out = tmp_path / "c.yaml"
    assert cli.main(["init", "--kind", "classify", "--out", str(out), "--model", str(folder)]) == 0
    known = width == 768
    assert config_file.load(str(out)).optimizer.learning_rate == (0.004 if known else 0.005)
    assert ("is not known here" in capsys.readouterr().err) is not known
    for unknown in ("someone/model", str(tmp_path / "missing.gguf"), "package:missing/model"):
        assert cli.main(["init", "--kind", "chat", "--out", f"{out}{len(unknown)}", "--model", unknown]) == 0
        assert f"that of width 576: the width of {unknown} is not known here" in capsys.readouterr().err
