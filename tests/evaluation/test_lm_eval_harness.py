"""`neuroada lm-eval` against lm-eval's own HF model: the same table, and the same answer to every single request."""

import json
import sys

import numpy as np
import pytest
import yaml
from data_helpers import BYTES, CHAT
from helpers import write_bert, write_model
from quantised_files import SIZES

import neuroada_jax.evaluation
from neuroada_jax import cli, models
from neuroada_jax.core import quantised
from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.errors import UserError
from neuroada_jax.generation.generate import Generation
from neuroada_jax.pretrained import save
from neuroada_jax.pretrained.load import load_with_progress, open_with_tokenizer

WORDS = [*"abcdehinostu", "the", "day", "night", "answer", "question", "option1", "please choose", "correct"]
MISSING = 'lm-eval is not installed: pip install -e ".[eval]" (kept out of the extra `test`: 190 MB, 16,000 files)'


@pytest.fixture(scope="module")
def harness():
    """The module under test, where lm-eval is installed."""
    pytest.importorskip("lm_eval", reason=MISSING)
    from neuroada_jax.evaluation import lm_eval_harness

    with pytest.MonkeyPatch.context() as patch:  # it runs `pip list` and more, for seconds, after every evaluation
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        yield lm_eval_harness


def sentences(count, seed, least=1, most=12):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(least, most))) for _ in range(count)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of each kind on local rows: multiple choice, perplexity, generation, and one that samples."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": question, "choices": sentences(3, number, 1, 5), "label": number % 3, "text": text, "word": text[:1]}
        for number, (question, text) in enumerate(zip(sentences(10, 100), sentences(10, 200, 2, 60), strict=True))
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "metadata": {"version": 1.0},
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    }
    generation = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "do_sample": False, "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    sampling = {**generation, "generation_kwargs": {"until": ["e"], "do_sample": True, "temperature": 0.7}}
    greedy_too_long = {**generation, "generation_kwargs": {"until": ["e"], "max_gen_toks": 128}}
    kinds = {"choice": choice, "rolling": rolling, "generation": generation, "sampling": sampling, "long": greedy_too_long}
    for name, own in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"tiny_{name}", **common, **own}))
    return folder


@pytest.fixture(scope="module", params=[CHAT, BYTES], ids=["no BOS", "adds BOS"])
def pair(request, harness, tmp_path_factory):
    """The same random model here and in lm-eval's own wrapper, with a tokenizer that adds BOS or one that does not."""
    from lm_eval.models.huggingface import HFLM

    directory = write_model(tmp_path_factory.mktemp("model") / "m", request.param, seed=3)
    opened, tokenizer = open_with_tokenizer(str(directory), "float32")
    ours = harness.NeuroAdaLM(opened, load_with_progress(opened).params, tokenizer, batch_size=4)
    return ours, HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4)


def requests(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, each, number) for number, each in enumerate(arguments)]


def test_tables_and_answers_equal_those_of_the_hf_model(harness, pair, tasks):
    names = ["tiny_choice", "tiny_rolling", "tiny_generation"]
    found = harness.find_tasks(names, str(tasks))
    ours, theirs = (harness.evaluate(lm, found, num_fewshot=1, bootstrap_iters=0, apply_chat_template=False) for lm in pair)
    assert harness.summary_table(ours) == harness.summary_table(theirs)
    for name in names:
        answers = [[sample["filtered_resps"] for sample in each["samples"][name]] for each in (ours, theirs)]
        if name == "tiny_generation":
            assert answers[0] == answers[1]
            assert len({texts[0] for texts in answers[0]}) > 3  # the model says something, and not always the same
        else:
            numbers = [np.array(each, np.float64) for each in answers]  # is_greedy as 0 and 1
            np.testing.assert_allclose(*numbers, rtol=1e-5, atol=1e-4)


