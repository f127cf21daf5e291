"""Decoding against transformers' `generate`, token for token: every family, beams, and the rules against repetition."""

import collections

import numpy as np
import pytest
import torch
from helpers import CONFIG, write_model
from transformers import AutoModelForCausalLM

from neuroada_jax.generation import decoder
from neuroada_jax.generation.generate import Ending, generate
from neuroada_jax.generation.sampling import Decoding
from neuroada_jax.pretrained.load import load_model

NEW = 12
LENGTHS = (2, 5, 17, 33)
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 6},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8},
}
THEIRS = {"beams": "num_beams", "no_repeat_ngram": "no_repeat_ngram_size"}
BEAMS = {
    "plain": {"beams": 4},
    "short": {"beams": 4, "length_penalty": -1.0},
    "long": {"beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    "early": {"beams": 4, "early_stopping": True, "length_penalty": 0.6},
    "no_repetition": {"beams": 4, "repetition_penalty": 1.3, "no_repeat_ngram": 2, "early_stopping": True},
}
GREEDY = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.4},
    "ngram": {"no_repeat_ngram": 2},
    "both": {"repetition_penalty": 0.8, "no_repeat_ngram": 3},
    "unigram": {"no_repeat_ngram": 1},
}


def prompts():
    rng = np.random.default_rng(0)
    found = [rng.integers(0, CONFIG["vocab_size"], length).tolist() for length in LENGTHS]
    return [*found, (found[1] * 3)[:11]]  # one that repeats itself


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    """The same random model here and in PyTorch, and tokens that it likes, to end with."""
    directory = tmp_path_factory.mktemp("model") / request.param
    write_model(directory, None, seed=5, model_type=request.param, **FAMILIES[request.param])
    loaded = load_model(str(directory))
    said = generate(loaded.model, loaded.params, prompts(), Ending(), max_new_tokens=NEW)
    eos_ids = [token for token, _ in collections.Counter(token for each in said for token in each.ids).most_common(6)[3:]]
    reference = AutoModelForCausalLM.from_pretrained(directory).eval()
    reference.generation_config.eos_token_id = None  # only what a test asks for
    return request.param, loaded, reference, eos_ids


def theirs(model, prompt, eos_ids, settings, new=NEW):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=list(eos_ids) or None,
            pad_token_id=CONFIG["vocab_size"],  # none of the model's, so that padding is seen
            **{THEIRS.get(name, name): value for name, value in settings.items()},
        )
    return [token for token in out[0, len(prompt) :].tolist() if token not in eos_ids and token != CONFIG["vocab_size"]]


MADE = {}  # what `ours` found, since several tests ask for the same


def ours(family, settings, eos_ids, batch_size=3):
    name, loaded, _, _ = family
    decoding = Decoding(**settings)
    key = name, decoding, tuple(eos_ids), batch_size
    if key not in MADE:
        options = {"max_new_tokens": NEW, "decoding": decoding, "batch_size": batch_size}
        made = generate(loaded.model, loaded.params, prompts(), Ending(tuple(eos_ids)), **options)
        assert all(each.stopped == ("length" if len(each.ids) == NEW else "end") for each in made)
        MADE[key] = [each.ids for each in made]
    return MADE[key]


def assert_equal(family, settings, ending, **options):
    _, _, reference, eos_ids = family
    stops = eos_ids if ending else []
    assert ours(family, settings, stops, **options) == [theirs(reference, prompt, stops, settings) for prompt in prompts()]


OTHERS = [name for name in FAMILIES if name != "llama"]
# The search and the rules know nothing of the family: for the others, one variant each shows that the cache does its part.
CASES = [("llama", name) for name in (*BEAMS, *GREEDY)] + [
    (family, name) for family in OTHERS for name in ("early", "greedy")
]


# "both" and "no_repetition" have these rules, too.
REPEATED = [("llama", name) for name in ("long", "penalty", "unigram")] + [("mistral", "early")]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(
            family,
            name,
            id=f"{family}-{name}",
            marks=pytest.mark.slow if family in ("qwen2", "qwen3") or (family, name) in REPEATED else (),
        )
        for family, name in CASES
    ],
    indirect=["family"],
)
def test_equals_transformers(family, name):
    settings = BEAMS[name] if name in BEAMS else GREEDY[name]
    if name in BEAMS:
        assert_equal(family, settings, ending=True)
    if name in GREEDY or name in ("plain", "no_repetition"):  # without an end all are as long, so the others are as plain
        assert_equal(family, settings, ending=False)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"beams": 2}], ids=["greedy", "beams"])
def test_stacked_layers_equal_transformers(family, settings, monkeypatch):
    """Every device but a CPU scans them."""
    asked = []
    monkeypatch.setattr(decoder, "one_by_one", lambda _: bool(asked.append(None)))
    assert_equal(family, settings, True, batch_size=4)  # a size of its own: what is compiled already is not traced again
    assert asked


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_settings_matter(family):
    """Else the comparisons above would prove little."""
    for settings, ends in ((BEAMS, family[3]), (GREEDY, [])):
        made = [each for name, each in settings.items() if ("llama", name) not in REPEATED]
        assert len({str(ours(family, each, ends)) for each in made}) >= 3


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_search_does_not_depend_on_the_batch(family):
    settings, eos_ids = BEAMS["early"], family[3]
    together = ours(family, settings, eos_ids)
    assert ours(family, settings, eos_ids, batch_size=1) == together
