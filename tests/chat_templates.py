"""Small chat templates that behave as those of well-known models, and tokenizers that hold their tokens.

The texts stand in fixtures/chat_templates. They are no model's own: each shows the traits that its notes name, which
test_chat_templates.py checks against transformers.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

from chat_tokenizers import KINDS, raw_tokenizer
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

__all__ = ["KINDS", "TEMPLATES", "TOOLS", "TOOL_CHAT", "Template", "chat", "text_of", "tokenizer"]


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template and its traits. Plain chats have user and assistant turns only, no arguments, tools or thoughts.

    Attributes:
      name: its key in `TEMPLATES`.
      text: jinja.
      notes: what is special about it.
      eos: the tokenizer's EOS, which need not be `end`.
      bos: the tokenizer's BOS.
      end: token that ends a last assistant turn; None if there is none.
      tokens: special tokens beside EOS and BOS.
      plain_tokens: added tokens that are not special, so that decoding keeps them.
      rstrip: whether `tokens` swallow the white space behind them.
      arguments: variables that it reads beside messages, tools, add_generation_prompt and the tokenizer's tokens.
      system: whether a message of that role is read, refused with an error, or ignored in silence.
      has_tools: whether it reads `tools` and writes `tool_calls`.
      alternates: whether it refuses two user turns in a row.
      opens: whether the text with a last assistant turn begins with the generation prompt for it (plain chats).
      inserts: what stands between that prompt and the turn's content.
      grows: whether the text of a longer plain chat begins with that of each shorter one up to an assistant turn.
      stable_with_system: whether `opens` and `grows` hold for chats with a system message too.
      trims: whether white space around content is lost.
      masks: whether it has {% generation %} blocks.
      dated: whether it writes today's date, unless the argument date_string says another.
    """

    name: str
    text: str
    notes: str
    eos: str
    bos: str | None = None
    end: str | None = None
    tokens: tuple[str, ...] = ()
    plain_tokens: tuple[str, ...] = ()
    rstrip: bool = False
    arguments: tuple[str, ...] = ()
    system: Literal["read", "refused", "ignored"] = "read"
    has_tools: bool = False
    alternates: bool = False
    opens: bool = True
    inserts: str = ""
    grows: bool = True
    stable_with_system: bool = True
    trims: bool = False
    masks: bool = False
    dated: bool = False

    @property
    def prefix_stable(self) -> bool:
        """Whether prompt and turns of a plain chat can be found by comparing beginnings of texts."""
        return self.opens and self.grows


TEXTS = Path(__file__).with_name("fixtures") / "chat_templates"
TEMPLATES: dict[str, Template] = {}


def _add(name: str, notes: str, text: str | None = None, **traits) -> None:
    if text is None:
        text = (TEXTS / f"{name}.jinja").read_text(encoding="utf-8")
    TEMPLATES[name] = Template(name, text, notes, **traits)


def _changed(name: str, old: str, new: str) -> str:
    text = TEMPLATES[name].text
    assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
    return text.replace(old, new)


CHATML = {"eos": "<|endoftext|>", "end": "<|im_end|>", "tokens": ("<|im_start|>", "<|im_end|>")}
THOUGHTS = ("<think>", "</think>")