def compared(harness, opened, params, tokenizer, directory, tasks):
    """Our answers to choices and generations, and those of the HF model of the directory."""
    from lm_eval.models.huggingface import HFLM

    ours = harness.NeuroAdaLM(opened, params, tokenizer, batch_size=4)
    theirs = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4)
    names, options = ["tiny_choice", "tiny_generation"], {"bootstrap_iters": 0, "apply_chat_template": False}
    found = harness.find_tasks(names, str(tasks))
    samples = [harness.evaluate(lm, found, num_fewshot=1, **options)["samples"] for lm in (ours, theirs)]
    return [[[row["filtered_resps"] for row in each[name]] for name in names] for each in samples]


@pytest.mark.parametrize("kind", [kind for kind, each in models.ARCHITECTURES.items() if each.is_decoder])
def test_every_family_answers_as_the_hf_model(harness, kind, tasks, tmp_path):
    import torch
    import transformers

    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    sizes |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if kind == "qwen3_moe" else {}
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "eos_token_id": CHAT.eos_token_id, "bos_token_id": None}
    config = transformers.AutoConfig.for_model(kind, **sizes, **tokens, initializer_range=0.4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    CHAT.save_pretrained(tmp_path)
    opened, tokenizer = open_with_tokenizer(str(tmp_path), "float32")
    params = load_with_progress(opened).params
    (choices, texts), (want, same) = compared(harness, opened, params, tokenizer, tmp_path, tasks)
    np.testing.assert_allclose(np.array(choices, np.float64), np.array(want, np.float64), rtol=1e-5, atol=1e-3)
    assert texts == same and len({text for (text,) in texts}) > 3


@pytest.mark.parametrize("quantization", ["nf4", "int8", "fp8"])
def test_a_quantised_base_answers_as_the_hf_model_of_its_dequantised_weights(harness, quantization, tasks, tmp_path):
    directory = write_model(tmp_path / "model", seed=3, **{**SIZES, "dtype": "float32"})
    opened, tokenizer = open_with_tokenizer(str(directory), "float32", quantization_of=quantization)
    loaded = load_with_progress(opened)
    assert quantised.holds(loaded.params)
    save.save(tmp_path / "dense", loaded, quantised.map_quantised(quantised.dequantise, loaded.params), tokenizer)
    (choices, texts), (want, same) = compared(harness, opened, loaded.params, tokenizer, tmp_path / "dense", tasks)
    np.testing.assert_allclose(np.array(choices, np.float64), np.array(want, np.float64), rtol=1e-5, atol=1e-3)
    assert texts == same and len({text for (text,) in texts}) > 3
    unquantised = compared(harness, opened, loaded.params, tokenizer, directory, tasks)[1]
    assert np.abs(np.array(unquantised[0], np.float64) - np.array(want, np.float64)).max() > 1e-2  # else it says little


def test_single_requests_equal_those_of_the_hf_model(pair):
    """Out of order, of many lengths, with an empty context, BOS in the text, one-token answers, and truncated texts."""
    ours, theirs = pair
    pairs = [(text, " " + end) for text, end in zip(sentences(9, 1), sentences(9, 2, 1, 4), strict=True)]
    pairs += [("", "then a day"), ("<s>the day", " is"), ("the day ", "is"), (" ".join(sentences(20, 3)), " the night")]
    pairs += [("the answer is ", letter) for letter in "abcd"]
    asked = sentences(40, 9)
    said = theirs.generate_until(requests(*((text, {"until": [], "max_gen_toks": 1}) for text in asked)), disable_tqdm=True)
    # What it says of itself, where the text has the same token again.
    pairs.append(next(pair for pair in zip(asked, said, strict=True) if pair[1].isascii() and pair[1].isalnum()))
    assert len(theirs.tok_encode(pairs[12][0])) > theirs.max_length
    got, expected = ours.loglikelihood(requests(*pairs)), theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    np.testing.assert_allclose([value for value, _ in got], [value for value, _ in expected], rtol=1e-5, atol=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in got} == {True, False}
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
    assert ours.tokenizer_name == theirs.tokenizer_name and ours.max_length == theirs.max_length


def test_long_texts_roll_as_in_the_hf_model(pair):
    ours, theirs = pair
    texts = requests(*((" ".join(sentences(count, count)),) for count in (1, 40, 3, 25)), ("",))
    got, expected = ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_generation_cuts_long_prompts_and_keeps_settings_apart(harness, pair, monkeypatch):
    ours, theirs = pair
    settings = [
        {"until": ["e"], "max_gen_toks": 20},
        {"until": [], "max_gen_toks": 6},
        {"max_tokens": 6, "temperature": 0.0},
    ]
    long = " ".join(sentences(30, 5))
    texts = [*sentences(6, 4), long, "<s>the day"]
    free = "".join(ours.generate_until(requests(*((text, {**settings[0], "until": []}) for text in texts[::3]))))
    stop = next(letter for letter in free[5:] if letter.isascii() and letter.isalnum())  # one that it does say
    settings[0]["until"].append(stop)
    asked = [(text, settings[number % 3]) for number, text in enumerate(texts)]
    outputs, generate = [], harness.generate

    def watched(*arguments, **options):
        outputs.extend(generate(*arguments, **options))
        return outputs[-len(arguments[2]) :]

    monkeypatch.setattr(harness, "generate", watched)
    # One at a time there: a batch takes the BOS rule of its first text, and cuts padding as if it were text.
    expected = [theirs.generate_until(requests(one), disable_tqdm=True)[0] for one in asked]
    assert ours.generate_until(requests(*asked)) == expected
    said = [each.ids for each in outputs[: len(texts[::3])]]
    stopped = [ids for ids in said if stop in ours.tokenizer.decode(ids)]
    assert stopped and not any(stop in ours.tokenizer.decode(ids[:-1]) for ids in stopped)  # the rest is not decoded


def test_few_shapes_and_one_text_for_answers_of_one_token(harness, pair, monkeypatch):
    ours, _ = pair
    shapes, real, texts = set(), harness._scores, 0

    def watched(module, params, batch):
        nonlocal texts
        shapes.add((batch.input_ids.shape, batch.label_ids.shape))
        texts += int((batch.lengths > 0).sum())
        return real(module, params, batch)

    monkeypatch.setattr(harness, "_scores", watched)
    monkeypatch.setattr(ours, "batch_size", 2)
    ours._loglikelihood_tokens([(None, list(range(5, 5 + size)), [7] * (1 + size % 4)) for size in range(1, 60)])
    assert len(shapes) <= 6
    texts = 0
    ours._loglikelihood_tokens([(None, [5, 6, 7], [answer]) for answer in range(20)])
    assert texts == 1


def test_an_empty_continuation_is_named(pair):
    with pytest.raises(UserError, match=r"has 0 tokens, expected 1 to 128"):
        pair[0].loglikelihood(requests(("the day", "")))


# The command.


@pytest.fixture
def neuroada(capsys):
    """Runs `neuroada lm-eval` and returns (exit code, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        code = cli.main(["lm-eval", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def failure(result):
    code, out, err = result
    assert code == 2 and out == "" and "Traceback" not in err
    return err.splitlines()[-1].removeprefix("neuroada: error: ")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m")


def test_the_command_prints_json_and_writes_samples(harness, neuroada, model, tasks, tmp_path):
    out = tmp_path / "results.json"
    common = ("--tasks", "tiny_choice", "--include-path", tasks, "--model", model, "--limit", 4, "--batch-size", 3)
    code, printed, _ = neuroada(*common, "--num-fewshot", 2, "--out", out, "--json")
    assert code == 0 and printed.count("\n") == 1
    content = json.loads(printed)
    written = json.loads(out.read_text())
    assert content["n-samples"]["tiny_choice"] == {"original": 10, "effective": 4}
    assert content["n-shot"] == {"tiny_choice": 2}
    assert content["results"] == written["results"]
    assert len(written["samples"]["tiny_choice"]) == 4
    code, printed, _ = neuroada(*common, "--apply-chat-template")
    assert code == 0 and "|tiny_choice|" in printed and "acc_norm" in printed


def test_bad_input_is_one_line(harness, neuroada, model, tasks, tmp_path):
    common = ("--include-path", tasks, "--model", model)
    for option, value, told in (
        ("--batch-size", 0, "--batch-size: expected at least 1, found 0"),
        ("--num-fewshot", -1, "--num-fewshot: expected at least 0, found -1"),
        ("--out", tmp_path / "no" / "results.json", f"--out: the folder {tmp_path / 'no'} does not exist"),
    ):
        assert failure(neuroada("--tasks", "tiny_choice", *common, option, value)) == told
    missing = failure(neuroada("--tasks", "tiny_choice", "--include-path", tmp_path / "no", "--model", model))
    assert missing == f"--include-path: {tmp_path / 'no'} is no folder"
    assert "generation_kwargs" in failure(neuroada("--tasks", "tiny_sampling", *common))
    assert "generates 128 tokens, which leaves no room in 128 positions" in failure(
        neuroada("--tasks", "tiny_long", *common)
    )


def test_an_unknown_task_names_the_nearest(harness, neuroada, model, tasks, monkeypatch):
    monkeypatch.setattr(harness, "_Tasks", lambda include_path, **_: _only(harness, include_path))
    told = failure(neuroada("--tasks", "tiny_chioce", "--include-path", tasks, "--model", model))
    assert told.startswith("--tasks: unknown task 'tiny_chioce'; nearest: tiny_choice")


def _only(harness, include_path):
    """An index without lm-eval's own 15,000 files, which take long to read."""
    return harness.TaskManager(include_path=include_path, include_defaults=False)


def test_a_task_whose_rows_are_missing_is_named(harness, neuroada, model, tmp_path):
    content = {
        "task": "gone",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "no.jsonl")}},
    }
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump({**content, "test_split": "test", "doc_to_text": "{{a}}"}))
    told = failure(neuroada("--tasks", tmp_path / "gone.yaml", "--model", model))
    assert "gone.yaml cannot be loaded (FileNotFoundError" in told


