"""The list of supported models: complete, in the docs, and each of them by its config alone."""

import json
from pathlib import Path

import pytest
from config_cases import BASES, content_of

from neuroada_jax import cli
from neuroada_jax.models import ARCHITECTURES, from_hf_config, listing


def test_every_model_type_is_listed_and_the_page_has_the_same_lines():
    assert listing.FAMILIES.keys() == ARCHITECTURES.keys() == BASES.keys()
    page = Path(__file__).resolve().parents[2] / "docs" / "models.md"
    assert listing.markdown() in page.read_text(encoding="utf-8")
    assert all(family.example.count("/") == 1 for family in listing.FAMILIES.values())


def test_the_command(capsys):
    assert cli.main(["models", "--json"]) == 0
    found = {each["model_type"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["phi3"]["targets"] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert found["bert"]["kind"] == "encoder" and "experts" in found["mixtral"]["notes"]
    assert cli.main(["models"]) == 0
    assert "gemma3_text" in capsys.readouterr().out


@pytest.mark.parametrize("kind", BASES)
def test_inspect_counts_the_values_of_a_config_alone(kind, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(content_of(kind)))
    assert cli.main(["inspect", str(tmp_path), "--k", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    neurons = sum(outputs for outputs, _ in from_hf_config(content_of(kind)).linear_maps().values())
    assert found["model_type"] == kind and found["values"] == neurons > 0
