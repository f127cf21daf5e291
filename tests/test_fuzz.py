"""A short form of `make fuzz`, and files that ask for too much, one by one."""

import fuzz
import fuzz_formats
import fuzz_mutations
import pytest
from data_helpers import CHAT, message_of

from neuroada_jax.data import sandbox
from neuroada_jax.data.chat_template import ChatTemplate
from neuroada_jax.data.chats import Chat

CASES = 150


@pytest.mark.parametrize("name", fuzz_formats.FORMATS)
def test_mutations(name, tmp_path, monkeypatch):
    if name == "official":
        pytest.importorskip("torch")
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)  # less than `make fuzz` has, for templates that take all of it
    faults = []
    counts = fuzz.fuzz(name, tmp_path / "x", CASES if name != "loaded" else 60, 20, faults.append)
    assert faults == []
    assert counts["clean"] and not counts["tracebacks"] + counts["hangs"] + counts["over memory"]
    assert counts["accepted"] or name == "native"  # whose files have digests of everything in them


def rendered(template):
    chat = Chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], None, (1,))
    return ChatTemplate(CHAT, template + str(CHAT.chat_template), {}, "2026-01-31").turns(chat, (1,), "row 0")


@pytest.mark.parametrize(
    "template", [each for each in fuzz_mutations.TEMPLATES if "**" in each or "range" in each or "f()" in each]
)
def test_templates_that_ask_for_too_much_are_one_line_soon(template, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    fuzz._reset_peak()
    before = fuzz._peak()
    with fuzz.alarm(5):
        assert "chat template" in message_of(rendered, template)
    assert fuzz._peak() - before < 10**9


@pytest.mark.parametrize(
    "template",
    ["{{ 2 ** 10 }}", "{{ 'ab' * 3 }}", "{{ [1, (2, 3)]|length }}", "{{ 2.5|round(1) }}", "{{ {'a': [1]}['a'] }}"],
)
def test_small_sums_are_what_they_were(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    arguments = {"chat_template": template}
    assert sandbox.render([[]], **arguments) == render_jinja_template([[]], **arguments)


def test_a_fault_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fuzz_formats.Yaml, "read", lambda self, folder: int((folder / "run.yaml").read_bytes()[5:6] == b"t")
    )
    assert not fuzz.fuzz("yaml", tmp_path / "a", 5, 0)["tracebacks"]
    monkeypatch.setattr(
        fuzz_formats.Yaml, "read", lambda self, folder: 1 // ((folder / "run.yaml").read_bytes()[:5] == b"name:")
    )
    assert fuzz.fuzz("yaml", tmp_path / "b", 60, 0)["tracebacks"]
