"""What `neuroada models` lists: the supported model types, with examples and what is not supported of each."""

from typing import Any, NamedTuple

from neuroada_jax.models import ARCHITECTURES


class Family(NamedTuple):
    """What a user wants to know of a model_type.

    Attributes:
      models: names of models that have it.
      example: an id of the hub.
      notes: what is not supported, or is different.
    """

    models: str
    example: str
    notes: str = ""


_EXPERTS = "of experts no exports to other libraries but of LoRA to PEFT"

FAMILIES = {
    "llama": Family("LLaMA 1 to 3.x, SmolLM2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "mistral": Family("Mistral 7B", "mistralai/Mistral-7B-Instruct-v0.3"),
    "ministral": Family("Ministral 8B", "mistralai/Ministral-8B-Instruct-2410", "no GGUF"),
    "qwen2": Family("Qwen2, Qwen2.5", "Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen3": Family("Qwen3", "Qwen/Qwen3-0.6B"),
    "smollm3": Family("SmolLM3", "HuggingFaceTB/SmolLM3-3B"),
    "granite": Family("Granite 3", "ibm-granite/granite-3.3-2b-instruct"),
    "olmo2": Family("OLMo 2", "allenai/OLMo-2-0425-1B-Instruct"),
    "phi3": Family(
        "Phi-3, Phi-3.5, Phi-4-mini",
        "microsoft/Phi-4-mini-instruct",
        "q, k, v and gate, up are one map each; beam search does not cross longrope's original length",
    ),
    "gemma2": Family("Gemma 2", "google/gemma-2-2b-it", "attention is not fused on a GPU, for its caps"),
    "gemma3_text": Family(
        "Gemma 3: 270M, 1B, and the text part of larger ones",
        "google/gemma-3-1b-it",
        "`gemma3` is read and saved without images",
    ),
    "mixtral": Family("Mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1", _EXPERTS),
    "qwen3_moe": Family("Qwen3-MoE", "Qwen/Qwen3-30B-A3B", f"experts in every layer; {_EXPERTS}"),
    "bert": Family("BERT, MiniLM", "google-bert/bert-base-uncased"),
    "roberta": Family("RoBERTa", "FacebookAI/roberta-base"),
    "electra": Family("ELECTRA", "google/electra-small-discriminator"),
    "deberta-v2": Family(
        "DeBERTa-v2, DeBERTa-v3",
        "microsoft/deberta-v3-base",
        "Microsoft's are no safetensors: save model and tokenizer with transformers first",
    ),
    "distilbert": Family("DistilBERT", "distilbert/distilbert-base-uncased"),
    "modernbert": Family("ModernBERT", "answerdotai/ModernBERT-base", "q, k, v are one map, and so are gate and up"),
    "mpnet": Family("MPNet, all-mpnet", "sentence-transformers/all-mpnet-base-v2"),
    "xlm-roberta": Family("XLM-R", "FacebookAI/xlm-roberta-base"),
}


def listing() -> list[dict[str, Any]]:
    """Return a line for every model_type: its models, kind, default targets, an example and notes."""
    return [
        {
            "model_type": name,
            "kind": "decoder" if architecture.is_decoder else "encoder",
            "models": FAMILIES[name].models,
            "targets": list(architecture.targets),
            "example": FAMILIES[name].example,
            "notes": FAMILIES[name].notes,
        }
        for name, architecture in ARCHITECTURES.items()
    ]


def markdown() -> str:
    """Return the listing as the table of docs/models.md."""
    header = ("models", "`model_type`", "kind", "default targets", "example", "notes")
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for family in listing():
        targets = " ".join(family["targets"])
        cells = (family["models"], f"`{family['model_type']}`", family["kind"], targets, family["example"], family["notes"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