_add("chatml", "as in tuned base models: the turn's end is not the tokenizer's EOS, a newline follows it", **CHATML)
_add(
    "default_system",
    "Qwen2.5 and SmolLM2: a system message is made up where the chat has none; EOS ends turns",
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif %}\n"
    + TEMPLATES["chatml"].text,
    **CHATML | {"eos": "<|im_end|>"},
)
_add("masked", "{% generation %} blocks hold content and end token", masks=True, **CHATML)
_add(
    "trimmed",
    "content loses the white space around it",
    _changed("chatml", "m.content", "m.content.strip()"),
    trims=True,
    **CHATML,
)
_add(
    "ignores_system",
    "system messages are skipped without a word",
    _changed("chatml", "for m in messages", "for m in messages if m.role != 'system'"),
    system="ignored",
    **CHATML,
)
_add(
    "other_prompt",
    "the generation prompt is not what precedes stored turns",
    _changed("chatml", "'<|im_start|>assistant\\n'", "'<|im_start|>assistant: '"),
    opens=False,
    stable_with_system=False,
    **CHATML,
)
_add(
    "zephyr",
    "roles are ordinary text, and EOS ends the turns of every role",
    eos="</s>",
    bos="<s>",
    end="</s>",
)
_add("no_end", "Phi-2 and many of one's own: no token ends a turn, a space stands before content", eos="</s>", inserts=" ")
_add(
    "vicuna",
    "no special tokens but EOS; BOS is the tokenizer's affair; the prompt ends before the space, the turn begins with it",
    eos="</s>",
    bos="<s>",
    end="</s>",
    inserts=" ",
)
_add(
    "llama2",
    "BOS in every user turn, system text inside the first, no generation prompt, a space before and after content",
    eos="</s>",
    bos="<s>",
    end="</s>",
    inserts=" ",
    alternates=True,
    trims=True,
)
LLAMA = {
    "eos": "<|eot_id|>",
    "bos": "<|begin_of_text|>",
    "end": "<|eot_id|>",
    "tokens": ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    "trims": True,
}
_add("llama3", "trims content; two newlines follow a header", **LLAMA)
_add(
    "always_prompts",
    "the first Llama 3: the generation prompt is written whether asked for or not",
    _changed("llama3", "{%- if add_generation_prompt %}", "{%- if true %}"),
    grows=False,
    stable_with_system=False,
    **LLAMA,
)
LLAMA31 = LLAMA | {
    "tokens": (*LLAMA["tokens"], "<|python_tag|>", "<|eom_id|>"),
    "arguments": ("builtin_tools", "custom_tools", "date_string", "tools_in_user_message"),
    "has_tools": True,
}
_add(
    "llama3.1",
    "a system block with a fixed date that date_string changes; functions go into the first user turn, or into the system "
    "block (tools_in_user_message false); one call a turn, as JSON, or for builtin_tools after <|python_tag|>, and then "
    "<|eom_id|> ends calls; results are JSON strings of role ipython",
    **LLAMA31,
)
_add(
    "llama3.2",
    "as Llama 3.1, with today's date unless date_string says another",
    _changed("llama3.1", "'26 Jul 2024'", "strftime_now('%d %b %Y')"),
    dated=True,
    **LLAMA31,
)
MISTRAL = {
    "eos": "</s>",
    "bos": "<s>",
    "end": "</s>",
    "tokens": (
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    "has_tools": True,
    "alternates": True,
    "inserts": " ",
    "stable_with_system": False,
}
_add(
    "mistral",
    "v0.3: system text stands in the last message if that is the user's, so a chat that ends with an answer has none; "
    "tools before the last user turn; ids of calls have nine characters; no text for the generation prompt",
    **MISTRAL,
)
_add(
    "mistral_last_user",
    "mistral-common's v2 and v3: system text in the last user turn, answered or not, so it moves as the chat grows",
    _changed("mistral", "first and loop.last", "first and m == questions[-1]"),
    **MISTRAL,
)
QWEN3 = {
    "eos": "<|im_end|>",
    "end": "<|im_end|>",
    "tokens": ("<|im_start|>", "<|endoftext|>"),
    "plain_tokens": (*THOUGHTS, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    "has_tools": True,
    "grows": False,
    "stable_with_system": False,
}
_add(
    "qwen3",
    "turns after the last question have a think block, which is empty in a last turn without thoughts; earlier turns lose "
    "theirs; the prompt has an empty block where enable_thinking is false; results of tools are user turns",
    arguments=("enable_thinking",),
    inserts="<think>\n\n</think>\n\n",
    **QWEN3,
)
_add(
    "qwen3_thinking",
    "the 2507 models that always think: the prompt opens the block, and no argument is read",
    _changed(
        "qwen3",
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
        "{{- '<think>\\n' }}",
    ),
    inserts="\n</think>\n\n",
    **QWEN3,
)
_add(
    "r1",
    "R1-Distill: the prompt opens a think block, stored turns lose everything up to </think>; EOS follows without newline",
    eos="<｜end▁of▁sentence｜>",
    bos="<｜begin▁of▁sentence｜>",
    end="<｜end▁of▁sentence｜>",
    tokens=("<｜User｜>", "<｜Assistant｜>"),
    plain_tokens=THOUGHTS,
    opens=False,
    stable_with_system=False,
)
_add(
    "gemma",
    "no system role; the assistant is called model; EOS ends no turn",
    eos="<eos>",
    bos="<bos>",
    end="<end_of_turn>",
    tokens=("<start_of_turn>", "<end_of_turn>"),
    system="refused",
    alternates=True,
    trims=True,
    stable_with_system=False,
)
_add(
    "phi3",
    "EOS ends the text, not the turns, and only without the generation prompt; tokens swallow the white space behind them",
    eos="<|endoftext|>",
    bos="<s>",
    end="<|end|>",
    tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    rstrip=True,
    grows=False,
    stable_with_system=False,
)
_add(
    "phi4",
    "no newlines at all",
    eos="<|im_end|>",
    bos="<|endoftext|>",
    end="<|im_end|>",
    tokens=("<|im_start|>", "<|im_sep|>"),
)
_add(
    "smollm3",
    "today's date in a system block, which no argument changes; /think and /no_think in the system text win over "
    "enable_thinking; tools are read as xml_tools only; {% generation %} blocks hold the header too, and the last newline",
    eos="<|im_end|>",
    end="<|im_end|>",
    tokens=("<|im_start|>", "<|endoftext|>"),
    plain_tokens=THOUGHTS,
    arguments=("enable_thinking", "xml_tools"),
    masks=True,
    dated=True,
)
_add(
    "harmony",
    "gpt-oss: <|return|> ends a last turn, <|end|> the earlier ones; only a last turn keeps its thoughts; a date",
    eos="<|return|>",
    bos="<|startoftext|>",
    end="<|return|>",
    tokens=("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
    arguments=("reasoning_effort",),
    inserts="<|channel|>final<|message|>",
    grows=False,
    stable_with_system=False,
    dated=True,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}},
        },
    }
]
_CALL = {"id": "call12345", "type": "function", "function": {"name": "add", "arguments": {"a": "1", "b": "2"}}}
TOOL_CHAT = [
    {"role": "user", "content": "add 1 2"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "name": "add", "content": "3", "tool_call_id": "call12345"},
    {"role": "assistant", "content": "It is 3."},
]


