"""Compile LLaMA-7B's programs for GPUs, none of which is needed, and check what XLA made of them.

    make check-gpu        python -m benchmarks.check_gpu [--machines h100 rtx4090]

A program that is right on a CPU may be another one on a GPU: XLA chooses other products, drops pairs of conversions,
copies weights, or keeps what should be recomputed. Each row of the table is one fact about a compiled program, with its
bound; the exit code is 1 where one does not hold. Whoever finds another kind of fault adds a row for it; whoever makes a
program smaller lowers its bound. What does not depend on the depth is read in `LAYERS` layers of the model's width.

    copies       arrays as large as a layer's smallest kernel that are copied, sliced, joined or transposed;
                 while decoding, also arrays as large as a layer's key/value cache
    rounding     pairs of conversions that stand for rounding in the program as written, which XLA drops
    dots         products of weight size whose operands are not bfloat16
    gradient     calls of the GPU kernel for the gradient of the values
    attention    calls of cuDNN's fused attention
    bytes        a step's arguments and temporaries
    temporaries  while decoding from codes of nf4 and GPTQ: less than a tenth of a dequantised kernel of the smallest map
    sent         what eight GPUs send to each other in a step
    compile      processor seconds of tracing and compiling a step in full depth, here
"""

import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import common, hlo
from benchmarks.common import Column
from benchmarks.methods import MODELS
from benchmarks.plans import DTYPE, installed_compiler
from neuroada_jax import console, models
from neuroada_jax.core import platform
from neuroada_jax.core.value_gradient import GradientAlgorithm, value_gradient
from neuroada_jax.generation import generate
from neuroada_jax.generation.sampling import GREEDY
from neuroada_jax.models import unrolled
from neuroada_jax.planning import plan, shapes
from neuroada_jax.planning.collectives import Traffic, collectives
from neuroada_jax.planning.machines import Compiler, compiler_for, find, temporaries
from neuroada_jax.pretrained import quantization
from neuroada_jax.training import config_file, parallel
from neuroada_jax.training.config import ParallelSection, RunConfig

LAYERS, FULL_DEPTH, LENGTH = 4, 32, 512
WEIGHT = 4096 * 4096  # entries of LLaMA-7B's smallest kernel
# Custom-call targets of the GPU kernels for the gradient of the values: Triton's, and PTX of our own.
GRADIENT_CALLS = ("__gpu$xla.gpu.triton", "triton_kernel_call_ffi")
ATTENTION_CALLS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
COLUMNS = (
    Column("check", "check"),
    Column("target", "machine"),
    Column("found", "found", lambda found: _written(found)),
    Column("bound", "bound", lambda bound: _written(bound)),
    Column("", "ok", lambda ok: "" if ok else "FAILS"),
)


class Setting(NamedTuple):
    """A training step, to be compiled."""

    k: int = 1
    remat: str = "none"
    rows: int = 2  # of each device
    layers: int = LAYERS
    devices: int = 1
    fsdp: int = 1
    tensor: int = 1
    held: str = "none"  # of the base model: model.quantization
    model: str = "llama-7b"

    def __str__(self) -> str:
        shape = f"k = {self.k}, remat {self.remat}, {self.rows} x {LENGTH}" + f", {self.held}" * (self.held != "none")
        shared = "".join(f", {name} {size}" for name, size in (("fsdp", self.fsdp), ("tensor", self.tensor)) if size > 1)
        mode = f", {self.devices} devices{shared or ', shard_map'}" if self.devices > 1 else ""
        model = f", {self.model}" if self.model != "llama-7b" else ""
        return f"{shape}{mode}{model}" + (f", {self.layers} layers" if self.layers != LAYERS else "")


TRAIN = {
    "h100": (Setting(1), Setting(1, "full"), Setting(20), Setting(20, "full")),
    "rtx4090": (Setting(1), Setting(20, "full")),
}
MACHINES = tuple(TRAIN)
DECODE = (1, 8)  # sequences
# Bytes of LLaMA-7B's step on an H100, a little above those at the time when they were set.
BYTES = {
    Setting(1): 2.84e9,
    Setting(1, "full"): 2.47e9,
    Setting(20): 2.92e9,
    Setting(20, "full"): 2.55e9,
    Setting(1, "full", 4, layers=FULL_DEPTH): 14.5e9,
    Setting(1, "full", 16, layers=FULL_DEPTH): 17.0e9,
    Setting(1, "full", layers=FULL_DEPTH, held="nf4"): 4.9e9,
    Setting(1, "full", held="nf4", model="qwen3-30b-a3b"): 3.2e9,  # the rows of experts of one layer at a time
    Setting(1, "full", devices=8): 2.55e9,
    Setting(1, "full", devices=8, fsdp=8): 0.95e9,
    Setting(1, "full", devices=8, tensor=8): 0.71e9,
}
COMPILE_SECONDS = 90  # it was 22 on a quiet machine, 48 beside other work
# Collectives of eight GPUs: data parallelism sums the gradient once; fsdp gathers each layer's weights in the forward and
# in the backward pass, and never all of them at once, which the bytes of a device would show.
SENT = {
    Setting(1, "full", devices=8): {"all-reduce": Traffic(1, 700_000)},
    Setting(1, "full", devices=8, fsdp=8): {
        "all-gather": Traffic(62, 3_770_000_000),
        "all-reduce": Traffic(3, 64),
        "reduce-scatter": Traffic(1, 700_000),
    },
    Setting(1, "full", devices=8, tensor=8): {
        "all-gather": Traffic(88, 3_130_000_000),
        "all-reduce": Traffic(84, 270_000_000),
        "reduce-scatter": Traffic(45, 1_400_000_000),
    },
}