def test_encoders_are_refused(harness, neuroada, tasks, tmp_path):
    bert = write_bert(tmp_path / "bert")
    told = failure(neuroada("--tasks", "tiny_choice", "--include-path", tasks, "--model", bert))
    assert "bert is an encoder, which cannot continue a text" in told


def test_the_form_of_the_training_is_used(harness, pair, monkeypatch):
    """Its template with arguments and date, and its end tokens."""
    template = (
        "{{ strftime_now('%Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{{ more }}{% endif %}"
    )
    form = PromptForm(PromptStyle.CHAT, template, {"more": "!"}, "2001-02-03", None, ("<|im_end|>", "</s>"))
    model, asked = pair[0], [{"role": "user", "content": "hi"}]
    trained = harness.NeuroAdaLM(model.base_model, model.params, model.tokenizer, form=form)
    assert trained.apply_chat_template(asked) == "2001<user>hi<assistant>!"
    begun = [*asked, {"role": "assistant", "content": "so"}]
    assert trained.apply_chat_template(begun, add_generation_prompt=False) == "2001<user>hi<assistant>so"
    endings = []
    monkeypatch.setattr(
        harness,
        "generate",
        lambda model, params, prompts, ending, **_: [Generation([], "end") for _ in prompts if not endings.append(ending)],
    )
    trained.generate_until(requests(("hi", {"until": ["e"], "max_gen_toks": 4})))
    tokens = set(model.tokenizer.convert_ids_to_tokens(endings[0].eos_ids))
    assert tokens >= {"<|im_end|>", "</s>"}


def test_the_missing_extra_is_named(neuroada, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "neuroada_jax.evaluation.lm_eval_harness", raising=False)
    monkeypatch.delattr(neuroada_jax.evaluation, "lm_eval_harness", raising=False)
    told = failure(neuroada("--tasks", "hellaswag", "--model", "m"))
    assert told == 'lm-eval needs lm_eval, which is missing: pip install -e ".[eval]"'
