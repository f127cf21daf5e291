"""The text of every token by itself, without the spellings that vocabularies have for spaces and bytes."""

import json
import re
from collections.abc import Sequence
from typing import Any

from neuroada_jax.pretrained.tokenizer import byte_spelling

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    r"""Return the text of each token.

    A byte-level token is its characters, with bytes of an incomplete one as `\xf0`; a SentencePiece token has spaces in the
    place of "▁"; a WordPiece token keeps its "##". Special and added tokens are their names.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      ids: of the tokens.
    """
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    raw = tokenizer.backend_tokenizer
    state = "".join(_state(part) for part in (raw.pre_tokenizer, raw.decoder) if part is not None)
    number_of = {sign: number for number, sign in enumerate(byte_spelling())} if '"ByteLevel"' in state else {}
    result = []
    for token_id, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if token is None:
            result.append(f"<{token_id}>")  # a row of the embedding that the tokenizer does not name
        elif token_id in added:
            result.append(str(token))
        elif number_of and all(sign in number_of for sign in token):
            result.append(_characters(bytes(number_of[sign] for sign in token)))
        elif '"▁"' in state:
            byte = _BYTE.fullmatch(token) if '"ByteFallback"' in state else None
            result.append(_characters(bytes([int(byte[1], 16)])) if byte else token.replace("▁", " "))
        else:
            result.append(token)
    return result


def _state(part: Any) -> str:
    """Return a part of a tokenizer as JSON, with characters as they are."""
    return json.dumps(json.loads(part.__getstate__()), ensure_ascii=False)


def _characters(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
