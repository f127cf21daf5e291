"""What PEFT itself writes as LoRA: read with its logits, or refused in one line that names the field."""

import json
import shutil
import typing

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import write_model

from neuroada_jax import cli
from neuroada_jax.adapters import exchange, peft_lora
from neuroada_jax.errors import UserError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(1, 17)[None]
PLAIN = [True, False, "gaussian", "orthogonal", "mica"]
OTHERS = ["pissa", "pissa_niter_2", "olora", "corda", "loftq", "lora_ga", "of a later version"]


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("base") / "model"))


def trained_by_peft(base, folder, **options):
    """Return the folder of an adapter that PEFT has trained for three steps, and the logits of PEFT's own reading of it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.3)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder, peft_logits(base, folder)


def peft_logits(base, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, folder).eval()(input_ids=IDS).logits.numpy()


def import_and_merge(base, folder, out):
    exchange.import_adapter(str(folder), "peft-lora", base, str(out / "own"))
    assert cli.main(["merge", "--adapter", str(out / "own"), "--out", str(out / "merged")]) == 0
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(out / "merged").eval()(input_ids=IDS).logits.numpy()


@pytest.mark.parametrize("initial", PLAIN)
def test_every_initialisation_beside_the_base_is_read_with_its_logits(base, initial, tmp_path):
    folder, expected = trained_by_peft(base, tmp_path / "peft", init_lora_weights=initial)
    np.testing.assert_allclose(import_and_merge(base, folder, tmp_path), expected, atol=1e-4)


@pytest.mark.parametrize("initial", OTHERS)
def test_an_initialisation_that_changes_the_base_is_refused(base, initial, tmp_path):
    options = {"init_lora_weights": initial} if initial in ("pissa", "olora") else {}
    folder, _ = trained_by_peft(base, tmp_path / "peft", **options)
    edit(folder, init_lora_weights=initial)
    message = f"init_lora_weights is '{initial}', which is not known to keep the base weights; only LoRA beside the base's"
    with pytest.raises(UserError, match=message) as error:
        exchange.import_adapter(str(folder), "peft-lora", base, str(tmp_path / "own"))
    assert "\n" not in str(error.value) and not (tmp_path / "own").exists()


def test_every_initialisation_of_peft_is_in_one_of_the_lists():
    hints = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    known = {value for part in typing.get_args(hints) for value in typing.get_args(part)}
    assert known - {"pissa_niter_[number of iters]", "eva"} <= {*PLAIN, *OTHERS}
    assert set(PLAIN) < set(peft_lora._INITIAL) and not set(OTHERS) & set(peft_lora._INITIAL)


def test_every_field_of_peft_is_read_or_refused_where_it_is_set(base, tmp_path):
    folder, _ = trained_by_peft(base, tmp_path / "peft")
    found = json.loads((folder / "adapter_config.json").read_text())
    others = [name for name in [*found, "of_a_later_version"] if name not in peft_lora._PLAIN]
    assert {"use_dora", "kasa_config", "arrow_config", "rank_pattern", "trainable_token_indices"} < set(others)
    for name in others:
        one = shutil.copytree(folder, tmp_path / name)
        edit(one, **{name: [1]})
        with pytest.raises(UserError, match=rf"{name} is \[1\]; only plain LoRA is read"):
            peft_lora.open_stored(one)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_widened(base, dtype, tmp_path):
    folder, _ = trained_by_peft(base, tmp_path / "peft", use_rslora=True)
    path = str(folder / "adapter_model.safetensors")
    narrow = {name: leaf.astype(dtype) for name, leaf in safetensors.numpy.load_file(path).items()}
    safetensors.numpy.save_file(narrow, path, metadata={"format": "pt"})
    found = import_and_merge(base, folder, tmp_path)
    np.testing.assert_allclose(found, peft_logits(base, folder), atol=1e-4)
    pairs = peft_lora.open_stored(folder).pairs
    assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {np.dtype(np.float32)}


def test_numbers_that_are_not_finite_are_named_so(base, tmp_path):
    folder, _ = trained_by_peft(base, tmp_path / "peft")
    path = str(folder / "adapter_model.safetensors")
    tensors = safetensors.numpy.load_file(path)
    next(iter(tensors.values()))[0, 0] = np.nan
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="has factors with NaN or infinite numbers"):
        peft_lora.open_stored(folder)


def test_saved_modules_are_ends_of_paths(base, tmp_path):
    folder, expected = trained_by_peft(base, tmp_path / "norm", modules_to_save=["model.norm"])
    np.testing.assert_allclose(import_and_merge(base, folder, tmp_path), expected, atol=1e-4)
    folder, _ = trained_by_peft(base, tmp_path / "layers", modules_to_save=["input_layernorm"])
    with pytest.raises(UserError, match=r"input_layernorm.weight' has shape .*, the base model has no such tensor"):
        exchange.import_adapter(str(folder), "peft-lora", base, str(tmp_path / "no"))


def test_an_embedding_that_is_the_output_layer_too(tmp_path):
    tied = str(write_model(tmp_path / "tied", tie_word_embeddings=True))
    folder, _ = trained_by_peft(tied, tmp_path / "apart", modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match=r"embed_tokens.weight' is trained, but the base model's output layer"):
        exchange.import_adapter(str(folder), "peft-lora", tied, str(tmp_path / "no"))
    untied = str(write_model(tmp_path / "untied", tie_word_embeddings=False))
    folder, expected = trained_by_peft(untied, tmp_path / "embedding", modules_to_save=["embed_tokens"])
    np.testing.assert_allclose(import_and_merge(untied, folder, tmp_path), expected, atol=1e-4)


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
