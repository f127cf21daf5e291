"""The names of a classifier's outputs, and how a Hugging Face config writes them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

SINGLE, MULTILABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE, MULTILABEL, REGRESSION)  # of transformers


@dataclasses.dataclass(frozen=True)
class Labels:
    """The outputs of a classifier.

    Attributes:
      names: of the classes in the order of the outputs; one name means regression.
      multilabel: whether an example has any number of the classes, rather than one.
    """

    names: tuple[str, ...]
    multilabel: bool = False

    @classmethod
    def of(cls, labels: "Labels | Sequence[str]") -> "Labels":
        """Return the labels, or those with these names of which an example has one."""
        return labels if isinstance(labels, Labels) else cls(tuple(labels))

    @property
    def problem_type(self) -> str:
        """The name that transformers has for the problem, and so for its loss."""
        return REGRESSION if len(self.names) == 1 else MULTILABEL if self.multilabel else SINGLE

    def written_into(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a Hugging Face config with a classifier for these labels."""
        return {key: value for key, value in config.items() if key != "num_labels"} | {
            "id2label": {str(number): name for number, name in enumerate(self.names)},
            "label2id": {name: number for number, name in enumerate(self.names)},
            "problem_type": self.problem_type,
        }
