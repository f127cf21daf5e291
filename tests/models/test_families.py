"""Every family of decoders from checkpoint to merged directory: trained as PyTorch does, and run by transformers."""

import functools

import jax
import numpy as np
import optax
import pytest
import torch
from test_decoders import CASES, both
from transformers import AutoModelForCausalLM

from neuroada_jax import models
from neuroada_jax.adapters import exchange, native, on_base, verification
from neuroada_jax.adapters.native import Selection
from neuroada_jax.core import bypass
from neuroada_jax.data.batches import Batch
from neuroada_jax.errors import UserError
from neuroada_jax.generation.generate import Ending, generate
from neuroada_jax.generation.sampling import Decoding
from neuroada_jax.models import names
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.training import step

# A kind of layers each; the rest computes with the same parts.
FAMILIES = ["granite_multipliers", "smollm3_windows", "olmo2", "phi3", "gemma2", "gemma3_ropes", "mixtral", "qwen3_moe"]
STEPS, ROWS, TIME, RATE = 3, 4, 14, 0.02


def labelled_rows(number):
    """Rows of which every token but the first is a label."""
    ids = np.random.default_rng(number).integers(0, 97, (ROWS, TIME)).astype(np.int32)
    places = np.broadcast_to(np.arange(TIME - 1, dtype=np.int32), (ROWS, TIME - 1))
    lengths = np.full(ROWS, TIME, np.int32)
    return Batch(ids, lengths, places.copy(), ids[:, 1:].copy(), np.ones((ROWS, TIME - 1), np.float32))


def torch_place(module):
    """The parameter of a transformers model that has the weight of a module, the expert and the half of it."""
    prefix, experts, own = module.partition(".experts.")
    if not experts:
        return f"{module}.weight", None, None
    expert, _, name = own.partition(".")
    prefix = prefix.replace("block_sparse_moe", "mlp")
    if name in ("down_proj", "w2"):
        return f"{prefix}.experts.down_proj", int(expert), None
    return f"{prefix}.experts.gate_up_proj", int(expert), 1 if name in ("up_proj", "w3") else 0


def torch_trained(reference, columns):
    """Values by module after Adam's steps on W + D, D zero but at the columns."""
    values = {module: torch.zeros(own.shape, requires_grad=True) for module, own in columns.items()}
    frozen = {name: parameter.detach() for name, parameter in reference.named_parameters()}
    adam = torch.optim.Adam(list(values.values()), lr=RATE, eps=1e-3)
    for number in range(STEPS):
        changes = {}
        for module, own in values.items():
            name, expert, half = torch_place(module)
            neurons = torch.arange(own.shape[0])[:, None] + (half or 0) * own.shape[0]
            place = (neurons, torch.from_numpy(columns[module]).long())
            place = place if expert is None else (torch.tensor(expert), *place)
            zeros = changes[name] if name in changes else torch.zeros_like(frozen[name])
            changes[name] = zeros.index_put(place, own)
        weights = {name: weight + changes[name] if name in changes else weight for name, weight in frozen.items()}
        ids = torch.from_numpy(labelled_rows(number).input_ids).long()
        logits = torch.func.functional_call(reference, weights, (ids,), tie_weights=True).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {module: own.detach().numpy() for module, own in values.items()}


def trained(model, params, k):
    paths = models.match_targets(params, list(model.architecture.targets), model.layers_path)
    built = bypass.build(params, paths, k)
    columns = jax.tree.map(np.array, built.columns)
    transformation = optax.adam(RATE, eps=1e-3)
    state = step.initial_state(params, built, transformation)
    run = step.make_step(model.module(), transformation)
    for number in range(STEPS):
        state, _ = run(state, labelled_rows(number))
    return bypass.Bypass(jax.tree.map(np.asarray, state.trainable["bypass"]), columns)


