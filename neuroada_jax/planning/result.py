"""The result of planning one step of a run: its figures, their JSON and their table."""

import dataclasses
from typing import Any, NamedTuple

from neuroada_jax import console
from neuroada_jax.planning.collectives import Traffic
from neuroada_jax.planning.machines import Machine


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Memory of one device by kind, in bytes.

    Attributes:
      weights: the resident kernels and everything else that is frozen.
      bypass: values, columns and base entries; or the low-rank factors.
      optimizer: the optimiser's state.
      batch: the examples of this device.
      temporaries: activations, gradients and buffers, from the compiled step.
    """

    weights: int
    bypass: int
    optimizer: int
    batch: int
    temporaries: int

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return self.persistent + self.temporaries

    @property
    def persistent(self) -> int:
        """The bytes that stay between two steps, and the batch."""
        return self.weights + self.bypass + self.optimizer + self.batch


class Changes(NamedTuple):
    """Changes to a config that does not fit.

    Attributes:
      first: the field or `section.field=value` to change first; None where the config fits.
      settings: every `section.field=value` that it takes, in order; compiled again to confirm.
      total: bytes of one device with all of them; None where there are none.
    """

    first: str | None = None
    settings: tuple[str, ...] = ()
    total: int | None = None


NO_CHANGES = Changes()
TRAINED = {"neuroada": "bypass: values, columns, base entries", "lora": "low-rank factors A and B"}  # by method


@dataclasses.dataclass(frozen=True)
class Plan:
    """Resources that one step of a run takes on each of several devices; bytes and FLOPs are those of one device.

    Attributes:
      name: of the run.
      model: its path.
      method: "neuroada" or "lora".
      machine: the GPU or CPU that each device is.
      devices: how many share a batch.
      mode: form of the step, as in the config's section `parallel`; pmap is planned as shard_map.
      mesh: devices along the axes data, fsdp and tensor.
      can_share_weights: whether fsdp could split weights that are replicated now.
      dtype: of the base model.
      remat: the rematerialisation policy.
      accumulation: micro batches per step.
      examples: of a batch on this device.
      tokens: of one example.
      labels: of one example; in a plan every position has one.
      trainable: number of trained values.
      parameters: number of parameters of the model.
      memory: bytes by kind.
      flops: of the matrix products of a step.
      bytes_moved: memory traffic that a step cannot avoid: weights once for every matrix product that reads them, kept
        activations written and read, trained values and optimiser state read and written.
      collectives: what the compiled step sends, by kind ("all-reduce", "all-gather", ...).
      adapter_bytes: of the tensors in the adapter's file.
      checkpoint_bytes: of the tensors in a checkpoint.
      compiled_for: the machine, or "cpu" where its compiler is not installed.
      compile_seconds: time of tracing and compiling.
      attention: "cudnn" or "xla".
      notes: sentences on the reliability of the figures.
      changes: how to make the config fit.
    """

    name: str
    model: str
    method: str
    machine: Machine
    devices: int
    mode: str
    mesh: dict[str, int]
    can_share_weights: bool
    dtype: str
    remat: str
    accumulation: int
    examples: int
    tokens: int
    labels: int
    trainable: int
    parameters: int
    memory: Footprint
    flops: int
    bytes_moved: int
    collectives: dict[str, Traffic]
    adapter_bytes: int
    checkpoint_bytes: int
    compiled_for: str
    compile_seconds: float
    attention: str
    notes: tuple[str, ...] = ()
    changes: Changes = NO_CHANGES

    @property
    def total(self) -> int:
        """Bytes that the step needs on each device."""
        return self.memory.total

    @property
    def fits(self) -> bool:
        """Whether `total` fits into the memory of the machine."""
        return self.total <= self.machine.memory

    @property
    def floor_seconds(self) -> float:
        """Roofline bound of a step: the longer of FLOPs and memory traffic at the machine's peak rates; no collectives."""
        return max(self.flops / self.machine.flops[self.dtype], self.bytes_moved / self.machine.bandwidth)

    def to_json(self) -> dict[str, Any]:
        """Return the object that `neuroada plan --json` prints."""
        return {
            "name": self.name,
            "model": self.model,
            "method": self.method,
            "target": self.machine.name,
            "devices": self.devices,
            "mode": self.mode,
            "mesh": self.mesh,
            "can_share_weights": self.can_share_weights,
            "dtype": self.dtype,
            "remat": self.remat,
            "accumulation": self.accumulation,
            "rows": self.examples,
            "tokens_per_row": self.tokens,
            "labelled_per_row": self.labels,
            "trainable": self.trainable,
            "parameters": self.parameters,
            "trainable_percent": 100 * self.trainable / self.parameters,
            "bytes": dataclasses.asdict(self.memory),
            "total_bytes": self.total,
            "device_memory_bytes": self.machine.memory,
            "fits": self.fits,
            "flops": self.flops,
            "bytes_moved": self.bytes_moved,
            "floor_seconds": self.floor_seconds,
            "collectives": {kind: dataclasses.asdict(traffic) for kind, traffic in self.collectives.items()},
            "collective_bytes": sum(traffic.bytes for traffic in self.collectives.values()),
            "adapter_bytes": self.adapter_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "compiled_for": self.compiled_for,
            "compile_seconds": self.compile_seconds,
            "attention": self.attention,
            "notes": list(self.notes),
            "change_first": self.changes.first,
            "changes": list(self.changes.settings),
            "changed_total_bytes": self.changes.total,
        }

    def print_table(self) -> None:
        """Print the figures as a table on standard output, and the notes below it."""
        size, memory, changes = console.size, self.memory, self.changes
        per = " per device" if self.devices > 1 else ""
        batch = f"{self.examples} examples in {self.accumulation} micro batch(es), {self.tokens} tokens each"
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("trained values", f"{self.trainable:,} ({100 * self.trainable / self.parameters:.4f} %)"),
            (f"batch{per}", batch),
            ("labels, assumed", f"{self.labels} per example"),
            (f"weights, {self.dtype}", size(memory.weights)),
            (TRAINED[self.method], size(memory.bypass)),
            ("optimiser", size(memory.optimizer)),
            ("batch", size(memory.batch)),
            (f"activations and temporaries, remat {self.remat}", size(memory.temporaries)),
            (f"total{per}", size(self.total)),
            (f"memory of {self.machine.name}", size(self.machine.memory)),
            ("fits", "yes" if self.fits else "no"),
        ]
        if changes.first:
            rows.append(("change first", changes.first))
        if changes.total is not None:
            rows.append((f"total with {' '.join(changes.settings)}", size(changes.total)))
        rows += [
            ("matrix products", f"{self.flops / 1e12:.3f} TFLOP"),
            ("memory traffic, at least", size(self.bytes_moved)),
            ("floor of a step (roofline)", f"{self.floor_seconds:.4g} s"),
            *(
                (f"{kind} between devices", f"{size(sent.bytes)} in {sent.count}")
                for kind, sent in self.collectives.items()
            ),
            ("adapter on disk", size(self.adapter_bytes)),
            ("checkpoint on disk", size(self.checkpoint_bytes)),
            ("compiled for", f"{self.compiled_for}, in {self.compile_seconds:.0f} s"),
        ]
        console.table(f"one step of {self.name} on {self.devices} x {self.machine.name}", ("", ""), rows)
        for note in self.notes:
            console.say(f"note: {note}")
