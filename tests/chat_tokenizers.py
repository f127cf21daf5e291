"""Tiny tokenizers of the kinds that chat models have, which differ in what they do at spaces and newlines."""

import functools
import json
from collections.abc import Callable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Spaces, newlines and full stops are repeated so that they are merged with their neighbours.
SENTENCES = [
    *("What is the capital of France? Paris.\n\n", "red or blue? blue", " red", " blue", "the quick brown fox.\n", "\n\n"),
    *(
        "count to three: one two three\n\n",
        "the lazy dog.\n",
        "system user assistant model\n",
        "a b  c   d\n\n\n",
        "add 1 2: 3",
    ),
] * 4
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")


def _byte_level(split: str | None = None, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Bytes as characters: GPT-2's split, or one of one's own."""
    raw = Tokenizer(models.BPE())
    parts = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    if normalizer is not None:
        raw.normalizer = normalizer
    return raw


def _pieces(newlines: bool = True) -> Tokenizer:
    """Pieces as in SentencePiece, with bytes for all other characters; without `newlines` a newline is a byte too."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learnt.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    pieces = [piece for piece in model["vocab"] if newlines or "\n" not in piece]
    merges = [(left, right) for left, right in model["merges"] if newlines or "\n" not in left + right]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: i for i, name in enumerate(names)}
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))


def _metaspace() -> Tokenizer:
    """Mistral and Llama 2 as saved today: a space before the text, none after a special token."""
    raw = _pieces()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = _spaces(decoders.Strip(" ", 1, 0))
    return raw


def _legacy_llama() -> Tokenizer:
    """Llama 2 as saved at first: a space before every piece of text, after special tokens too; a newline is a byte."""
    raw = _pieces(newlines=False)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = _spaces(decoders.Strip(" ", 1, 0))
    return raw


def _gemma() -> Tokenizer:
    """Gemma: no space is added anywhere."""
    raw = _pieces()
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = _spaces()
    return raw


def _spaces(*last: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])


_MAKE: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "llama3_split": lambda: _byte_level(LLAMA3_SPLIT),
    "qwen_split": lambda: _byte_level(QWEN_SPLIT, normalizers.NFC()),
    "metaspace": _metaspace,
    "legacy_llama": _legacy_llama,
    "gemma": _gemma,
}
KINDS = tuple(_MAKE)


@functools.cache
def _saved(kind: str) -> str:
    return _MAKE[kind]().to_str()


def raw_tokenizer(kind: str) -> Tokenizer:
    """Return a fresh tokenizer of a kind, without special tokens."""
    return Tokenizer.from_str(_saved(kind))
