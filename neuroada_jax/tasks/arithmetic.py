"""The seven arithmetic tasks, prompted as in LLM-Adapters and scored as by LoReFT and NeuroAda.

The model learns to write a chain of thought that ends in the answer. By the published rule the answer is the last number
in it, correct within 0.001; for AQuA, the first capital letter A to E anywhere in the text. That second rule is weak: of
the 713 rationales with a letter in math_10k, it finds the correct one in 371. AQuA is therefore also scored by the letter
that the text states as its answer, which is correct in 680.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from neuroada_jax.data.prompts import PromptStyle
from neuroada_jax.errors import UserError
from neuroada_jax.tasks.task import Source, Task, published_sources

SUITE = "arithmetic"
LETTERS = ("A", "B", "C", "D", "E")
TOLERANCE = 1e-3

_NUMBER = re.compile(r"-?\d+\.?\d*")
_GROUPED = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
_STATED = re.compile(r"(?i:\b(?:answer|option|choice)\b)[^.\n]{0,40}?(?:\n\s*|[\s(\[:*'\"])([A-E])(?![A-Za-z'])")
_LISTED = re.compile(r"(?<![A-Za-z])([A-E])\)")


def last_number(text: str) -> str:
    """Return the last number in a text, without commas; "" where there is none."""
    found = _NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else ""


def first_letter(text: str) -> str:
    """Return the first capital A to E in a text, even as part of a word; "" where there is none."""
    return next((letter for letter in text if letter in LETTERS), "")


def stated_letter(text: str) -> str:
    """Return the last letter that a text states as its answer, option or choice, else the last like "C)", else ""."""
    found = _STATED.findall(text) or _LISTED.findall(text)
    return found[-1] if found else ""


def _extract(text: str, answer: str) -> str:
    return first_letter(text) if answer in LETTERS else last_number(text)


def _strict(text: str, answer: str) -> str:
    return stated_letter(text) if answer in LETTERS else last_number(text)


def _same(found: str, answer: str) -> bool:
    return found == answer if answer in LETTERS else bool(found) and abs(float(found) - float(answer)) <= TOLERANCE


def _is_number(answer: str) -> bool:
    try:
        return float(answer) - float(answer) == 0  # false for infinities and NaN
    except ValueError:
        return False


def _gsm8k(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row of openai/gsm8k, whose answer follows "####"."""
    rationale, _, answer = row["answer"].rpartition("####")
    return {"instruction": row["question"], "output": rationale, "answer": answer.strip().replace(",", "")}


def _aqua(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row of deepmind/aqua_rat, whose options are "A)21" and so on."""
    options = " ".join("({}) {}".format(*option.split(")", 1)) for option in row["options"])
    question = f"{row['question']} Answer Choices: {options}"
    return {"instruction": question, "output": row["rationale"], "answer": row["correct"]}


_ORIGINALS = {"gsm8k": (("question", "answer"), _gsm8k), "aqua": (("question", "options", "rationale", "correct"), _aqua)}


def _convert(name: str, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields, rewritten = _ORIGINALS.get(name, ((), None))
    if rewritten and "instruction" not in row and all(field in row for field in fields):
        try:
            row = rewritten(row)
        except (AttributeError, IndexError, TypeError) as error:
            raise UserError(f"{where}: not a row of {name!r} as the hub has it ({error})") from error
    instruction, output, answer = (row.get(field) for field in ("instruction", "output", "answer"))
    if not isinstance(instruction, str) or answer is None or not isinstance(output, str | None):
        also = f" (or {', '.join(fields)}, as on the hub)" if fields else ""
        raise UserError(
            f"{where}: task {name!r} needs a text field instruction and a field answer{also}, and to train on them a "
            f"text field output, found {', '.join(row)}"
        )
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise UserError(f"{where}: answer {answer!r}, expected a text or a number (task {name!r})")
    answer = answer.strip()
    if _GROUPED.fullmatch(answer):
        answer = answer.replace(",", "")
    if not (answer in LETTERS and name in (SUITE, "aqua")) and not (_is_number(answer) and name != "aqua"):
        expected = {"aqua": "a letter A to E", SUITE: "a number, or a letter A to E"}.get(name, "a number")
        raise UserError(f"{where}: answer {answer!r}, expected {expected} (task {name!r})")
    converted = {"instruction": instruction, "answer": answer}
    return converted if output is None else {**converted, "output": output}


def _task(name: str, folder: str | None = None, *hub: Source) -> Task:
    return Task(
        name,
        PromptStyle.ALPACA,
        functools.partial(_convert, name),
        _extract,
        matches=_same,
        strict=_strict if name in (SUITE, "aqua") else None,
        max_new_tokens=512,
        suite=SUITE,
        sources=published_sources(SUITE, folder, *hub) if folder else (),
    )


ARITHMETIC = _task(SUITE)
TASKS = (
    _task("multiarith", "MultiArith"),
    _task("gsm8k", "gsm8k", Source("openai/gsm8k:main")),
    _task("addsub", "AddSub"),
    _task("aqua", "AQuA", Source("deepmind/aqua_rat:raw")),
    _task("singleeq", "SingleEq"),
    _task("svamp", "SVAMP"),
    _task("mawps", "mawps"),
)
