"""Machines that a run can be planned for: figures from their data sheets, and compilers for them."""

import dataclasses
import importlib.util
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from neuroada_jax.core import platform
from neuroada_jax.errors import UserError

GB = 10**9


@dataclasses.dataclass(frozen=True)
class Machine:
    """One GPU, or this computer's CPU, with the figures that a plan and the compiler need.

    Attributes:
      name: value of `plan --machine`.
      memory: bytes. For a GPU the data sheet's GB as 10^9: the card has about 5 % more, which the driver, the CUDA context
        and libraries take.
      bandwidth: of its memory, bytes per second.
      flops: dense matrix products, FLOP per second, by the dtype of the weights. For float32 on a GPU the rate of TF32,
        which JAX uses for float32 products there by default.
      gpu: further facts for XLA; None for a CPU.
    """

    name: str
    memory: int
    bandwidth: float
    flops: dict[str, float]
    gpu: "GPU | None" = None


@dataclasses.dataclass(frozen=True)
class GPU:
    """Facts about a GPU on which the choices of XLA's compiler depend.

    Attributes:
      model: name that the driver reports.
      capability: CUDA compute capability, major and minor.
      cores: number of streaming multiprocessors.
      cache: bytes of the L2 cache.
      clock: boost clock in GHz.
    """

    model: str
    capability: tuple[int, int]
    cores: int
    cache: int
    clock: float

    @property
    def architecture(self) -> str:
        """The instruction set, such as sm_89; sm_90a for Hopper, with the extensions of that architecture."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major == 9 else ''}"


# Per multiprocessor, from the tables of compute capabilities in NVIDIA's CUDA programming guide: float32 units, threads,
# bytes of shared memory, and the most of these that a block may request.
_PER_CORE = {
    (8, 0): (64, 2048, 167936, 166912),
    (8, 9): (128, 1536, 102400, 101376),
    (9, 0): (128, 2048, 233472, 232448),
}

# From NVIDIA's data sheets of the SXM boards of H100, H200 and A100 (80 GB) and of the L40S, and for the RTX 4090 from its
# white paper on the Ada architecture. Rates are those without sparsity.
_HOPPER = {"bfloat16": 989.4e12, "float32": 494.7e12}
_GPUS = [
    Machine("h100", 80 * GB, 3.35e12, _HOPPER, GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 << 20, 1.98)),
    Machine("h200", 141 * GB, 4.8e12, _HOPPER, GPU("NVIDIA H200", (9, 0), 132, 50 << 20, 1.98)),
    Machine(
        "a100",
        80 * GB,
        2.039e12,
        {"bfloat16": 312e12, "float32": 156e12},
        GPU("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 << 20, 1.41),
    ),
    Machine(
        "l40s", 48 * GB, 0.864e12, {"bfloat16": 362e12, "float32": 183e12}, GPU("NVIDIA L40S", (8, 9), 142, 96 << 20, 2.52)
    ),
    Machine(
        "rtx4090",
        24 * GB,
        1.008e12,
        {"bfloat16": 165.2e12, "float32": 82.6e12},
        GPU("NVIDIA GeForce RTX 4090", (8, 9), 128, 72 << 20, 2.52),
    ),
]
_BY_NAME = {machine.name: machine for machine in _GPUS}
NAMES = ("cpu", *_BY_NAME)


def find(name: str, dtype: Any) -> Machine:
    """Return the machine of a name; "cpu" is this computer, whose speed with `dtype` is measured by the call.

    Raises:
      UserError: an unknown name; lists the known ones.
    """
    if name == "cpu":
        return this_machine(dtype)
    if name not in _BY_NAME:
        raise UserError(f"--machine: expected one of {', '.join(NAMES)}, found {name!r}")
    return _BY_NAME[name]


def of_kind(name: str) -> Machine | None:
    """Return the GPU whose driver reports this name; None where it is not known."""
    return next((machine for machine in _GPUS if machine.gpu and machine.gpu.model == name), None)


def this_machine(dtype: Any) -> Machine:
    """Return this computer's CPU, its speed taken from the best of three short timings of a matrix product and a copy."""
    cpu = jax.devices("cpu")[0]
    size, long = 1024, 1 << 26
    with jax.default_device(cpu):
        line = jnp.ones(long, jnp.float32)
        products = _best(jax.jit(lambda x: x @ x), jnp.ones((size, size), dtype))
        copies = _best(jax.jit(lambda x: x + 1), line)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine("cpu", memory, 2 * line.nbytes / copies, {jnp.dtype(dtype).name: 2 * size**3 / products})


