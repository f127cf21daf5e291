"""Fields of a config about the columns and labels of own classification rows: their types and checks."""

from typing import Annotated, Any, Literal

import pydantic

from neuroada_jax.tasks import OWN
from neuroada_jax.tasks.classification import LABEL, LOWER_IS_BETTER, OWN_METRICS, TEXT, Problem
from neuroada_jax.tasks.labels import name_of, shown


def _columns(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    fits = isinstance(names, list) and len(names) in (1, 2) and all(isinstance(each, str) and each for each in names)
    if value is not None and not (fits and len(set(names)) == len(names)):
        raise ValueError(f"expected the name of a column, or a list of two, found {shown(value)}")
    return value


def _labels(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, list) and (numbers := [each for each in value if isinstance(each, float)]):
        raise ValueError(f'found {numbers[0]}, a number with a decimal point; as the name of a label write "{numbers[0]}"')
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(each, str | int) for each in value):
        raise ValueError(f"expected auto, or a list of at least two names or integers, found {shown(value)}")
    names = [name_of(each, "data.labels") for each in value]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{shown(twice)} is given twice")
    return value


def _weights(value: Any) -> Any:
    fits = isinstance(value, dict) and all(
        isinstance(each, int | float) and not isinstance(each, bool) for each in value.values()
    )
    if value not in ("none", "balanced") and not (
        fits and value and all(0 < each < float("inf") for each in value.values())
    ):
        raise ValueError(f"expected none, balanced, or a positive weight for each label, found {shown(value)}")
    return value


TextColumns = Annotated[str | list[str] | None, pydantic.BeforeValidator(_columns)]
LabelNames = Annotated[Literal["auto"] | list[str | int | bool], pydantic.BeforeValidator(_labels)]
ClassWeights = Annotated[Literal["none", "balanced"] | dict[str, float], pydantic.BeforeValidator(_weights)]


def check(task: str, text: str | list[str] | None, label: str | None, labels: str | list[Any], metric: str | None) -> None:
    """Check that the fields suit the task and one another.

    Raises:
      ValueError: they do not; names the field.
    """
    given = {"text": text is not None, "label": label is not None, "labels": labels != "auto", "metric": metric is not None}
    if task not in OWN:
        for field in (field for field, is_given in given.items() if is_given):
            raise ValueError(f"data.{field}: found it with task {task!r}, but it is for task {', '.join(OWN)}; remove it")
        return
    problem = Problem(task)
    known = [each for each in OWN_METRICS[problem] if each not in LOWER_IS_BETTER]
    if metric is not None and metric not in known:
        raise ValueError(f"data.metric: found {metric!r}, expected one of {', '.join(known)} for task {task!r}")
    if problem is Problem.REGRESSION and labels != "auto":
        raise ValueError("data.labels: task 'regression' learns a number, which has no labels; remove it")
    texts = [text] if isinstance(text, str) else text or [TEXT]
    columns_of_0_and_1 = problem is Problem.MULTILABEL and label is None and labels != "auto"
    if not columns_of_0_and_1 and (label or LABEL) in texts:
        raise ValueError(f"data.label: {label or LABEL!r} is a column of data.text, expected another one")