def chat(*turns: str, system: str | None = None) -> list[dict]:
    """Return messages: turns of the user and the assistant by turns, after a system message if there is a text for it."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


@functools.cache
def tokenizer(template: Template, *, kind: str = "byte_level") -> PreTrainedTokenizerFast:
    """Return a tokenizer of one of `KINDS` with the template and its tokens.

    It is made once for all tests: copy it before you change it. For a base model with another EOS, give it
    `dataclasses.replace(template, eos=...)`.
    """
    raw = raw_tokenizer(kind)
    special = dict.fromkeys([*([template.bos] if template.bos else []), template.eos, *template.tokens])
    swallows = template.tokens if template.rstrip else ()
    raw.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=token in swallows) for token in special]
    )
    raw.add_tokens([AddedToken(token, special=False, normalized=False) for token in template.plain_tokens])
    if template.bos:
        ids = [(template.bos, raw.token_to_id(template.bos))]
        raw.post_processor = processors.TemplateProcessing(single=f"{template.bos} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=template.bos,
        eos_token=template.eos,
        unk_token="<unk>" if raw.token_to_id("<unk>") is not None else None,
        chat_template=template.text,
        clean_up_tokenization_spaces=False,
    )


def text_of(template: Template, messages: list[dict], prompt: bool = False, **arguments) -> str:
    """Return transformers' rendering of a chat, with the generation prompt if `prompt`."""
    return tokenizer(template).apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **arguments)