class Fact(NamedTuple):
    """What was found in a program. `bound` is the most that holds or, where `exact`, all that holds."""

    check: str
    found: Any
    bound: Any
    exact: bool = False

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return bool(self.found == self.bound if self.exact else self.found <= self.bound)


class Program(NamedTuple):
    """A compiled training step.

    Attributes:
      text: of the optimised program.
      lowered: of the program as written, before XLA's passes.
      bytes: of its arguments and temporaries.
      seconds: processor time of tracing and compiling.
    """

    text: str
    lowered: str
    bytes: int
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table and save check_gpu.json; return 1 where a check fails."""
    parser = common.parser(__doc__, repeats=None)
    parser.add_argument("--machines", nargs="+", default=MACHINES, choices=MACHINES, help="to compile for")
    settings = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # a GPU's compiler needs no GPU, and arrays would take its memory

    rows: list[common.Row] = []
    with console.bar("compiling", len(settings.machines)) as shown:
        for done, machine in enumerate(settings.machines):
            compiler = installed_compiler(machine)
            shown.update(done, len(settings.machines), compiler.name)
            for fact in _facts(machine, compiler):
                row = {"check": fact.check, "machine": compiler.name, "found": fact.found, "bound": fact.bound}
                rows.append(row | {"ok": fact.ok})
        shown.update(len(settings.machines), len(settings.machines))
    common.report("check_gpu", f"LLaMA-7B, {DTYPE}", COLUMNS, rows, settings)
    failed = [row for row in rows if not row["ok"]]
    for row in failed:
        console.say(f"{row['machine']}: {row['check']}: expected {_written(row['bound'])}, found {_written(row['found'])}")
    return 1 if failed else 0


def _written(value: Any) -> str:
    """Return a number of bytes as such, and everything else as text."""
    return console.size(value) if isinstance(value, int | float) and value >= 10**6 else str(value)


def _facts(machine: str, compiler: Compiler) -> Iterator[Fact]:
    """Yield the facts about all programs for a machine; those of several devices and full depth for an H100 only."""
    is_first = machine == MACHINES[0]
    for setting in dict.fromkeys([*TRAIN[machine], *(BYTES if is_first else ())]):
        program = compiled_step(setting, machine)
        if setting in TRAIN[machine]:
            yield from train_facts(setting, program)
        if is_first and setting in BYTES:
            yield Fact(f"bytes: {setting}", program.bytes, BYTES[setting])
        if setting in SENT:
            yield from sent_facts(setting, program.text, SENT[setting])
        if setting.layers == FULL_DEPTH and setting.held == "none":
            yield Fact(f"compile: {setting}", round(program.seconds), COMPILE_SECONDS)
    for rows in DECODE:
        yield from decode_facts(rows, compiler)
    for held in ("nf4", "stored:int4_128"):
        yield codes_fact(held, compiler)
    # Compiled ahead of time, XLA takes products of its own; a card may choose cuBLAS, which reads no slice in place.
    compiler = compiler._replace(options={**(compiler.options or {}), "xla_gpu_enable_triton_gemm": False})
    yield from decode_facts(DECODE[0], compiler, ", cuBLAS")
    yield cuda_kernel_fact(compiler)
    setting = TRAIN[machine][0]
    yield _none(f"copies: {setting}, cuBLAS", hlo.copies(compiled_step(setting, machine, compiler).text, WEIGHT))


def train_facts(setting: Setting, program: Program) -> Iterator[Fact]:
    """Yield what the text of a training step says."""
    yield _none(f"copies: {setting}", hlo.copies(program.text, WEIGHT))
    yield Fact(f"rounding: {setting}", hlo.lost_rounding(program.lowered), 0)
    kept = not hlo.reduced_precision(program.lowered) or hlo.reduced_precision(program.text)
    yield Fact(f"rounding of the weights: {setting}", "kept" if kept else "dropped", "kept", True)
    yield _none(f"dots: {setting}", hlo.wide_dots(program.text, WEIGHT))
    calls = hlo.custom_calls(program.text)
    kernel = sum(count for target, count in calls.items() if target in GRADIENT_CALLS)
    yield Fact(f"gradient: {setting}", "GPU kernel" if kernel else "XLA", "GPU kernel" if setting.k > 1 else "XLA", True)
    attention = all(calls.get(name, 0) for name in ATTENTION_CALLS)
    yield Fact(f"attention: {setting}", "cuDNN" if attention else "XLA", "cuDNN", True)


def cuda_kernel_fact(compiler: Compiler) -> Fact:
    """Return how often the CUDA kernel, which no step takes by default, is called for one map when it is named."""
    tokens, outputs, inputs, k = 4 * LENGTH, 11008, 4096, 20
    activations = [jax.ShapeDtypeStruct((tokens, width), DTYPE) for width in (outputs, inputs)]
    gradient = jax.jit(functools.partial(value_gradient, algorithm=GradientAlgorithm.CUDA))
    traced = compiler.trace(gradient, *activations, jax.ShapeDtypeStruct((outputs, k), jnp.int32))
    calls = hlo.custom_calls(compiler.compile(traced).as_text()).get(GRADIENT_CALLS[1], 0)
    return Fact(f"gradient: the CUDA kernel, {outputs} x {inputs}, k = {k}", calls, 1, True)


def decode_facts(rows: int, compiler: Compiler, products: str = "") -> Iterator[Fact]:
    """Yield what the compiled decoding of `rows` sequences says."""
    slots = 256
    config, compiled = _decoding(rows, slots, compiler)
    text = compiled.as_text()
    cache = rows * config.num_kv_heads * slots * config.head_dim
    yield _none(f"copies: decoding, batch {rows}{products}", hlo.copies(text, min(WEIGHT, cache)))
    yield _none(f"dots: decoding, batch {rows}{products}", hlo.wide_dots(text, WEIGHT))


def codes_fact(held: str, compiler: Compiler) -> Fact:
    """Return the temporaries of decoding one sequence from codes."""
    _, compiled = _decoding(1, 256, compiler, held)
    return Fact(f"temporaries: decoding, batch 1, {held}", temporaries(compiled), WEIGHT * 2 // 10)


def _decoding(rows: int, slots: int, compiler: Compiler, held: str = "none") -> tuple[Any, Any]:
    """Return the config of `LAYERS` layers, and the compiled decoding of `rows` sequences with it."""
    prompt = 128
    model = models.from_hf_config(MODELS["llama-7b"] | {"num_hidden_layers": LAYERS}, DTYPE)._replace(quantization=held)
    module = model.module()
    integer: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    options: dict[str, Any] = {"decoding": GREEDY, "eos_ids": ()}
    prompts = generate.Prompts(integer((rows, prompt)), integer((rows,)), integer((rows,)))
    with platform.tracing_for(compiler.platform, flash_attention=compiler.flash_attention):
        params = quantization.abstract_params(model, quantization.formats(model))
        params = unrolled.apart(params, model.layers_path)
        start = functools.partial(generate._start, module, slots=slots, **options)
        state = jax.eval_shape(start, params, prompts, jax.ShapeDtypeStruct((), jnp.uint32))
    run = jax.jit(
        lambda params, state, until: generate._continue(module, params, state, until, **options), donate_argnums=1
    )
    return model.config, compiler.compile(compiler.trace(run, params, state, integer(())))


def sent_facts(setting: Setting, text: str, bounds: dict[str, Traffic]) -> Iterator[Fact]:
    """Yield what the devices send in a step: the kinds exactly, at most so many collectives and bytes of each."""
    found = collectives(text)
    yield Fact(f"sent: {setting}", ", ".join(found), ", ".join(bounds), True)
    for kind, traffic in found.items():
        bound = bounds.get(kind, Traffic())
        yield Fact(f"sent: {setting}: {kind}", traffic.count, bound.count)
        yield Fact(f"sent: {setting}: {kind}, bytes", traffic.bytes, bound.bytes)


def _none(check: str, found: Any) -> Fact:
    return Fact(check, ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "none", "none", True)


def compiled_step(setting: Setting, machine: str, compiler: Compiler | None = None) -> Program:
    """Compile a run's step as `neuroada plan` does, by default with the machine's compiler."""
    compiler = compiler or compiler_for(find(machine, DTYPE), setting.devices)
    with tempfile.TemporaryDirectory() as folder:
        content = MODELS[setting.model] | {"num_hidden_layers": setting.layers}
        (Path(folder) / "config.json").write_text(json.dumps(content))
        config = _config(setting, folder)
        began = time.process_time()
        section = ParallelSection(devices=setting.devices, fsdp=setting.fsdp, tensor=setting.tensor)
        mode = parallel.resolve(section, compiler.devices)
        made = plan._compile(config, shapes.abstract_run(config), mode, compiler)
        seconds = time.process_time() - began
    size = made.compiled.memory_analysis().argument_size_in_bytes + temporaries(made.compiled)
    return Program(made.compiled.as_text(), made.local.lower().as_text(), size, seconds)


def _config(setting: Setting, folder: str) -> RunConfig:
    content = {
        "name": "check",
        "model": {"path": folder, "dtype": DTYPE, "quantization": setting.held},
        "bypass": {"k": setting.k},
        "data": {"train": "none", "max_length": LENGTH},
        "optimizer": {"learning_rate": 8e-3},
        "training": {"steps": 1, "batch_size": setting.rows * setting.devices, "remat": setting.remat},
        "parallel": {"fsdp": setting.fsdp, "tensor": setting.tensor},
    }
    return config_file.from_dict(content, "check_gpu")


if __name__ == "__main__":
    sys.exit(main())
