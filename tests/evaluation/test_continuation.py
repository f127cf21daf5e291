"""Scores of a decoder: exact match, choices by likelihood, and rows that cannot be scored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import CHAT, message_of
from helpers import write_model

from neuroada_jax.data.examples import encode
from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.data.rows import load_rows, rows_from_list
from neuroada_jax.evaluation import choices, continuation, metrics, scoring
from neuroada_jax.evaluation.continuation import ContinuationScorer, Options
from neuroada_jax.generation.generate import Generation
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.tasks import TASKS


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return load_model(str(write_model(tmp_path_factory.mktemp("model") / "m", seed=3)))


def score(base_model, rows, task="instruct", batch_size=16, trained_on=None, **options):
    rows = rows_from_list(rows) if isinstance(rows, list) else rows
    options = {"form": PromptStyle.PLAIN, "max_new_tokens": 8, **options}
    options = Options(**options, batch_size=batch_size, trained_on=trained_on)
    scorer = ContinuationScorer.prepare(base_model, CHAT, rows, TASKS[task], options)
    return scoring.score(scorer, base_model, base_model.params)


def test_exact_match_and_predictions(base_model, tmp_path):
    rows = [{"prompt": f"{word} and", "completion": "?"} for word in ("the", "answer", "choose", "option", "a question")]
    first = score(base_model, rows)
    assert first.value == 0 and first.n == 5 and first.interval[0] == 0
    texts = [prediction["prediction"] for prediction in first.predictions]
    assert texts == [prediction["generation"].strip() for prediction in first.predictions]
    # The answers are now what the model says, with white space around it: those rows are right, and one is not.
    said = [{**row, "answer": f" {text}\n"} for row, text in zip(rows, texts, strict=True)]
    said[3]["answer"] += "x"
    second = score(base_model, said, batch_size=2)
    assert second.value == 0.8
    assert [prediction["correct"] for prediction in second.predictions] == [True, True, True, False, True]
    assert second.predictions[0]["prompt"] == "the and\n"
    assert second.interval == metrics.wilson_interval(4, 5)
    scoring.write_predictions(tmp_path / "p.jsonl", second)
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == second.predictions


def test_the_trigger_phrase_comes_before_the_answer():
    extract = TASKS["commonsense"].extract
    assert extract("so the correct answer is true", "true") == "true"
    assert extract("the correct answer is a\nthe correct answer is b", "a") == "a\nthe correct answer is b"
    assert extract("true", "true") == "" == extract("The Correct Answer Is true", "true")


def test_choices_picks_the_likelier_answer(base_model):
    sentences = ("the question", "a correct answer", "option1", "please", "the correct answer to the question", "d")
    rows = [{"sentence": sentence, "label": i % 2} for i, sentence in enumerate(sentences)]
    got = score(base_model, rows, "sst2", method="choices", batch_size=4)
    likeliest = []

    @jax.jit
    def log_probabilities(ids):
        hidden, _ = base_model.model.module().apply({"params": base_model.params}, ids[None])
        logits = base_model.model.module().apply({"params": base_model.params}, hidden, method="unembed")
        return jax.nn.log_softmax(logits[0])

    for row in rows:
        losses = {}
        for label, answer in enumerate(("negative", "positive")):
            example = TASKS["sst2"].convert({**row, "label": label}, "here")
            encoded = encode([example], "plain", CHAT, 128)
            ids, is_label = encoded.example(0)
            padded = jnp.asarray(np.pad(ids, (0, 128 - len(ids))))
            picked = np.asarray(log_probabilities(padded))[np.arange(len(ids) - 1), ids[1:]]
            losses[answer] = -picked[is_label[1:]].sum()
        likeliest.append(min(losses, key=losses.get))
    assert [prediction["prediction"] for prediction in got.predictions] == likeliest
    right = sum(choice == ("negative", "positive")[row["label"]] for choice, row in zip(likeliest, rows, strict=True))
    assert got.value == right / len(rows)


def test_choices_of_a_question_are_those_that_it_names(base_model, monkeypatch):
    sizes = []

    def last_is_likeliest(model, params, groups, batch_size, on_progress):
        sizes.extend(map(len, groups))
        return np.array([[np.inf if at >= len(group) else -at for at in range(5)] for group in groups])

    monkeypatch.setattr(choices, "losses", last_is_likeliest)
    named = [[f"answer{number}" for number in range(1, count + 1)] for count in (4, 3, 5)]
    rows = [{"instruction": f"q\n\nAnswer format: {'/'.join(names)}", "answer": "answer1"} for names in named]
    rows += [{"instruction": "q", "answer": "answer1"}, {**rows[1], "answer": "answer4"}]  # all five
    got = score(base_model, rows, "arc_easy", method="choices")
    assert sizes == [4, 3, 5, 5, 5]
    assert [each["prediction"] for each in got.predictions] == [f"answer{size}" for size in sizes]


def test_rows_that_cannot_be_scored(base_model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n')
    message = message_of(score, base_model, load_rows(str(path)))
    assert message == f"{path}:2: no answer to compare with (fields prompt)"
    message = message_of(score, base_model, [{"sentence": "s", "label": 2}], "sst2")
    assert message.startswith("rows: row 0: task 'sst2' needs") and message.endswith("and label 2")
    message = message_of(score, base_model, [{"instruction": "i"}], "commonsense")
    assert message == "rows: row 0: task 'commonsense' needs the text fields instruction and answer, found instruction"
    message = message_of(score, base_model, [{"prompt": "a", "completion": "b"}], method="choices")
    assert message == "evaluation method 'choices': task 'instruct' has no fixed answers; use 'generate'"
    for length in (58, 69, 90):  # the answer is truncated, or dropped
        rows = [{"sentence": "ok", "label": 1}, {"sentence": "7" * length, "label": 1}]
        message = message_of(score, base_model, rows, "sst2", method="choices")
        assert "longer than the model's 128 positions" in message
    message = message_of(score, base_model, [{"prompt": "the question " * 90, "completion": "b"}])
    assert "exceeds the model's 128 positions" in message


def test_chat_rows_are_scored_against_the_last_assistant_turn(base_model):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]
    assert score(base_model, [{"messages": chat}]).predictions[0]["answer"] == "answer"
    message = message_of(score, base_model, [{"messages": chat[:1]}])
    assert message == "rows: row 0: no answer to compare with (fields messages)"


def test_parts_by_a_second_rule_and_without_the_training_rows(base_model, monkeypatch):
    texts = ["A book: the answer is (B).", "The answer is C", "", "Denote it by x."]
    monkeypatch.setattr(
        continuation,
        "generate",
        lambda *_, **options: [Generation([i], "end") for i in range(options["max_new_tokens"] - 508)],
    )
    monkeypatch.setattr(continuation, "check_lengths", lambda *_: None)  # of a model with 128 positions
    monkeypatch.setattr(type(CHAT), "decode", lambda self, ids, **_: texts[ids[0]])
    rows = [{"instruction": f"i{i}", "output": "", "answer": answer} for i, answer in enumerate("BCAD")]
    got = score(
        base_model, rows, "aqua", form=PromptStyle.ALPACA, max_new_tokens=None, trained_on=frozenset({"i0", "i3", "i9"})
    )
    assert [each["prediction"] for each in got.predictions] == ["A", "C", "", "D"]
    assert [each["strict_prediction"] for each in got.predictions] == ["B", "C", "", ""]
    assert [each["in_training"] for each in got.predictions] == [True, False, False, True]
    assert (got.value, got.n, got.empty, got.overlap) == (0.5, 4, 1, 2)
    assert {name: part[:2] for name, part in got.parts.items()} == {
        "strict": (0.5, 4),
        "clean": (0.5, 2),
        "clean, strict": (0.5, 2),
    }
    assert got.parts["clean"].interval == metrics.wilson_interval(1, 2)
    # Without a second rule or known training rows there is nothing to tell apart.
    plain = score(
        base_model, [{**row, "answer": "3"} for row in rows], "gsm8k", form=PromptStyle.ALPACA, max_new_tokens=None
    )
    assert plain.parts == {} and plain.overlap is None and plain.empty == 1
    none_clean = score(base_model, rows, "aqua", max_new_tokens=None, trained_on=frozenset({"i0", "i1", "i2", "i3"}))
    assert none_clean.overlap == 4 and set(none_clean.parts) == {"strict"}


def test_an_empty_generation_is_wrong_whatever_the_answer(base_model, monkeypatch):
    monkeypatch.setattr(continuation, "generate", lambda *_, **__: [Generation([], "end")])
    got = score(base_model, [{"prompt": "a", "completion": " "}])
    assert got.value == 0 and got.empty == 1 and got.unfinished == 0


def test_generations_that_ran_to_the_limit_are_counted(base_model, monkeypatch):
    kinds = ("end", "length", "stop", "length")
    monkeypatch.setattr(continuation, "generate", lambda *_, **__: [Generation([5], kind) for kind in kinds])
    got = score(base_model, [{"prompt": "a", "completion": "b"}] * len(kinds))
    assert [each["stopped"] for each in got.predictions] == list(kinds)
    assert got.unfinished == 2 == scoring.Score.from_json(got.to_json()).unfinished
    rows = [{"sentence": "the question", "label": 1}]
    assert score(base_model, rows, "sst2", method="choices").unfinished is None