def _best(work: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Return the seconds of the fastest of three calls, after one that compiles."""
    work(x).block_until_ready()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        work(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def xla_description(machine: Machine) -> str:
    """Return a GPU as XLA's GpuTargetConfigProto in text form, for `jax.experimental.topologies`."""
    assert machine.gpu
    units, threads, shared, shared_by_block = _PER_CORE[machine.gpu.capability]
    major, minor = machine.gpu.capability
    features = "ACCELERATED_FEATURES" if machine.gpu.architecture.endswith("a") else "NONE"
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
          shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_by_block}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          core_count: {machine.gpu.cores} fpus_per_core: {units} clock_rate_ghz: {machine.gpu.clock}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          l2_cache_size: {machine.gpu.cache} memory_bandwidth: {machine.bandwidth:.0f}
          device_memory_size: {machine.memory}
          cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
        }}
        platform_name: "CUDA" device_description_str: "{machine.gpu.model}"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }} runtime_version {{ major: 12 minor: 9 patch: 0 }}
        """


class Compiler(NamedTuple):
    """A compiler for real or described devices.

    Attributes:
      devices: of this process, or of a described topology.
      platform: "cpu" or "gpu".
      flash_attention: whether cuDNN is installed, so that attention can be compiled as it will run.
      name: of the machine that it compiles for.
      options: compiler options of XLA.
    """

    devices: tuple[Any, ...]
    platform: str
    flash_attention: bool
    name: str
    options: dict[str, Any] | None = None

    def trace(self, function: Any, *arguments: Any) -> Any:
        """Return the trace of a jitted function on trees of shapes, as it would be on the devices.

        Shapes without a sharding are placed on the first device. Call it once for each jitted function: JAX may return a
        cached trace for the second call, even with another compiler.
        """
        first = self.devices[0]
        place = jax.sharding.SingleDeviceSharding(first)
        with platform.tracing_for(self.platform, flash_attention=self.flash_attention, device=first):
            return function.trace(
                *jax.tree.map(lambda leaf: leaf if leaf.sharding else leaf.update(sharding=place), arguments)
            )

    def compile(self, traced: Any) -> Any:
        """Compile a trace.

        Raises:
          jax.errors.JaxRuntimeError: XLA cannot compile it.
        """
        return traced.lower().compile(self.options)


def temporaries(compiled: Any) -> int:
    """Return the bytes that each device needs beyond the arguments: temporaries, and results that alias no argument."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


# The code never runs, so LLVM's optimisations, most of the compile time, are switched off.
_FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_GPUS_OF_A_HOST = 8


def compiler_for(machine: Machine, count: int = 1) -> Compiler:
    """Return the compiler for `count` machines of one kind; without JAX's CUDA plugin, that of the CPU.

    Raises:
      UserError: more CPU devices than JAX was started with.
    """
    if machine.gpu is not None:
        on_host = math.gcd(count, _GPUS_OF_A_HOST)
        options = {"target_config": xla_description(machine), "topology": f"1x{count // on_host}x{on_host}"}
        try:
            described = topologies.get_topology_desc(platform="cuda", **options)
        except NotImplementedError:  # no plugin
            pass
        else:
            cudnn = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn")
            name = f"{machine.name} ({machine.gpu.architecture})"
            return Compiler(tuple(described.devices), "gpu", cudnn is not None, name, platform.GPU_OPTIONS)
    cpus = jax.devices("cpu")
    if count > len(cpus):
        raise UserError(
            f"--devices: {count} need as many virtual CPU devices, found {len(cpus)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return Compiler(tuple(cpus[:count]), "cpu", False, "cpu", _FAST_COMPILE)
