"""The formats that the fuzzer mutates: each writes a sound folder, names the files to mutate, and reads the folder.

`read` returns what was read as a comparable value. `digested` formats have a digest over what is mutated: there an accepted
mutation has to give the same value. In the others a changed number is another sound file.
"""

import gzip
import json
from pathlib import Path
from typing import ClassVar

import fuzz_mutations as mutations
import numpy as np
import optax
import yaml
from data_helpers import CHAT
from fuzz_adapters import (
    JSON,
    SAFETENSORS,
    Adapters,
    AdaptersWithoutDigest,
    Format,
    LowRankWithoutDigest,
    Official,
    PeftLora,
    Shira,
    SuperTuning,
)
from helpers import run_config, write_model, write_rows, write_safetensors
from published_files import WIDE, write_published
from quantised_files import write_bitsandbytes

from neuroada_jax import files, models
from neuroada_jax.core.bypass import Bypass
from neuroada_jax.data.chat_template import ChatTemplate
from neuroada_jax.data.chats import Chat
from neuroada_jax.data.readers import read_file
from neuroada_jax.generation import texts
from neuroada_jax.pretrained import gguf_config, gguf_file, load, prompt_form, quantization, source
from neuroada_jax.pretrained.safetensors_directory import SafetensorsDirectory
from neuroada_jax.pretrained.tokenizer import load_tokenizer
from neuroada_jax.sweeping import choice, grid, group, stack, store
from neuroada_jax.training import checkpoint, config_file, kept_states, results, step, trackers


class Config(Format):
    """config.json and generation_config.json, up to the shapes of all tensors and the check of those that are stored."""

    mutators: ClassVar[dict[str, list]] = {".json": JSON}

    def write(self, folder):
        write_model(folder / "m", None)
        (folder / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "bos_token_id": 0}))
        return [folder / "m" / "config.json"] * 5 + [folder / "m" / "generation_config.json"]

    def read(self, folder):
        config = source.read_config(str(folder / "m"))
        model = models.from_hf_config(config, source.config_dtype("auto", config))
        opened = load.OpenedModel(model, str(folder / "m"), "m")
        return repr(model.config), texts.end_tokens(opened, CHAT)


class Loaded(Config):
    """The same with the weights; tracing takes too long for every case."""

    def read(self, folder):
        opened = load.open_model(str(folder / "m"))
        return sorted(opened.load().digests.items())


