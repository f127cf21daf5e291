"""The part of a model card that says how to use the adapter: here, in PEFT, and merged into its base model."""

import json

from neuroada_jax.adapters import native
from neuroada_jax.sharing.markdown import block, code
from neuroada_jax.sharing.origin import Base

_PLACE = "PATH/OF/THE/BASE/MODEL"


def sections(repository: str, base: Base, adapter: native.Adapter, is_decoder: bool | None) -> list[str]:
    """Return the lines.

    Args:
      repository: hub id of the adapter.
      base: the base model's public name.
      adapter: for its labels and parameters.
      is_decoder: whether the model continues texts; None for a model that is not one of this library's.
    """
    if is_decoder is None:
        return _own(repository)
    known = base.hub_id is not None or base.name.startswith("package:")
    source = (base.hub_id or base.name) if known else _PLACE
    option = "" if known else f" --model {_PLACE}"
    lines = ["## Use", ""]
    if not known:
        lines += [
            f"The base model {code(base.name)} has no name here by which the hub knows it: give a copy of your own. The "
            "adapter has its digests, and another model is refused.",
            "",
        ]
    lines += ["With neuroada-jax (`pip install -e .` in its repository):", ""]
    if is_decoder:
        lines += block(f'neuroada generate --adapter {repository}{option} --prompt "..."', "bash")
        call = 'tuned.generate(["..."])'
    else:
        lines += block(f'neuroada classify --adapter {repository}{option} --text "..."', "bash")
        call = 'tuned.predict(["..."])'
    python = [
        "import neuroada_jax as na",
        "",
        f"tuned = na.load({json.dumps(source)}, adapter={json.dumps(repository)})",
        f"print({call})",
    ]
    lines += ["", *block("\n".join(python), "python"), ""]
    merge = f"neuroada merge --adapter {repository}{option} --out merged"
    lines += ["Merged into its base model, as a Hugging Face directory for transformers and servers:", ""]
    lines += [*block(merge, "bash"), "", "In PEFT:", "", *_peft(repository, source, option, adapter, is_decoder)]
    return lines


def _peft(repository: str, source: str, option: str, adapter: native.Adapter, is_decoder: bool) -> list[str]:
    labels = adapter.metadata["base"].get("labels")
    if source.startswith("package:"):  # a GGUF file, from which PEFT loads no base model
        source = _PLACE
    kind, more = ("AutoModelForCausalLM", "") if is_decoder else ("AutoModelForSequenceClassification", "")
    if not is_decoder and labels:
        more = f", num_labels={len(labels)}"
    python = [
        "from peft import PeftModel  # 0.21 or later",
        f"from transformers import {kind}",
        "",
        f"base = {kind}.from_pretrained({json.dumps(source)}{more})",
        'model = PeftModel.from_pretrained(base, "for-peft")',
    ]
    export = f"neuroada export {repository}{option} --to {'peft-lora' if adapter.factors else 'peft-shira'} --out for-peft"
    return [*block(export, "bash"), "", *block("\n".join(python), "python")]


def _own(repository: str) -> list[str]:
    """Return the lines for an adapter of parameters of its author's own."""
    python = [
        "from huggingface_hub import snapshot_download",
        "from neuroada_jax.adapters import own",
        "",
        "# params: the arrays that it was trained on, at the same paths",
        f"trained = own.load(snapshot_download({json.dumps(repository)}), params)",
    ]
    return [
        "## Use",
        "",
        "The adapter belongs to a model outside of neuroada-jax:",
        "",
        *block("\n".join(python), "python"),
    ]
