"""The real SmolLM2-135M: adapter, merge, and the same model in PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import run_config, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from neuroada_jax import models
from neuroada_jax.adapters import on_base
from neuroada_jax.core import bypass
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.generation.generate import Ending, generate
from neuroada_jax.generation.sampling import Decoding
from neuroada_jax.models import LLAMA_TARGETS
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.pretrained.tokenizer import load_tokenizer

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time",
    "Water boils at",
    "2 + 2 =",
    "The opposite of hot is",
    "Roses are red,",
    "A triangle has",
    "To make tea, first",
    "The largest planet is",
    "My name is",
    "In 1969,",
    "She opened the door and",
    "Dear Sir or Madam,",
    "import numpy as np\n",
    "The recipe needs",
    "Once the rain stopped,",
    "Light travels",
    "Question: Who wrote Hamlet?\nAnswer:",
    "1, 2, 3, 4,",
]


TEXT = "The quick brown fox jumps over the lazy dog, and then it runs away from the very angry farmer."


@pytest.fixture(scope="module")
def base_model(smollm2_gguf):
    return load_model(str(smollm2_gguf), "float32")


def assert_same_logits(model, params, reference, tokenizer):
    """Logits here and in PyTorch.

    They reach 32, and both are about 1e-4 away from PyTorch in float64, so that they may be 2e-4 apart. The ids are a
    text: rows of padding (attention sinks) would multiply these distances by ten.
    """
    ids = np.array([tokenizer(TEXT)["input_ids"]], np.int32)
    module = model.module()

    @jax.jit
    def forward(params, ids):
        return module.apply({"params": params}, module.apply({"params": params}, ids)[0], method="unembed")

    with torch.no_grad():
        want = reference(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(np.asarray(forward(params, jnp.asarray(ids))), want, rtol=1e-5, atol=2e-4)


def pytorch_text(reference, tokenizer, prompt, new):
    """What transformers' greedy decoding says."""
    inputs = tokenizer(prompt, return_tensors="pt")
    out = reference.generate(**inputs, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def pytorch(directory):
    """(model, tokenizer) of a merged directory."""
    reference = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert reference.dtype == torch.float32
    return reference, AutoTokenizer.from_pretrained(directory)


def neuroada(*arguments):
    """What the installed command prints with --json; in its own process, with XLA's own settings."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [str(Path(sys.executable).parent / "neuroada"), *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_same_texts(directory, reference, tokenizer, prompts, new):
    """Greedy continuations here and in PyTorch."""
    flags = [part for prompt in prompts for part in ("--prompt", prompt)]
    said = neuroada("generate", "--model", directory, "--max-new-tokens", new, *flags)["generations"]
    assert [each["text"] for each in said] == [pytorch_text(reference, tokenizer, prompt, new) for prompt in prompts]


@pytest.mark.slow  # tiny models of every family do the same
def test_a_merged_bypass_is_the_same_model_in_pytorch(base_model, smollm2_gguf, tmp_path):
    built = bypass.build(
        base_model.params, models.match_targets(base_model.params, list(LLAMA_TARGETS), base_model.model.layers_path), 1
    )
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)), built.values)
    params = bypass.merge(base_model.params, Bypass(values, built.columns))
    save.save(tmp_path / "merged", base_model, params, load_tokenizer(str(smollm2_gguf)))
    reference, tokenizer = pytorch(tmp_path / "merged")
    assert_same_logits(base_model.model, params, reference, tokenizer)
    assert_same_texts(tmp_path / "merged", reference, tokenizer, PROMPTS[:3], 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({}, {}),
        ({"beams": 4, "early_stopping": True}, {"num_beams": 4, "early_stopping": True}),
        (
            {"beams": 4, "length_penalty": 0.6, "repetition_penalty": 1.2, "no_repeat_ngram": 3},
            {"num_beams": 4, "length_penalty": 0.6, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        ),
    ],
    ids=["greedy", "beams", "beams without repetition"],
)
def test_continuations_equal_pytorch_token_for_token(base_model, smollm2_gguf, tmp_path, settings, theirs):
    save.save(tmp_path / "model", base_model, base_model.params, load_tokenizer(str(smollm2_gguf)))
    reference, tokenizer = pytorch(tmp_path / "model")
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    eos_ids = [tokenizer.eos_token_id]
    options = {"max_new_tokens": 64, "decoding": Decoding(**settings), "batch_size": 10}
    got = generate(base_model.model, base_model.params, prompts, Ending(tuple(eos_ids)), **options)
    for prompt, each in zip(prompts, got, strict=True):
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones((1, len(prompt)), dtype=torch.long)}
        out = reference.generate(
            **inputs, do_sample=False, max_new_tokens=64, pad_token_id=0, eos_token_id=eos_ids, **theirs
        )
        want = out[0, len(prompt) :].tolist()
        want = want[: next((at for at, token in enumerate(want) if token in eos_ids), len(want))]
        assert each.ids == want, tokenizer.decode(prompt)


@pytest.mark.slow
def test_training_adapter_merge_and_pytorch(base_model, smollm2_gguf, tmp_path):
    rows = tmp_path / "rows.jsonl"
    pairs = [(prompt, f" {number * 7} bananas") for number, prompt in enumerate(PROMPTS[:8])]
    rows.write_text("".join(json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in pairs))
    content = run_config(
        tmp_path,
        smollm2_gguf,
        rows,
        model={"dtype": "float32"},
        data={"style": "verbatim"},
        bypass={"k": 4},
        optimizer={"learning_rate": 5e-3},
        training={"steps": 3, "batch_size": 8},
    )
    results = neuroada("train", write_config(tmp_path / "run.yaml", content))
    assert results["last_loss"] < results["first_loss"]
    trained = on_base.load(str(tmp_path / "out" / "adapter"), base_model)
    assert bypass.count(trained.values) == results["trainable"] == 4 * 30 * (576 * 3 + 192 * 2 + 1536 * 2)
    params = bypass.merge(base_model.params, trained)
    merged = tmp_path / "merged"
    neuroada("merge", "--adapter", tmp_path / "out" / "adapter", "--dtype", "float32", "--out", merged)
    again = load_model(str(merged), "float32")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), again.params, params)

    reference, tokenizer = pytorch(merged)
    assert_same_logits(base_model.model, params, reference, tokenizer)
    assert_same_texts(merged, reference, tokenizer, PROMPTS, 24)