class Tokenizer(Format):
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json, up to a text that is encoded and decoded."""

    mutators: ClassVar[dict[str, list]] = {".json": JSON}

    def write(self, folder):
        CHAT.save_pretrained(str(folder))
        special = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        small = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(small))
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        return [folder / names[0]] * 3 + [folder / names[1]] * 3 + [folder / names[2]]

    def read(self, folder):
        tokenizer = load_tokenizer(str(folder))
        ids = tokenizer("a text, 12", add_special_tokens=True)["input_ids"]
        return ids, tokenizer.decode(ids), prompt_form.own_template(tokenizer)


class Templates(Format):
    """A chat template, rendered on a short chat."""

    mutators: ClassVar[dict[str, list]] = {"": [mutations.edit_template]}

    def write(self, folder):
        (folder / "template.jinja").write_text(str(CHAT.chat_template))
        return [folder / "template.jinja"]

    def read(self, folder):
        text = (folder / "template.jinja").read_bytes().decode("utf-8", "surrogatepass")
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        template = ChatTemplate(CHAT, text, {}, "2026-01-31")
        return template.turns(Chat(messages, None, (1,)), (1,), "row 0")


class Safetensors(Format):
    """Two shards and their index."""

    mutators: ClassVar[dict[str, list]] = {".json": JSON, ".safetensors": SAFETENSORS}

    def write(self, folder):
        rng = np.random.default_rng(0)
        tensors = {f"layer.{i}.weight": rng.standard_normal((4, 3), np.float32) for i in range(6)}
        write_safetensors(folder / "m", tensors, shards=2)
        return sorted((folder / "m").iterdir())

    def read(self, folder):
        directory = SafetensorsDirectory(str(folder / "m"))
        return {
            name: (directory.shape(name), directory.read(name).tobytes(), bytes(directory.raw(name)))
            for name in directory.names()
        }


class Gguf(Format):
    """A GGUF file: header, config, tokenizer, tensors."""

    mutators: ClassVar[dict[str, list]] = {
        ".gguf": [mutations.edit_gguf] * 6 + [mutations.gguf_value] * 4 + mutations.BYTES
    }

    def write(self, folder):
        from gguf import GGUFWriter

        writer = GGUFWriter(folder / "m.gguf", "llama")
        numbers = {
            "context_length": 512,
            "embedding_length": 8,
            "block_count": 1,
            "feed_forward_length": 12,
            "head_count": 2,
        }
        numbers |= {
            "head_count_kv": 1,
            "layer_norm_rms_eps": 1e-5,
            "rope_freq_base": 1e4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a"]
        lists = {
            "tokenizer_model": "llama",
            "token_list": tokens,
            "token_scores": [0.0] * 6 + [-1.0, -2.0],
            "token_types": [2, 3, 3] + [1] * 5,
        }
        for method, value in {**numbers, **lists}.items():
            getattr(writer, f"add_{method}")(value)
        rng = np.random.default_rng(0)
        shapes = {
            "token_embd": (8, 8),
            "output_norm": (8,),
            "blk.0.attn_norm": (8,),
            "blk.0.attn_q": (8, 8),
            "blk.0.attn_k": (4, 8),
        }
        shapes |= {"blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8), "blk.0.ffn_norm": (8,), "blk.0.ffn_gate": (12, 8)}
        for name, shape in (shapes | {"blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12)}).items():
            writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [folder / "m.gguf"]

    def read(self, folder):
        path = str(folder / "m.gguf")
        config = gguf_config.read_config(path)
        model = models.from_hf_config(config)
        tensors = gguf_file.GGUFTensors(path)
        read = {name: (tensors.shape(name), tensors.read(name).tobytes()) for name in tensors.names()}
        return repr(model.config), read, load_tokenizer(path)("ab a")["input_ids"]


class Quantised(Format):
    """A directory that bitsandbytes has quantised, up to the entries of all its weights."""

    mutators: ClassVar[dict[str, list]] = {".json": JSON, ".safetensors": SAFETENSORS}

    def write(self, folder):
        directory = write_bitsandbytes(folder / "m", "nf4_nested")
        return [directory / "config.json", *[directory / "model.safetensors"] * 3]

    def read(self, folder):
        path = str(folder / "m")
        opened = load.open_model(path, config_only=True)
        tensors = source.open_tensors(path)
        packs = quantization.formats(opened.model, tensors) if hasattr(tensors, "format_of") else {}
        names = tensors.names()
        return sorted(map(str, packs)), {name: (tensors.shape(name), tensors.read(name).tobytes()) for name in names}


class PublishedFp8(Quantised):
    """A directory whose weights are fp8 with scales by block."""

    form = "fp8 blocks"

    def write(self, folder):
        directory = write_published(folder / "m", self.form, sizes={**WIDE, "num_hidden_layers": 1})
        return [directory / "config.json", *[directory / "model.safetensors"] * 3]


class PublishedGptq(PublishedFp8):
    """A directory that GPTQ has quantised, with the group of each input."""

    form = "gptq with desc_act"


class PublishedAwq(PublishedFp8):
    """A directory that AWQ has quantised."""

    form = "awq"


class RowFiles(Format):
    """Rows in every kind of file."""

    lines: ClassVar[list] = [mutations.edit_json_lines] * 5 + mutations.BYTES
    mutators: ClassVar[dict[str, list]] = {
        ".jsonl": lines,
        ".json": JSON,
        ".gz": [mutations.zip_bomb, *mutations.BYTES],
        ".csv": mutations.BYTES,
        ".tsv": mutations.BYTES,
        ".parquet": [mutations.columns_file],
        ".arrow": [mutations.columns_file],
        ".feather": [mutations.columns_file],
    }

    def write(self, folder):
        import pyarrow
        import pyarrow.feather
        import pyarrow.parquet

        rows = [
            {"prompt": f"after {i},", "completion": "b", "n": i, "messages": [{"role": "user", "content": "é"}]}
            for i in range(5)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        table = pyarrow.Table.from_pylist(rows)
        (folder / "r.jsonl").write_text(lines)
        (folder / "r.json").write_text(json.dumps({"data": rows}))
        (folder / "r.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (folder / "r.csv").write_text('prompt,completion\n"a,\n1",b\nc,d\n')
        (folder / "r.tsv").write_text("prompt\tcompletion\na\tb\nc\td\n")
        pyarrow.parquet.write_table(table, folder / "r.parquet")
        pyarrow.feather.write_feather(table, folder / "r.feather", compression="uncompressed")
        with pyarrow.OSFile(str(folder / "r.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sorted(folder.iterdir())

    def read(self, folder):
        return {
            path.name: [row for _, _, row in read_file(path, "train", None)]
            for path in self.changed or sorted(folder.iterdir())
        }

    changed: ClassVar[list[Path]] = []  # the files that `read` reads; all where there are none


class Yaml(Format):
    """The config of a run."""

    mutators: ClassVar[dict[str, list]] = {".yaml": [mutations.edit_yaml] * 6 + mutations.BYTES}

    def write(self, folder):
        content = run_config(
            folder, folder / "m", folder / "rows.jsonl", evaluation={"sets": [{"name": "s", "data": "x.jsonl"}]}
        )
        (folder / "run.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return [folder / "run.yaml"]

    def read(self, folder):
        return config_file.to_yaml(config_file.load(str(folder / "run.yaml")))


class RunFiles(Format):
    """What a run reads of its own files when it is resumed, and of its results when they are shared."""

    lines: ClassVar[list] = [mutations.edit_json_lines] * 5 + mutations.BYTES
    mutators: ClassVar[dict[str, list]] = {".jsonl": lines, ".json": JSON}

    def write(self, folder):
        steps = [
            {"step": i + 1, "loss": 2.5, "learning_rate": 0.1, "gradient_norm": 1.0, "labels": 3, "tokens": 9}
            for i in range(6)
        ]
        epochs = [{"epoch": i + 1, "step": 3 * i + 3, "metric": "accuracy", "value": 0.5 + i / 10} for i in range(2)]
        for name, lines in (("metrics", steps), ("epochs", epochs)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        score = {
            "value": 0.5,
            "n": 4,
            "interval": [0.1, 0.9],
            "metric": "accuracy",
            "beside": {},
            "beside_intervals": {},
            "empty": 0,
        }
        score |= {"overlap": 0, "parts": {}, "classes": None}
        (folder / "results.json").write_text(json.dumps({"name": "r", "before": {"s": score}, "after": {"s": score}}))
        config = run_config(folder, folder / "m", write_rows(folder / "rows.txt"))
        about = {
            "format": checkpoint.FORMAT,
            "step": 6,
            "arrays": {},
            "config": config,
            "versions": {},
            "before": {"s": score},
        }
        about |= {"examples": "x", "base": None, "dropout_seed": None, "date": None}
        about |= {
            "progress": {"shapes": [[8, 2]], "seconds": 1.0, "warnings": {}},
            "data": {"seed": 0, "epoch": 1, "index": 0},
        }
        saved = folder / "checkpoints" / "6"
        (saved / "state").mkdir(parents=True)
        (saved / "state" / "array").write_bytes(b"array" * 40)
        (saved / checkpoint.ABOUT).write_text(json.dumps(about))
        digests = {name: checkpoint._digest(saved / name) for name in (checkpoint.ABOUT, "state/array")}
        (saved / checkpoint.DIGESTS).write_text(json.dumps(digests))
        self.before = {path: path.read_bytes() for path in folder.glob("*.jsonl")}
        return [folder / "metrics.jsonl", folder / "epochs.jsonl", folder / "results.json", *sorted(saved.glob("*.json"))]

    def read(self, folder):
        log = trackers.JsonLines(folder / "metrics.jsonl", 6)
        log.close()
        kept = kept_states.KeptStates(folder, "epochs", lambda *_: None, 6)
        best = kept.best if any(line["step"] for line in kept.lines) else None
        newest = checkpoint.Checkpoints(folder / "checkpoints").newest
        from neuroada_jax.training import resuming

        history = resuming.history(newest, log.lines)
        scores = resuming.scores_before(newest.about) if newest else None
        found = results.read(folder / "results.json")
        return log.lines, kept.lines, best, files.to_json(history.losses), repr(scores), files.to_json(found)


class SweepFiles(Format):
    """What a sweep reads of its own files when it goes on: records of members, and how far the others have come."""

    mutators: ClassVar[dict[str, list]] = {".json": JSON, ".safetensors": SAFETENSORS}

    def write(self, folder):
        content = run_config(folder, folder / "m", folder / "rows.jsonl", output=str(folder / "out"))
        config = config_file.from_dict(content, "sweep")
        self.store, members = store.Store(config.directory), grid.members(config, {grid.RATE: [0.1, 0.2]}, "grid")
        self.ended, self.begun = members
        values = {"model": {"map": {"values": np.ones((3, 2), np.float32)}}}
        columns = {"model": {"map": {"columns": np.array([[0, 1]] * 3, np.int32)}}}
        self.fresh = stack.fresh(step.initial_state({}, Bypass(values, {}), optax.identity()), config)
        self.fresh = self.fresh._replace(columns=columns)
        course = group.Course([{"step": 1, "value": 0.5}])
        done = group.Progress(2, course, self.fresh, self.fresh.trainable)
        self.store.write_progress(self.begun, done, {"examples": "x", "base": "y"})
        self.store.write_halving({self.ended.digest: {"kept": True, "validation": 0.5}})
        fields = {"fields": self.ended.fields, "cell": self.ended.cell, "seed": self.ended.seed}
        self.store.adapter(self.ended).mkdir(parents=True)
        self.store.write(self.ended, RECORD | fields)
        return [folder / "out" / "halving.json", *sorted((folder / "out" / "members").glob("*/*.*"))]

    def read(self, folder):
        record, found = self.store.record(self.ended), self.store.progress(self.begun, self.fresh)
        cells = choice.cells([record])
        best = choice.best(cells)
        return found, best and choice.best_record(best), self.store.halving()

    def digested(self, folder):
        return self.changed != [] and self.changed[0].suffix == ".json"


RECORD = {
    "validation": 0.5,
    "scores": {"s": {"value": 0.5, "n": 4, "interval": [0.1, 0.9], "metric": "accuracy", "beside": {}}},
    "trained": 6,
    "status": "finished",
    "best_step": 1,
    "diverged_at": None,
    "steps": [{"step": 1, "value": 0.5}],
    "examples": "x",
    "base": "y",
}
FORMATS = {
    "config": Config,
    "loaded": Loaded,
    "tokenizer": Tokenizer,
    "templates": Templates,
    "safetensors": Safetensors,
    "gguf": Gguf,
    "quantised": Quantised,
    "native": Adapters,
    "native-0.1": AdaptersWithoutDigest,
    "supertuning": SuperTuning,
    "shira": Shira,
    "native-lora": LowRankWithoutDigest,
    "peft-lora": PeftLora,
    "official": Official,
    "rows": RowFiles,
    "yaml": Yaml,
    "run": RunFiles,
    "fp8": PublishedFp8,
    "gptq": PublishedGptq,
    "awq": PublishedAwq,
    "sweep": SweepFiles,
}
