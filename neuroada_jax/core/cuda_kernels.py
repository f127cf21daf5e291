"""The gradient of the values by a CUDA kernel of this project: its choice of tiles, and the call.

Letters: T tokens, O neurons, I input connections, k connections per neuron.

    dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]]

cuda/value_gradient.cu has the kernel. A block of up to 1,024 neurons holds all of x for a few tokens, a tile, in shared
memory and gathers there; the next tile is copied meanwhile. Bytes moved, at b bytes per element:

    x in tiles      2 b T I                    read and written by XLA; shared by the linear maps that read the same x
    copies          b T I ceil(O / 1024)       for each group of up to 20 connections; from the L2 cache, as all blocks go
                                               through the tokens in the same order
    gathers         b T O k                    from shared memory, at 1 to 3 times the time, for conflicts of banks
    dy              b T O ceil(k / 20)
    partial sums    8 S O k                    for S splits of the tokens, written and summed in float32

The kernel is PTX, built by `make ptx` and part of the package, so that nobody needs a compiler. It is launched by
`triton_kernel_call_ffi`, the entry that JAX's CUDA plugin has for kernels of Triton: it takes any PTX.
"""

import functools
import importlib.resources
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from neuroada_jax.core import platform

CONNECTIONS = (4, 8, 12, 16, 20)  # of a thread; more are groups of equal size
THREADS = 1024  # of a block, and of a multiprocessor: a thread takes up to 64 of its 65,536 registers
MAX_INPUTS = 1 << 16  # a column is kept in 16 bits
_MAX_TOKENS, _MAX_OUTPUTS = (1 << 31) - 64, 1 << 28  # indices are ints; a tile's offset has 64 bits, offsets inside it 32
_MAX_GRID = 65535  # along the second and third axis
_RESERVED = 1024  # bytes of shared memory that CUDA takes of every block
_NAMES = {"float32": "float32", "bfloat16": "bfloat16"}


class Card(NamedTuple):
    """Facts about a GPU on which the tiles depend.

    Attributes:
      capability: CUDA compute capability, 90 for 9.0.
      shared: bytes of shared memory that a block may have.
      cores: number of streaming multiprocessors.
    """

    capability: int
    shared: int
    cores: int


class Launch(NamedTuple):
    """A launch of the kernel.

    Attributes:
      entry: of the PTX.
      grid: blocks of neurons, groups of connections, splits of the tokens.
      threads: of a block.
      shared: bytes of a block: two stages.
      tokens_per_tile: tokens of a tile.
      inputs: I, rounded up to a whole number of 16 bytes.
      tiles: of all tokens.
      scalars: arguments after the arrays.
    """

    entry: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    tokens_per_tile: int
    inputs: int
    tiles: int
    scalars: tuple[int, ...]


# From the table of compute capabilities in NVIDIA's CUDA programming guide; 99 KB is what every card from 8.0 on has.
_SHARED = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448, 110: 232448}
_SHARED_EVERYWHERE = 101376


def card_of(device: Any) -> Card | None:
    """Return the facts about a device of JAX, or None where it is no CUDA GPU."""
    found = None if device is None else platform.capability(device)
    if found is None:
        return None
    capability = 10 * found[0] + found[1]
    return Card(capability, _SHARED.get(capability, _SHARED_EVERYWHERE), getattr(device, "core_count", 128))


def why_not(inputs: int, dtype: Any = None) -> str | None:
    """Return why the kernel cannot be used for the device that is traced for, or None where it can.

    Args:
      inputs: I.
      dtype: of x; None to leave that open.
    """
    if not _has_vehicle():
        return "this JAX has no triton_kernel_call_ffi, of jaxlib.gpu_triton with a CUDA plugin"
    card = card_of(platform.device())
    if card is None:
        return "the device is not a CUDA GPU"
    if card.capability < 80:
        major, minor = divmod(card.capability, 10)
        return f"compute capability {major}.{minor}, expected 8.0 or later"
    if dtype is not None and jnp.dtype(dtype).name not in _NAMES:
        return f"x is {jnp.dtype(dtype).name}, expected {' or '.join(_NAMES)}"
    if inputs > MAX_INPUTS:
        return f"{inputs} inputs, expected at most {MAX_INPUTS}"
    return None


@functools.cache
def _has_vehicle() -> bool:
    try:
        from jaxlib import gpu_triton
    except ImportError:
        return False
    names = ("TritonKernel", "TritonKernelCall", "create_array_parameter", "create_scalar_parameter")
    return all(hasattr(gpu_triton, name) for name in names) and hasattr(gpu_triton.TritonKernelCall, "to_proto")


