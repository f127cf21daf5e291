"""Scores of an encoder: predictions in row order, whatever their lengths, and figures of the metrics."""

import numpy as np
import pytest
from data_helpers import PAIRS, message_of
from helpers import random_tensors

from neuroada_jax.data.examples import encode_labelled
from neuroada_jax.data.rows import rows_from_list
from neuroada_jax.evaluation import classification, metrics, scoring
from neuroada_jax.evaluation.classification import ClassificationScorer
from neuroada_jax.models import from_hf_config
from neuroada_jax.pretrained.load import LoadedModel, load_params
from neuroada_jax.tasks import GLUE


def encoder(labels):
    """A random RoBERTa with a classifier for these labels."""
    config = {
        "model_type": "roberta",
        "vocab_size": 260,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
        "type_vocab_size": 2,
        "pad_token_id": 1,
    }
    model = from_hf_config(config, labels=labels)
    params, digests = load_params(model, _Tensors(random_tensors(model.hf_config)))
    return LoadedModel(model, "", "here", digests, params)


class _Tensors:
    """Arrays as a checkpoint."""

    def __init__(self, arrays):
        self.arrays = arrays

    def names(self):
        return list(self.arrays)

    def shape(self, name):
        return self.arrays[name].shape

    def read(self, name, raw=None):
        return self.arrays[name]

    def raw(self, name):
        return self.arrays[name].tobytes()


def rows(labels):
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("abcdef"), draw.integers(1, 12))) for _ in labels]
    return rows_from_list([{"sentence1": a, "sentence2": a[::-1], "label": b} for a, b in zip(texts, labels, strict=True)])


def scored(base_model, data, task, on_progress=None, **options):
    scorer = ClassificationScorer.prepare(base_model, PAIRS, data, GLUE[task], **{"max_length": 30, **options})
    return scoring.score(scorer, base_model, base_model.params, on_progress)


def test_accuracy_and_f1_of_predictions_in_row_order():
    base_model = encoder(["not_equivalent", "equivalent"])
    data = rows([0, 1, 1, 0, 1, 0, 1])
    seen = []
    score = scored(base_model, data, "mrpc", lambda *done: seen.append(done), batch_size=3)
    assert seen[-1] == (3, 3) and score.n == 7 and score.metric == "accuracy"
    for number, prediction in enumerate(score.predictions):  # each row by itself
        row = data.rows[number]
        examples = encode_labelled([(row["sentence1"], row["sentence2"])], np.zeros(1, np.int32), PAIRS, 30)
        alone = classification.predict(base_model, base_model.params, examples, 1)[0]
        np.testing.assert_allclose(prediction["logits"], alone, atol=1e-5)
        assert prediction["prediction"] == GLUE["mrpc"].labels[int(alone.argmax())]
        assert prediction["answer"] == GLUE["mrpc"].labels[row["label"]]
        assert prediction["sentence1"] == row["sentence1"]
    correct = [each["correct"] for each in score.predictions]
    assert score.value == pytest.approx(np.mean(correct)) and score.interval[0] <= score.value <= score.interval[1]
    found, want = (
        np.array([each[field] == "equivalent" for each in score.predictions]) for field in ("prediction", "answer")
    )
    assert score.beside == {"f1": pytest.approx(2 * (found & want).sum() / (found.sum() + want.sum()))}


def test_regression_has_correlations_with_intervals():
    base_model = encoder(["similarity"])
    score = scored(base_model, rows([0.0, 5.0, 2.5, 1.0]), "stsb")
    found, want = ([each[field] for each in score.predictions] for field in ("prediction", "answer"))
    assert want == [0.0, 5.0, 2.5, 1.0] and score.interval[0] <= score.value <= score.interval[1]
    assert score.beside_intervals["spearman"] == metrics.interval("spearman", found, want)
    assert score.value == pytest.approx(np.corrcoef(found, want)[0, 1], abs=1e-4) and set(score.beside) == {"spearman"}


def test_a_classifier_may_have_its_labels_in_another_order_but_no_others():
    data, task = rows([0, 1, 1, 0]), GLUE["mrpc"]
    logits = {}
    for names in (["LABEL_0", "LABEL_1"], ["EQUIVALENT", "not-equivalent"]):  # the same weights
        base_model = encoder(names)
        score = scored(base_model, data, "mrpc")
        logits[names[0]] = np.array([each["logits"] for each in score.predictions])
    np.testing.assert_array_equal(logits["LABEL_0"], logits["EQUIVALENT"][:, ::-1])
    assert classification.label_classes(encoder(["CONTRADICTION", "NEUTRAL", "ENTAILMENT"]), GLUE["mnli"]) == [2, 1, 0]
    assert classification.label_classes(encoder(["score"]), GLUE["stsb"]) == [0]
    message = message_of(classification.label_classes, encoder(list(task.labels)), GLUE["rte"])
    want = "task 'rte' has the labels entailment, not_entailment, and the classifier of here has not_equivalent, equivalent"
    assert message == want
    message = message_of(classification.label_classes, encoder(["no", "yes"]), GLUE["mnli"])
    want = "task 'mnli' has 3 label(s) (entailment, neutral, contradiction), and the classifier of here has 2"
    assert message == want


def test_truncated_rows_are_reported(capsys):
    base_model = encoder(["entailment", "not_entailment"])
    scored(base_model, rows([0, 1]), "rte", max_length=6)
    assert "rows: 2 of 2 examples truncated to 6 tokens" in capsys.readouterr().err
