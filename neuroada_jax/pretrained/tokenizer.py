"""Tokenizers of Hugging Face directories, hub ids and GGUF files (which store one in their metadata).

transformers can build a tokenizer from a GGUF file too, but only with torch installed. This module does the same with the
`tokenizers` library alone; tests compare the two.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from neuroada_jax.errors import UserError
from neuroada_jax.files import read_json
from neuroada_jax.pretrained.gguf_header import read_header

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")  # the same rule, one digit at a time
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = None  # the rule built into the ByteLevel pre-tokenizer

# tokenizer.ggml.pre -> the rule that splits text before merging, equal to that of transformers 5.23. It differs from
# llama.cpp's or from the model's tokenizer.json in these cases:
#   smollm   tokenizer.json also isolates every digit, so that whitespace before a digit stays one piece: "\n\n2" is "\n\n"
#            "2" there and "\n" "\n" "2" here. Digits give the same tokens, since no merge contains one.
#   refact   Granite's; as smollm.
#   llama3, tekken  tokenizer.json leaves a piece that is itself a token unmerged (ignore_merges).
#   qwen2    tokenizer.json composes Unicode (NFC) first; neither this module nor llama.cpp does.
#   default  llama.cpp splits off punctuation first, and numbers into groups of three digits.
_SPLITS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _GPT2,
    "refact": _GPT2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "gpt-4o": _GPT4O,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": _TEKKEN,
}
# Vocabularies to which llama.cpp adds a BOS token where the file does not declare it, as many Llama 3 files do not. The
# models expect one; transformers adds none.
_BOS_BY_DEFAULT = {"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"}


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a local Hugging Face directory, a hub id or a `.gguf` file; torch is not needed.

    Raises:
      UserError: the path is missing, is not a GGUF file, or has no tokenizer that is supported.
    """
    if str(path).lower().endswith(".gguf"):
        with _one_line_errors(str(path)):
            tokenizer = _from_gguf(str(path))
            _try_out(tokenizer)
        return tokenizer
    if os.path.isdir(path):
        _check_files(Path(path))
    with _one_line_errors(path):
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if isinstance(found, PreTrainedTokenizerFast):
            _try_out(found)
    if not isinstance(found, PreTrainedTokenizerFast):
        raise UserError(f"{path}: {type(found).__name__} found, expected a tokenizer with a tokenizer.json")
    return found


