"""The texts of single tokens: joined, they are what was tokenised, with the names of special tokens."""

import pytest
from data_helpers import BYTES, CHAT, LLAMA, PAIRS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neuroada_jax.pretrained.token_texts import token_texts


@pytest.mark.parametrize("tokenizer", [BYTES, CHAT, PAIRS])
@pytest.mark.parametrize("text", ["the correct answer", " a  b\n\n\tc ", "_·▁Ġ<0x0A>##x"])
def test_byte_level(tokenizer, text):
    found = token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    data = b"".join(each.encode() if len(each) != 4 or each[:2] != r"\x" else bytes([int(each[2:], 16)]) for each in found)
    assert data.decode() == text


def test_special_tokens_and_halves_of_characters():
    ids = BYTES("aé", add_special_tokens=False)["input_ids"]
    assert token_texts(BYTES, [0, *ids, 1]) == ["<s>", "a", r"\xc3", r"\xa9", "</s>"]
    assert token_texts(CHAT, CHAT.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])) == ["<|im_start|>", "<|im_end|>"]


def test_sentence_piece():
    ids = LLAMA("a b\né")["input_ids"]
    assert token_texts(LLAMA, ids) == ["<s>", " ", "a", " ", "b", "\n", r"\xc3", r"\xa9"]
    assert token_texts(LLAMA, LLAMA.convert_tokens_to_ids(["<0x41>"])) == ["A"]


def test_word_piece_and_no_decoder():
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##do": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    for decoder in (decoders.WordPiece(), None):
        if decoder is not None:
            raw.decoder = decoder
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
        assert token_texts(tokenizer, [1, 2, 0]) == ["un", "##do", "[UNK]"]
