"""Logits processors and warpers against transformers' own, draws, stop strings, and settings that contradict each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from data_helpers import CHAT, message_of
from helpers import write_model
from transformers.generation import logits_process

from neuroada_jax.generation import generate as generation
from neuroada_jax.generation import sampling
from neuroada_jax.generation.sampling import Decoding
from neuroada_jax.pretrained.load import load_model

VOCABULARY = 23


def random_logits(rows=5):
    return 3 * np.random.default_rng(1).standard_normal((rows, VOCABULARY), np.float32)


def random_tokens(length, rows=5):
    return np.random.default_rng(2).integers(0, 6, (rows, length)).astype(np.int32)  # few, so that they repeat


def assert_same(got, want):
    """Equal numbers, and the same tokens excluded."""
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_repetition_penalty(penalty):
    logits, tokens = random_logits(), random_tokens(9)
    want = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(tokens).long(), torch.tensor(logits))
    # Slots that hold nothing, before and behind, and what is in them does not matter.
    padded = np.full((5, 14), VOCABULARY - 1, np.int32)
    padded[:, 3:12] = tokens
    present = np.zeros(padded.shape, bool)
    present[:, 3:12] = True
    got = sampling.penalise_repetition(jnp.asarray(logits), jnp.asarray(padded), jnp.asarray(present), penalty)
    assert_same(np.asarray(got), want.numpy())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 12])
def test_repeated_ngrams(size):
    logits, tokens = random_logits(), random_tokens(11)
    want = logits_process.NoRepeatNGramLogitsProcessor(size)(torch.tensor(tokens).long(), torch.tensor(logits))
    padded = np.zeros((5, 16), np.int32)
    padded[:, 2:13] = tokens
    present = np.zeros(padded.shape, bool)
    present[:, 2:13] = True
    arrays = map(jnp.asarray, (logits, padded, present))
    got = sampling.forbid_repeated_ngrams(*arrays, jnp.int32(13), size)
    assert_same(np.asarray(got), want.numpy())
    if size in (1, 2):
        assert np.isneginf(np.asarray(got)).any()


def test_a_prompt_shorter_than_the_ngram_forbids_nothing():
    logits = jnp.asarray(random_logits(1))
    got = sampling.forbid_repeated_ngrams(logits, jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3), bool), jnp.int32(3), 7)
    np.testing.assert_array_equal(got, logits)


WARPERS = [
    {"temperature": 0.3},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 0.01},
    {"top_p": 1.0},
    {"temperature": 2.5, "top_k": 9, "top_p": 0.8},
]


@pytest.mark.parametrize("settings", WARPERS, ids=str)
def test_warpers_equal_transformers(settings):
    logits = random_logits()
    processors = logits_process.LogitsProcessorList()
    if "temperature" in settings:
        processors.append(logits_process.TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        processors.append(logits_process.TopKLogitsWarper(settings["top_k"]))
    if settings.get("top_p", 1.0) < 1:
        processors.append(logits_process.TopPLogitsWarper(settings["top_p"]))
    want = processors(torch.zeros((5, 1), dtype=torch.long), torch.tensor(logits)).numpy()
    assert_same(np.asarray(sampling.warp(jnp.asarray(logits), Decoding(**settings))), want)


def test_draws_follow_the_filtered_distribution():
    decoding = Decoding(temperature=1.5, top_k=6, top_p=0.9)
    logits = jnp.asarray(random_logits(1))
    want = np.asarray(jax.nn.softmax(sampling.warp(logits, decoding)))[0]
    count = 4000
    keys = jax.random.split(jax.random.key(0), count)
    many = jnp.broadcast_to(logits, (count, VOCABULARY))
    drawn = np.asarray(sampling.choose(many, decoding, keys, jnp.zeros((count,), jnp.int32)))
    found = np.bincount(drawn, minlength=VOCABULARY) / count
    np.testing.assert_allclose(found, want, atol=4 * 0.5 / count**0.5)  # four standard deviations at most
    assert not found[want == 0].any()
    again = np.asarray(sampling.choose(many, decoding, keys, jnp.ones((count,), jnp.int32)))
    assert (again != drawn).mean() > 0.3  # another number, another draw


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return load_model(str(write_model(tmp_path_factory.mktemp("model") / "m", seed=3)))


def generate(base_model, prompts, new=20, **settings):
    ending = generation.Ending(decode=settings.pop("decode", None))
    options = {"batch_size": settings.pop("batch_size", 16), "max_new_tokens": new, "decoding": Decoding(**settings)}
    return [each.ids for each in generation.generate(base_model.model, base_model.params, prompts, ending, **options)]


PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [4] * 9]


def test_sampling_depends_on_the_seed_and_the_prompts_place_only(base_model):
    first = generate(base_model, PROMPTS, temperature=1.3, top_k=50, seed=1)
    assert generate(base_model, PROMPTS, temperature=1.3, top_k=50, seed=1, batch_size=3) == first
    assert generate(base_model, PROMPTS, temperature=1.3, top_k=50, seed=2) != first
    assert first[0] != first[2]  # the same prompt in another place
    assert all(len(ids) == 20 for ids in first)
    assert generate(base_model, PROMPTS, top_k=1, seed=5) == generate(base_model, PROMPTS)


def test_another_seed_and_another_length_compile_nothing(base_model):
    generate(base_model, PROMPTS, temperature=0.7, seed=1)
    before = generation._start._cache_size(), generation._continue._cache_size()
    generate(base_model, PROMPTS, temperature=0.7, seed=9, new=18)
    assert (generation._start._cache_size(), generation._continue._cache_size()) == before


def test_stop_strings(base_model):
    text_of = lambda ids: CHAT.decode(ids)  # noqa: E731
    free = generate(base_model, PROMPTS, new=40)
    texts = [text_of(ids) for ids in free]
    # ASCII, which a random byte before or behind cannot become part of.
    readable = lambda text: [letter for letter in text if " " < letter < "\x7f"]  # noqa: E731
    said = readable("".join(texts))
    stop = (said[1], said[-2], "never said")
    got = generate(base_model, PROMPTS, new=40, stop=stop, decode=text_of)
    for ids, all_ids, text in zip(got, free, texts, strict=True):
        assert ids == all_ids[: len(ids)]
        want = generation.before_stop(text, stop)
        assert generation.before_stop(text_of(ids), stop) == want
        if want == text:
            assert ids == all_ids
        else:  # not a token more than the stop text needs
            assert any(each in text_of(ids) for each in stop) and not any(each in text_of(ids[:-1]) for each in stop)
    assert any(len(ids) < 40 for ids in got)
    searched = generate(base_model, PROMPTS, new=20, beams=2)
    which, letter = next((i, readable(text_of(ids))[0]) for i, ids in enumerate(searched) if readable(text_of(ids)))
    truncated = generate(base_model, PROMPTS, new=20, beams=2, stop=(letter,), decode=text_of)
    assert truncated[which] == searched[which][: len(truncated[which])] and text_of(truncated[which])[-1] == letter


def test_a_stop_string_that_never_comes_ends_at_the_longest_continuation(base_model):
    got = generate(base_model, PROMPTS, new=33, stop=("\x00never",), decode=CHAT.decode)
    assert got == generate(base_model, PROMPTS, new=33)


def test_before_stop():
    assert generation.before_stop("a b c", ("c", "b")) == "a "
    assert generation.before_stop("a b c", ()) == "a b c" == generation.before_stop("a b c", ("d",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected above 0, found 0.0; omit it for greedy decoding"),
        ({"top_k": 0}, "top_k: expected at least 1, found 0"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, found 0.0"),
        ({"top_p": 1.1}, "top_p: expected above 0 and at most 1, found 1.1"),
        ({"temperature": 1.0, "seed": -1}, "seed: expected at least 0 and below 2^32, found -1"),
        ({"beams": 0}, "beams: expected at least 1, found 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected above 0, found 0.0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram: expected at least 0, found -1"),
        ({"stop": ("a", "")}, "stop: found an empty text, which would end every continuation at once"),
        ({"beams": 4, "top_p": 0.5}, "beams: a search with 4 beams samples nothing"),
        ({"seed": 3}, "seed: nothing is sampled; give temperature, top_k or top_p too"),
        ({"length_penalty": 2.0}, "length_penalty, early_stopping: they are for a beam search; give beams above 1 too"),
        ({"early_stopping": True}, "length_penalty, early_stopping: they are for a beam search; give beams above 1 too"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    assert message_of(Decoding, **settings).startswith(message)


def test_stop_strings_need_a_tokenizer(base_model):
    message = message_of(generate, base_model, PROMPTS, stop=("a",))
    assert message == "stop: stop strings are looked for in the text, which needs ending.decode, found None"