def plan(tokens: int, outputs: int, inputs: int, k: int, dtype: Any, card: Card) -> Launch:
    """Return the launch for sizes of at least 1.

    It takes the widest vectors of which two stages fit into shared memory, and slices of the inputs where 8 bytes for each
    do not.
    """
    name = jnp.dtype(dtype).name
    wide = 2 * 16 * inputs <= card.shared
    vector = 16 if wide else 8
    inputs += 0 if wide else inputs % 2
    slices = _cdiv(2 * vector * inputs, card.shared)
    slice_inputs = inputs if slices == 1 else 2 * _cdiv(_cdiv(inputs, slices), 2)
    tokens_per_tile = vector // jnp.dtype(dtype).itemsize
    form = "sliced" if slices > 1 else f"{tokens_per_tile}_tokens"

    groups = _cdiv(k, CONNECTIONS[-1])
    connections = _cdiv(k, groups)
    capacity = next(capacity for capacity in CONNECTIONS if capacity >= connections)
    groups = _cdiv(k, connections)

    blocks = _cdiv(outputs, THREADS)
    threads = 32 * _cdiv(_cdiv(outputs, blocks), 32)
    blocks = _cdiv(outputs, threads)
    shared = 2 * vector * slice_inputs
    tiles = _cdiv(tokens, tokens_per_tile)
    at_once = card.cores * max(1, min(THREADS // threads, (card.shared + _RESERVED) // (shared + _RESERVED)))
    tiles_per_split = _tiles_per_split(tiles, blocks * groups, at_once)
    return Launch(
        entry=f"value_gradient_{_NAMES[name]}_{form}_{capacity}",
        grid=(blocks, groups, _cdiv(tiles, tiles_per_split)),
        threads=threads,
        shared=shared,
        tokens_per_tile=tokens_per_tile,
        inputs=inputs,
        tiles=tiles,
        scalars=(tokens, outputs, inputs, k, connections, tiles, tiles_per_split, slice_inputs),
    )


def _tiles_per_split(tiles: int, blocks: int, at_once: int) -> int:
    """Return how many tiles a block goes through, for the shortest time of all waves of blocks.

    A block takes the time of its tiles and about one more, in which its first tile comes and its sums are written.
    """
    most = min(tiles, _MAX_GRID, max(1, 4 * at_once // blocks))
    candidates = {_cdiv(tiles, splits) for splits in range(1, most + 1)}
    return min(sorted(candidates, reverse=True), key=lambda each: _cdiv(blocks * _cdiv(tiles, each), at_once) * (each + 1))


def cuda_gradient(
    dy: Float[Array, "T O"], x: Float[Array, "T I"], columns: Int[Array, "O k"], *, card: Card
) -> Float[Array, "O k"]:
    """Return dvalues[o, j] = sum_t dy[t, o] x[t, columns[o, j]] in float32.

    Under `vmap` it is called for one example after another.

    Args:
      dy: gradient of the output, (T, O), in the dtype of x.
      x: input of the layer, (T, I), where `why_not` has nothing against it.
      columns: int32 (O, k), every entry in [0, I): nothing checks the bounds of the loads.
      card: that the program is for.

    Raises:
      ValueError: T or O is too large for the kernel's integers.
    """
    (tokens, inputs), (outputs, k) = x.shape, columns.shape
    if tokens > _MAX_TOKENS or outputs > _MAX_OUTPUTS:
        raise ValueError(
            f"CUDA kernel of the value gradient: {tokens} tokens and {outputs} neurons, expected at most {_MAX_TOKENS} and "
            f"{_MAX_OUTPUTS}; use another GradientAlgorithm"
        )
    if not min(tokens, outputs, k):
        return jnp.zeros(columns.shape, jnp.float32)
    launch = plan(tokens, outputs, inputs, k, x.dtype, card)
    padding = (launch.tiles * launch.tokens_per_tile - tokens, launch.inputs - inputs)
    x = jnp.pad(x, [(0, size) for size in padding]) if any(padding) else x
    x_tiles = x.reshape(launch.tiles, launch.tokens_per_tile, launch.inputs).transpose(0, 2, 1)

    shape = (launch.grid[2], outputs, k)
    operands, sums = _varying_alike((x_tiles, dy, columns), jax.ShapeDtypeStruct(shape, jnp.float32))
    call = jax.ffi.ffi_call("triton_kernel_call_ffi", sums, vmap_method="sequential")
    return jnp.sum(call(*operands, opaque=_opaque(launch, card.capability)), axis=0)


def _varying_alike(operands: tuple[Array, ...], result: jax.ShapeDtypeStruct) -> tuple[list[Array], jax.ShapeDtypeStruct]:
    """Let operands and result vary over the same axes of the mesh, which `ffi_call` leaves to its caller in `shard_map`."""
    kinds = [jax.typeof(operand).manual_axis_type for operand in operands]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    if not varying:
        return list(operands), result
    alike = [
        lax.pcast(operand, tuple(varying - kind.varying), to="varying") if varying - kind.varying else operand
        for operand, kind in zip(operands, kinds, strict=True)
    ]
    first = jax.typeof(alike[0])
    mesh = NamedSharding(first.sharding.mesh, PartitionSpec())
    return alike, result.update(sharding=mesh, manual_axis_type=first.manual_axis_type)


def _opaque(launch: Launch, capability: int) -> bytes:
    """Return the launch as the entry takes it: a compressed message with the PTX."""
    from jaxlib import gpu_triton

    kernel = gpu_triton.TritonKernel(
        launch.entry, launch.threads // 32, 1, launch.shared, ptx_of(launch.entry), "", capability
    )
    arrays = [gpu_triton.create_array_parameter(0, 16) for _ in range(4)]
    scalars = [gpu_triton.create_scalar_parameter(value, "i32") for value in launch.scalars]
    call = gpu_triton.TritonKernelCall(kernel, *launch.grid, arrays + scalars)
    return zlib.compress(call.to_proto(launch.entry, b""))


@functools.cache
def ptx_of(entry: str) -> str:
    """Return the PTX of one entry: the driver's assembler then has one kernel to compile instead of all."""
    text = (importlib.resources.files("neuroada_jax.core") / "cuda" / "value_gradient.ptx").read_text(encoding="ascii")
    header = text[: text.index(".visible .entry")]
    begin = text.index(f".visible .entry {entry}(")
    return header + text[begin : text.index("\n}", begin) + 3]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
