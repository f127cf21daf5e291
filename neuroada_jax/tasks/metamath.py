"""MetaMathQA and GSM8K as in PEFT's comparison of methods (huggingface/peft, method_comparison/MetaMathQA).

Rows of MetaMathQA are learnt whole, prompt and answer, as there; rows of GSM8K are scored by the number after the last
"The answer is" or "####". Two answers that are numbers or fractions are the same where their values are.
"""

import math
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.errors import UserError
from neuroada_jax.tasks.task import Source, Task

# The first of these that a text has comes before its answer.
_BEFORE = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
_LONGEST = 400  # characters of a number that is read as one
_FIELDS = (("query", "response"), ("question", "answer"))  # of MetaMathQA, and of GSM8K


def stated_answer(text: str, answer: str = "") -> str:
    """Return what a text states as its answer, "" where it states none; the correct answer plays no part."""
    text = text.strip().rstrip(".!?")
    before = next((each for each in _BEFORE if each in text), None)
    if before is None:
        return ""
    return text.rpartition(before)[2].strip().split("\n", 1)[0].strip(" .!?$%")


def same(found: str, answer: str) -> bool:
    """Return whether two stated answers are equal, as numbers where both are."""
    values = _number(found), _number(answer)
    return bool(found) and (values[0] == values[1] if None not in values else values == (None, None) and found == answer)


def _number(text: str) -> float | None:
    """Return the value of a decimal number or of a fraction of two."""
    parts = text.split("/")
    if len(parts) > 2 or len(text) > _LONGEST:
        return None
    try:
        numbers = [Decimal(part.strip()) for part in parts]
        value = float(numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0])
    except (InvalidOperation, ArithmeticError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _convert(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    for question, response in _FIELDS:
        asked, answered = row.get(question), row.get(response)
        if isinstance(asked, str) and isinstance(answered, str):
            break
    else:
        raise UserError(
            f"{where}: task 'metamath' needs the text fields query and response, or question and answer, found fields "
            f"{', '.join(row) or 'none'}"
        )
    prompt, answer = f"Question: {asked} Think step by step.\nAnswer:", stated_answer(answered)
    if question == "query":
        return {"text": prompt + answered, "answer": answer}
    if not answer:
        raise UserError(f"{where}: the answer states no number after '#### ' (task 'metamath')")
    return {"prompt": prompt, "completion": answered, "answer": answer}


METAMATH = Task(
    "metamath",
    PromptStyle.VERBATIM,
    _convert,
    stated_answer,
    matches=same,
    max_new_tokens=300,
    sources=(Source("data/metamath/test.jsonl"), Source("openai/gsm8k:main")),
)
