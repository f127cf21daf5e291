"""The formats of adapters that the fuzzer mutates, and the class of all formats."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import fuzz_mutations as mutations
import numpy as np
from helpers import write_model

from neuroada_jax.adapters import inspection, native, on_base, peft, peft_lora
from neuroada_jax.adapters.factors import Factors, LoraOptions
from neuroada_jax.pretrained import load

JSON = [mutations.edit_json] * 8 + [mutations.repeat_key] + mutations.BYTES
SAFETENSORS = [mutations.edit_safetensors] * 7 + mutations.BYTES
TARGETS = ("self_attn.k_proj", "mlp.down_proj")


class Format:
    """A format; `mutators` by the suffix of a file's name."""

    mutators: ClassVar[dict[str, list]] = {"": mutations.BYTES}

    def digested(self, folder: Path) -> bool:
        """Return whether a digest covers all of the folder."""
        return False

    def write(self, folder: Path) -> list[Path]:
        raise NotImplementedError

    def read(self, folder: Path):
        raise NotImplementedError

    def mutators_of(self, path: Path):
        return next(found for suffix, found in self.mutators.items() if path.name.endswith(suffix))


class Adapters(Format):
    """The native format, whose digest covers its tensors and its fields."""

    mutators: ClassVar[dict[str, list]] = {
        ".json": JSON,
        ".safetensors": SAFETENSORS,
        ".pt": mutations.BYTES,
        ".npy": mutations.BYTES,
    }

    def write(self, folder):
        fields = {"hidden_size": 16, "intermediate_size": 24, "tie_word_embeddings": False, "num_attention_heads": 2}
        self.base_model = load.load_model(str(write_model(folder / "m", None, vocab_size=32, **fields)))
        rng = np.random.default_rng(0)
        shapes = self.base_model.model.linear_maps()
        columns, values = {}, {}
        for name, (outputs, inputs) in shapes.items():
            if name.endswith(TARGETS):
                chosen = rng.permuted(np.tile(np.arange(inputs), (outputs, 1)), axis=1)[:, :2]
                columns[name], values[name] = np.sort(chosen, axis=1), rng.standard_normal((outputs, 2))
        dense = {"lm_head.weight": rng.standard_normal((32, 16))}
        self.adapter = on_base.assemble(self.base_model, values, columns, native.Selection(2, list(TARGETS)), dense)
        self.save(folder / "a")
        return sorted(path for path in (folder / "a").rglob("*") if path.is_file())

    def digested(self, folder):
        return {"digest", "fields_digest"} <= json.loads((folder / "a" / "adapter.json").read_bytes()).keys()

    def save(self, directory):
        native.write(directory, self.adapter)

    def read(self, folder):
        found = native.read(str(folder / "a"))
        on_base.stack_layers(found, self.base_model)
        on_base.dense_slots(self.base_model.model, found.dense_parameters, found.values)
        inspection.inspect(str(folder / "a"), 1)
        return self.comparable(found), {name: value for name, value in found.metadata.items() if "digest" not in name}

    @staticmethod
    def comparable(found):
        return [
            {name: (leaf.dtype.name, leaf.shape, leaf.tobytes()) for name, leaf in tree.items()}
            for tree in (found.values, found.columns, found.dense_parameters)
        ]


class AdaptersWithoutDigest(Adapters):
    """As the first releases wrote it."""

    def save(self, directory):
        native.write(directory, self.adapter)
        metadata = json.loads((directory / "adapter.json").read_text())
        (directory / "adapter.json").write_text(json.dumps({key: metadata[key] for key in metadata if "digest" not in key}))


class LowRankWithoutDigest(AdaptersWithoutDigest):
    """The native format of low-rank factors."""

    def write(self, folder):
        super().write(folder)
        rng, shapes = np.random.default_rng(1), self.base_model.model.linear_maps()
        normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
        pairs = {name: Factors(normal(2, shapes[name][1]), normal(shapes[name][0], 2)) for name in self.adapter.values}
        selection = native.Selection(None, list(TARGETS), None, lora=LoraOptions(2, 4.0))
        dense = self.adapter.dense_parameters
        self.adapter = on_base.assemble(self.base_model, {}, {}, selection, dense, pairs=pairs)
        shutil.rmtree(folder / "a")
        self.save(folder / "a")
        return sorted(path for path in (folder / "a").rglob("*") if path.is_file())

    @staticmethod
    def comparable(found):
        arrays = {f"{module} {at}": leaf for module, pair in found.factors.items() for at, leaf in enumerate(pair)}
        return {name: (leaf.shape, leaf.tobytes()) for name, leaf in (arrays | found.dense_parameters).items()}


class PeftLora(LowRankWithoutDigest):
    """PEFT's LoRA."""

    def digested(self, folder):
        return False

    def save(self, directory):
        if self.adapter.factors:
            peft_lora.export(self.adapter, directory, self.base_model)
        else:
            super().save(directory)

    def read(self, folder):
        inspection.inspect(str(folder / "a"), 1)
        stored = peft_lora.read(folder / "a", self.base_model.model)
        return self.comparable(native.Adapter({}, {}, {}, stored.dense_parameters, stored.pairs)), stored.options


class SuperTuning(Adapters):
    """PEFT's SuperTuning."""

    kind = peft.Kind.SUPERTUNING

    def digested(self, folder):
        return False

    def save(self, directory):
        peft.export(self.adapter, directory, self.kind, self.base_model)

    def read(self, folder):
        return self.comparable(peft.read(folder / "a", self.base_model.model, self.kind))


class Shira(SuperTuning):
    """PEFT's SHiRA."""

    kind = peft.Kind.SHIRA


class Official(Adapters):
    """The published code's format."""

    def digested(self, folder):
        return False

    def save(self, directory):
        from neuroada_jax.adapters import official

        official.export(self.adapter, directory)

    def read(self, folder):
        from neuroada_jax.adapters import official

        return self.comparable(official.read(folder / "a", self.base_model.model))
