"""GLUE: eight tasks for an encoder with a classifier, one model each.

Fields, labels and metrics are those of the benchmark (gluebenchmark.com), as in the hub's `nyu-mll/glue`. The best epoch
is chosen by accuracy for MRPC and QQP and by Pearson's correlation for STS-B, as in the published NeuroAda code; the
benchmark's second metric, F1 or Spearman's correlation, is reported beside it.
"""

from typing import Any

from neuroada_jax.tasks.classification import ClassificationTask, Problem
from neuroada_jax.tasks.task import Source

HUB = "nyu-mll/glue"
_SIMILARITY = (0.0, 5.0)  # STS-B's labels are numbers


def _task(
    name: str, texts: tuple[str, ...], labels: tuple[str, ...], validation: str = "validation", **fields: Any
) -> ClassificationTask:
    """Return a task of the benchmark, whose dev set is the split `validation` of the hub."""
    sources = (Source(f"data/glue/{name}", "validation"), Source(f"{HUB}:{name}", validation))
    return ClassificationTask(name, texts, labels, by_number=True, detailed=False, sources=sources, **fields)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: dict[str, ClassificationTask] = {
    task.name: task
    for task in (
        _task("cola", ("sentence",), ("unacceptable", "acceptable"), metric="matthews", beside=("accuracy",)),
        _task("sst2", ("sentence",), ("negative", "positive")),
        _task("mrpc", _PAIR, ("not_equivalent", "equivalent"), beside=("f1",)),
        _task(
            "stsb",
            _PAIR,
            ("similarity",),
            metric="pearson",
            beside=("spearman",),
            problem=Problem.REGRESSION,
            limits=_SIMILARITY,
        ),
        _task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), beside=("f1",)),
        _task("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "validation_matched"),
        _task("qnli", ("question", "sentence"), _ENTAILMENT),
        _task("rte", _PAIR, _ENTAILMENT),
    )
}