@pytest.mark.parametrize(
    ("name", "k"),
    [
        pytest.param(name, k, marks=() if k == 1 and name in ("phi3", "qwen3_moe") else pytest.mark.slow)
        for name in FAMILIES
        for k in (1, 20)
    ],
)
def test_values_equal_those_that_pytorch_trains(name, k, tmp_path):
    reference, model, params = both(name, tmp_path)
    got = trained(model, params, k)
    flat = functools.partial(names.unstacked, layers_path=model.layers_path)
    values, columns = (dict(flat(tree)) for tree in got)
    want = torch_trained(reference, columns)
    assert values.keys() == want.keys() and max(np.abs(each).max() for each in want.values()) > RATE
    for module, own in want.items():
        np.testing.assert_allclose(values[module], own, rtol=0, atol=1e-4, err_msg=module)
    if k > 1:
        return
    # The adapter comes back from its files, and transformers continues as we do with the merged directory.
    loaded = load_model(str(tmp_path))
    on_base.save(
        tmp_path / "adapter", got, loaded.without_params(), Selection(k, list(model.architecture.targets), "magnitude", 0)
    )
    again = on_base.load(str(tmp_path / "adapter"), loaded)
    assert jax.tree.all(jax.tree.map(np.array_equal, (got.values, got.columns), (again.values, again.columns)))
    with pytest.raises(UserError, match=r"--to official has (no name for .*experts|names for .*llama)"):
        exchange.export_adapter(str(tmp_path / "adapter"), "official", str(tmp_path / "official"))
    merged = bypass.merge(loaded.params, again)
    save.save(tmp_path / "merged", loaded, merged, None)
    float32 = verification.Merge(np.dtype("float32"), np.dtype("float32"))
    reload = functools.partial(verification.reload_huggingface, loaded, tmp_path / "merged", np.dtype("float32"))
    adapter = native.read(str(tmp_path / "adapter"))
    assert verification.verify(loaded, adapter, float32, merged, reload)["merged_bit_equal"]
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    ours = generate(model, merged, prompts, Ending(), max_new_tokens=12)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for prompt, continuation in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        found = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
        )
        assert found[0, len(prompt) :].tolist() == list(continuation.ids)


def test_longrope_continues_across_the_original_length_as_transformers_does(tmp_path):
    """Texts within, across and beyond the original 10 positions, in one call; there the whole text is processed again."""
    reference, model, params = both("phi3_longrope_long", tmp_path)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [3] * 9 + [4, 7], list(range(20, 29)), list(range(30, 40))]
    ours = generate(model, params, prompts, Ending(), max_new_tokens=8, batch_size=3)
    for prompt, continuation in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        found = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
        )
        assert found[0, len(prompt) :].tolist() == continuation.ids and continuation.stopped == "length"
    end = ours[0].ids[6]  # behind the border, and a stop string across it
    assert generate(model, params, prompts, Ending((end,)), max_new_tokens=8)[0].stopped == "end"
    text = lambda ids: "".join(f"<{token}>" for token in ids)  # noqa: E731
    stop = text(ours[0].ids[3:6])
    stopped = generate(model, params, prompts[:1], Ending((), text), max_new_tokens=8, decoding=Decoding(stop=(stop,)))[0]
    assert stopped.stopped == "stop" and text(stopped.ids).endswith(stop)
    with pytest.raises(UserError, match="beams: prompt 0 has 6 tokens; with max_new_tokens 8 it grows beyond"):
        generate(model, params, prompts, Ending(), max_new_tokens=8, decoding=Decoding(beams=2))


def test_a_model_that_reads_images_is_refused_by_name():
    with pytest.raises(UserError, match="'gemma3' reads images; expected its text_config, 'gemma3_text'"):
        models.from_hf_config({"model_type": "gemma3", "vision_config": {}, "text_config": {}})


def test_code_of_a_checkpoint_is_ignored_and_said():
    content = {**CASES["phi3"][1], "model_type": "phi3", "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3"}}
    assert models.from_hf_config(content).ignored == ("auto_map",)
