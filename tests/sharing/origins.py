"""Adapters and runs to share, written without a training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from helpers import run_config

from neuroada_jax.adapters import native
from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.evaluation.scoring import Part, Score
from neuroada_jax.pretrained import prompt_form
from neuroada_jax.training import config_file

PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)
CHAT_FORM = PromptForm(
    PromptStyle.CHAT, "{{ messages }}</s> [/INST] /a/b", {"enable_thinking": False}, "2026-01-31", "instruct", ("<|end|>",)
)


def adapter(
    base: dict[str, Any] | None = None, form: PromptForm | None = CHAT_FORM, dense: bool = False, **metadata: Any
) -> native.Adapter:
    """A small adapter: 2 modules of 3 neurons with 2 of 4 inputs."""
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    about = {
        "source": "user/base",
        "dtype": "float32",
        "model_type": "bert" if dense else "llama",
        "labels": ["no", "yes"] if dense else None,
        "parameters": 10_000,
        "digests": {f"{module}.weight": "0" * 32 for module in modules},
    } | (base or {})
    dense_parameters = {"classifier.weight": np.ones((2, 3), np.float32)} if dense else {}
    prompt = None if form is None else prompt_form.to_json(form, is_decoder=not dense)
    made = native.new_metadata(
        about, dict.fromkeys(modules, 4), native.Selection(2, ["q_proj"]), [*dense_parameters], prompt
    )
    values = {module: np.full((3, 2), 0.5, np.float32) for module in modules}
    columns = {module: np.tile(np.array([0, 2], np.int32), (3, 1)) for module in modules}
    return native.Adapter(made | metadata, values, columns, dense_parameters)


def write_adapter(directory: Path, *arguments: Any, **options: Any) -> Path:
    native.write(directory, adapter(*arguments, **options))
    return directory


def score(value: float, n: int = 100) -> dict[str, Any]:
    parts = {"strict": Part(value / 2, n, (0.1, 0.2))}
    return Score(value, n, (value - 0.05, value + 0.05), [], beside={"f1": value / 4}, parts=parts).to_json()


def results(**fields: Any) -> dict[str, Any]:
    """The content of a run's results.json, as far as it is shared."""
    content = {
        "name": "tiny",
        "directory": "runs/tiny",
        "seed": 42,
        "steps": 30,
        "epochs": 2.5,
        "trainable": 12,
        "examples": 48,
        "first_loss": 3.25,
        "last_loss": 0.125,
        "before": {"held out": score(0.25)},
        "after": {"held out": score(0.75)},
        "mean": None,
        "watchdog": [],
        "backend": "cpu",
    }
    return content | fields


def write_run(
    directory: Path,
    model: str = "user/base",
    rows: str = "user/rows",
    sections: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """A run's directory; `sections` are those of its config, `fields` those of results.json."""
    directory.mkdir(parents=True)
    content = run_config(directory.parent, Path(), Path(), **(sections or {})) | {"output": str(directory)}
    content["model"]["path"], content["data"]["train"] = model, rows
    config = config_file.from_dict(content, "run.yaml")
    (directory / "config.yaml").write_text(config_file.to_yaml(config))
    (directory / "results.json").write_text(json.dumps(results(**fields)))
    (directory / "loss.png").write_bytes(PNG)
    write_adapter(directory / "adapter", {"source": model})
    return directory