def without_image_token(tokenizer: PreTrainedTokenizerFast, embeddings: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer without the place of an image, if that is the one token for which a model has no embedding.

    All tokenizers of Gemma 3 have it; the models that do not read images (270M, 1B) do not. A text that names it is then
    tokenised like any other.
    """
    if len(tokenizer) != embeddings + 1 or str(tokenizer.added_tokens_decoder.get(embeddings)) != _IMAGE:
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < embeddings]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


_IMAGE = "<image_soft_token>"
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PROBE = "A first text, 12.5 \u00e9\u4f60\n  </s>"


def _check_files(directory: Path) -> None:
    """Check the files of a tokenizer as far as their reader does not: sizes, depths, and the types of some fields."""
    for name in _FILES:
        if (directory / name).is_file():
            content = read_json(directory / name)
            longest = content.get("model_max_length", 1) if name == "tokenizer_config.json" else 1
            if type(longest) not in (int, float, type(None)) or (longest is not None and not longest >= 1):
                raise UserError(f"{directory / name}: model_max_length is {longest!r}, expected a number from 1")
            template = content.get("chat_template")
            if name == "tokenizer_config.json" and not isinstance(template, str | list | None):
                raise UserError(
                    f"{directory / name}: chat_template is {type(template).__name__}, expected a text or a list"
                )


def _try_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """Use what is used later, so that a file that only breaks in use is found when it is loaded."""
    ids = tokenizer(_PROBE)["input_ids"]
    tokenizer.decode(ids)
    tokenizer.convert_ids_to_tokens(ids)
    if not all(isinstance(text, str) for text in tokenizer.special_tokens_map.values()):
        raise ValueError("a special token is no text")
    with contextlib.suppress(ValueError):  # no chat template, or several
        if not isinstance(tokenizer.get_chat_template(), str):
            raise TypeError("the chat template is no text")


@contextlib.contextmanager
def _one_line_errors(path: str) -> Iterator[None]:
    """Turn whatever transformers, or a panic of the Rust library below it, raises into one line."""
    _flush()
    # Rust prints by itself, on the descriptors: a panic, and the names of unknown fields, with a file's control characters.
    with tempfile.TemporaryFile() as caught:
        kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        for descriptor in kept:
            os.dup2(caught.fileno(), descriptor)
        try:
            yield
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as error:  # pyo3's PanicException is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error)[:1000].split())[:200] or type(error).__name__
            raise UserError(f"{path}: no tokenizer in this directory or hub repository ({reason})") from error
        finally:
            _flush()
            for descriptor, before in kept.items():
                os.dup2(before, descriptor)
                os.close(before)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe or a stream that is closed, which is found when it is used
            stream.flush()


def _from_gguf(path: str) -> PreTrainedTokenizerFast:
    meta = read_header(path).metadata

    def get(key, default=None):
        return meta.get(f"tokenizer.ggml.{key}", default)

    for key in ("model", "tokens"):
        if get(key) is None:
            raise UserError(f"{path}: metadata tokenizer.ggml.{key} is missing, expected a GGUF file with a tokenizer")
    kind, tokens, types = get("model"), get("tokens"), np.asarray(get("token_type", ()))
    _check_lists(path, tokens, get("merges", []), types)
    if kind == "gpt2":
        pre = get("pre", "default")
        if pre not in _SPLITS:
            raise UserError(f"{path}: tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(sorted(_SPLITS))}")
        backend = _byte_level(path, tokens, types, get("merges"), _SPLITS[pre])
        add_bos = get("add_bos_token", pre in _BOS_BY_DEFAULT)
    elif kind == "llama":
        family = str(meta.get("general.architecture"))
        if family.startswith("gemma"):
            backend = _gemma(path, tokens, get("merges"))
        else:
            prefix_space = get("add_space_prefix", True)
            backend = _sentencepiece(
                path, tokens, get("scores"), get("merges"), prefix_space, by_metaspace=family != "phi3"
            )
        add_bos = get("add_bos_token", True)
    else:
        raise UserError(
            f"{path}: tokenizer.ggml.model is {kind!r}, expected gpt2 (byte-level BPE) or llama (SentencePiece)"
        )
    vocabulary = backend.get_vocab()
    for token_type, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        texts = [tokens[index] for index in np.flatnonzero(types == token_type)]
        added = [AddedToken(text, normalized=False, special=special) for text in texts if text in vocabulary]
        (backend.add_special_tokens if special else backend.add_tokens)(added)

    names = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = get(f"{key}_token_id")
        if token_id is not None:
            if type(token_id) is not int or not 0 <= token_id < len(tokens):
                raise UserError(
                    f"{path}: tokenizer.ggml.{key}_token_id is {token_id}, expected one of {len(tokens)} tokens"
                )
            # An AddedToken, because a plain string would be matched after normalisation.
            names[f"{name}_token"] = AddedToken(tokens[token_id], normalized=False, special=True)
    context = meta.get(f"{meta.get('general.architecture')}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        add_bos_token=add_bos,  # the post-processor is made from these two
        add_eos_token=get("add_eos_token", False),
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **({"model_max_length": context} if context else {}),
    )


def _check_lists(path: str, tokens: object, merges: object, types: np.ndarray) -> None:
    """Check the types and lengths of the lists of a tokenizer."""
    for key, found in (("tokens", tokens), ("merges", merges)):
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise UserError(f"{path}: tokenizer.ggml.{key} is no list of texts")
    if types.ndim != 1 or len(types) not in (0, len(tokens)) or types.dtype.kind not in "iuf":  # type: ignore[arg-type]
        raise UserError(f"{path}: tokenizer.ggml.token_type has {types.size} entries, expected one for each token")


def _byte_level(path: str, tokens: list[str], types: np.ndarray, merges: list[str] | None, split: str | None) -> Tokenizer:
    """Build byte-level BPE, as in GPT-2, Llama 3 and Qwen."""
    if merges is None:
        raise UserError(f"{path}: metadata tokenizer.ggml.merges is missing, expected the merges of a gpt2 tokenizer")
    spelling = byte_spelling()
    alphabet = set(spelling)
    added = np.isin(types, (_CONTROL, _USER_DEFINED)) if len(types) else np.zeros(len(tokens), bool)
    vocab = {}
    for index, token in enumerate(tokens):
        # Some converters left ordinary tokens in plain text; added tokens are always plain text.
        if not added[index] and not alphabet.issuperset(token):
            token = "".join(spelling[byte] for byte in token.encode("utf-8"))
        vocab[token] = index
    backend = _bpe(path, vocab, _pairs(merges), continuing_subword_prefix="", end_of_word_suffix="")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        backend.pre_tokenizer = byte_level
    else:
        isolate = pre_tokenizers.Split(Regex(split), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([isolate, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


def _bpe(path: str, vocab: dict[str, int], merges: list[tuple[str, str]], **options) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the Rust library raises it for a merge of unknown tokens
        raise UserError(f"{path}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error})") from error


def byte_spelling() -> list[str]:
    """Return GPT-2's printable character for each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _sentencepiece(
    path: str, tokens: list[str], scores, merges: list[str] | None, prefix_space: bool, by_metaspace: bool
) -> Tokenizer:
    """Build SentencePiece BPE with byte fallback, as in LLaMA 1, LLaMA 2 and Mistral.

    Not `by_metaspace`, as in Phi-3, the space before a text comes also before one that begins with a space.
    """
    if merges is None and not (isinstance(scores, np.ndarray) and scores.shape == (len(tokens),)):
        found = "no" if scores is None else np.size(scores)
        raise UserError(f"{path}: {found} tokenizer.ggml.scores and no merges, expected a score for {len(tokens)} tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = _pairs(merges) if merges is not None else _merges_from_scores(vocab, scores)
    backend = _bpe(path, vocab, pairs, fuse_unk=True, byte_fallback=True)
    if by_metaspace:
        scheme = "first" if prefix_space else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    else:
        replaced = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([*[normalizers.Prepend("▁")] * prefix_space, replaced])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * prefix_space)
    return backend


def _gemma(path: str, tokens: list[str], merges: list[str] | None) -> Tokenizer:
    """Build Gemma's SentencePiece BPE: its merges have the order of the tokens, and runs of spaces are spelled as such."""
    spelled = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocab = {token: index for index, token in enumerate(spelled)}
    order = -np.arange(len(tokens), dtype=np.float64)
    backend = _bpe(
        path,
        vocab,
        _pairs(merges) if merges is not None else _merges_from_scores(vocab, order),
        fuse_unk=True,
        byte_fallback=True,
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _merges_from_scores(vocab: dict[str, int], scores) -> list[tuple[str, str]]:
    """Return every pair of tokens that forms a token, best score first, the order in which SentencePiece merges.

    Ties are ordered as in transformers, because another order gives other ids.
    """
    merges = []
    for token, index in vocab.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(float(scores[index]), left, right) for left, right in known]
    merges.sort(key=lambda m: (m[0], len(m[1]), len(m[2])), reverse=True)
    return [(left, right) for _, left, right in merges]
