"""A tiny random LLaMA checkpoint directory with a tokenizer, made without PyTorch, and what goes with it."""

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml
from data_helpers import CHAT, PAIRS

from neuroada_jax import models
from neuroada_jax.core import trees
from neuroada_jax.models import names

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 304,  # as many as the tokenizer has
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": CHAT.bos_token_id,
    "eos_token_id": CHAT.eos_token_id,
    "dtype": "float32",
}
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
GOLDEN = Path(__file__).resolve().parent / "golden"
NEURONS = 16 + 8 + 8 + 16 + 24 + 24 + 16  # of the seven linear maps of a layer


def load_golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file in tests/golden."""
    with np.load(GOLDEN / name) as file:
        return dict(file)


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face name -> random weights, large enough that logits differ clearly."""
    model = models.from_hf_config(config)
    params = model.abstract_params()
    flat = dict(trees.flatten(params))
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, slot in names.checkpoint_names(params, model.layers_path).items():
        shape = flat[slot.path].shape[len(slot.place) :]
        tensors[name] = 0.3 * rng.standard_normal(shape, np.float32) + ("norm" in name)
    return tensors


def write_safetensors(directory: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A directory with one model.safetensors, or several files and their index."""
    directory.mkdir(exist_ok=True)
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == shard}
        safetensors.numpy.save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_model(
    directory: Path, tokenizer: Any = CHAT, *, seed: int = 0, weights: dict | None = None, **fields: Any
) -> Path:
    """A checkpoint directory as the hub has them; `weights` replaces single tensors, `fields` are config fields."""
    config = {**CONFIG, **fields}
    tensors = {**random_tensors(config, seed), **(weights or {})}
    if config["dtype"] == "bfloat16":
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    directory.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    return directory


BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "pad_token_id": PAIRS.pad_token_id,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "dtype": "float32",
}


def write_bert(directory: Path) -> Path:
    """A checkpoint directory of a random BERT without a head, with a tokenizer for pairs."""
    tensors = {name: tensor for name, tensor in random_tensors(BERT).items() if not name.startswith("classifier")}
    directory.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(BERT))
    PAIRS.save_pretrained(str(directory))
    return directory


def write_rows(path: Path, count: int = 24) -> Path:
    """Prompt/completion rows that a tiny model learns: the letter, and after a comma the next one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [{"prompt": f"after {letters[i % 25]},", "completion": letters[i % 25 + 1]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_config(folder: Path, model: Path, rows: Path, /, **sections: dict) -> dict[str, Any]:
    """The content of a config that trains a few steps; `sections` are merged into it."""
    content: dict[str, Any] = {
        "name": "tiny",
        "output": str(folder / "out"),
        "model": {"path": str(model)},
        "data": {"train": str(rows), "max_length": 64},
        "optimizer": {"learning_rate": 0.02},
        "training": {"steps": 3, "batch_size": 4, "remat": "none", "log_every": 2},
    }
    for name, value in sections.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
    return content


def write_config(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def equations(jaxpr):
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in itertools.chain.from_iterable(
            v if isinstance(v, tuple | list) else [v] for v in equation.params.values()
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def load_in_transformers(directory, caplog, capfd, auto="AutoModelForCausalLM"):
    """The directory in PyTorch, without a word from transformers."""
    import transformers
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        with caplog.at_level("WARNING"):
            model = getattr(transformers, auto).from_pretrained(directory).eval()
    finally:
        logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records] == []
    assert "Warning" not in capfd.readouterr().err
    return model
