"""Greedy decoding against transformers' `generate`, token for token, whatever shares the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from data_helpers import message_of
from helpers import CONFIG, write_model
from transformers import AutoModelForCausalLM

from neuroada_jax import models
from neuroada_jax.generation import generate as generation
from neuroada_jax.generation.generate import Ending, generate
from neuroada_jax.generation.sampling import Decoding
from neuroada_jax.pretrained.load import load_model

NEW = 12
LENGTHS = (1, 2, 5, 17, 31, 32, 33, 40)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same random model here and in PyTorch."""
    directory = write_model(tmp_path_factory.mktemp("model") / "m", None, seed=3)
    return load_model(str(directory)), AutoModelForCausalLM.from_pretrained(directory).eval()


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG["vocab_size"], length).tolist() for length in lengths]


def reference(model, prompt, eos_ids, new=NEW):
    """transformers' greedy continuation, up to and without the end token."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=list(eos_ids) or None,
            pad_token_id=0,
        )
    tokens = out[0, len(prompt) :].tolist()
    return tokens[:-1] if tokens[-1] in eos_ids else tokens


def generated(pair, prompts, eos_ids, decode=None, new=NEW, **options):
    loaded = pair[0]
    return generate(loaded.model, loaded.params, prompts, Ending(tuple(eos_ids), decode), max_new_tokens=new, **options)


def ours(*arguments, **options):
    return [each.ids for each in generated(*arguments, **options)]


def test_greedy_equals_transformers(pair):
    got = ours(pair, prompts(), [])
    assert all(len(tokens) == NEW for tokens in got)
    assert len({tuple(tokens) for tokens in got}) > 4  # the model says something, and not always the same
    assert got == [reference(pair[1], prompt, []) for prompt in prompts()]


def test_end_tokens_equal_transformers(pair):
    free = ours(pair, prompts(), [])
    # End tokens that do occur: one in the middle of a continuation, one at the start of another, one never.
    stops = sorted({free[2][5], free[4][0]})
    for eos_ids in (stops[:1], [*stops, 303]):
        got = ours(pair, prompts(), eos_ids)
        assert got == [reference(pair[1], prompt, eos_ids) for prompt in prompts()]
        assert not any(set(tokens) & set(eos_ids) for tokens in got)
    assert min(len(tokens) for tokens in got) == 0 and max(len(tokens) for tokens in got) > 0


WAYS = {"greedy": {}, "sampling": {"top_k": 40, "seed": 3}, "beams": {"beams": 3}}


@pytest.mark.parametrize("way", WAYS)
def test_why_a_continuation_ends(pair, way):
    """At its longest, at an end token wherever it comes, the last allowed one too, or at a stop string before it."""
    settings, asked = WAYS[way], prompts((5, 17, 33))

    def run(eos_ids=(), stop=(), new=NEW):
        decoding, text = Decoding(**settings, stop=stop), lambda ids: "".join(f"<{each}>" for each in ids)
        return generated(pair, asked, eos_ids, text, new, decoding=decoding)

    free = run()
    assert {each.stopped for each in free} == {"length"} and {len(each.ids) for each in free} == {NEW}
    for new in (1, 2, NEW):
        said = run(new=new)[0].ids
        ended = run([said[-1]], new=new)[0]  # with a search, perhaps another continuation with that end
        if way != "beams":
            assert ended == (said[: said.index(said[-1])], "end")
        assert ended.stopped == ("length" if len(ended.ids) == new else "end")
        stopped = run((), (f"<{said[-1]}>",), new)[0]
        assert stopped.stopped == "stop" and stopped.ids == said[: said.index(said[-1]) + 1]
    said = free[1].ids
    before = run([said[5]], (f"<{said[2]}>",))[1] if way != "beams" else None
    assert before is None or before.stopped == ("stop" if said.index(said[2]) < said.index(said[5]) else "end")


def test_a_result_does_not_depend_on_the_batch_or_the_order(pair):
    want = ours(pair, prompts(), [7])
    for batch_size in (1, 3):
        assert ours(pair, prompts(), [7], batch_size=batch_size) == want
    order = np.random.default_rng(1).permutation(len(LENGTHS))
    shuffled = ours(pair, [prompts()[i] for i in order], [7], batch_size=3)
    assert [shuffled[i] for i in np.argsort(order)] == want


def test_progress_counts_prompts(pair):
    seen = []
    ours(pair, prompts(), [7], batch_size=3, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_few_programs_are_compiled(pair):
    before = generation._continue._cache_size()
    ours(pair, prompts((3, 9, 30)), [7], batch_size=1)
    ours(pair, prompts((4, 8, 29)), [7], batch_size=1)
    assert generation._continue._cache_size() - before <= 1


def test_bfloat16_decodes(pair):
    loaded = pair[0]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loaded.params)
    config = {**CONFIG, "dtype": "bfloat16"}
    model = models.from_hf_config(config, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        got = generate(model, params, prompts((3, 9)), Ending(), max_new_tokens=4)
    assert [len(each.ids) for each in got] == [4, 4]


def test_errors(pair):
    assert message_of(ours, pair, [[1], []], []) == "prompt 1 has no tokens"
    longest = CONFIG["max_position_embeddings"] - NEW
    message = message_of(ours, pair, [[1], [5] * (longest + 1)], [])
    assert message == (
        f"prompt 1 has {longest + 1} tokens; with max_new_tokens {NEW} that exceeds the model's "
        f"{CONFIG['max_position_embeddings']} positions"
    )
    loaded = pair[0]
    message = message_of(generate, loaded.model, loaded.params, [[1]], Ending(), max_new_tokens=0)
    assert message == "max_new_tokens: expected at least 1, found 0"
    assert generate(loaded.model, loaded.params, [], Ending(), max_new_tokens=3) == []
