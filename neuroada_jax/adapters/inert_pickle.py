"""A dict of integer tensors out of a pickled .npy file, without unpickling it.

`np.save` of a dict writes a pickle, and a pickle is a program that names functions and calls them. Here the program is
taken apart by `pickletools`, which executes nothing, and a small interpreter builds its data. It knows the instructions
that such a file has, and the names in `_CALLS` are all that it can call: each stands for a function of this file that
checks what it is given. `pickle.Unpickler` with a restricted `find_class` would be shorter, but it lets a file set
attributes of whatever that function returns, and reserve memory for as many notes as the file says that it will take.
"""

import io
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neuroada_jax.errors import UserError


class Refused(Exception):
    """The pickle does what a saved dict of tensors does not do."""


class _Name(NamedTuple):
    """A global that the pickle names; looked up in `_CALLS` when it is called, and nowhere else."""

    name: str


class _Reference(NamedTuple):
    """A storage that PyTorch keeps behind the pickle: its kind, its key and its number of elements."""

    kind: str
    key: str
    size: int


class _Opaque:
    """An object that is built and then told its state: NumPy's array around the dict, and that array's dtype."""

    state: Any = None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The content of a .npy file that `np.save` wrote from a dict of int64 tensors.

    Args:
      path: the file.

    Returns: name -> int64 array, each no larger than the bytes that the file has for it.

    Raises:
      UserError: the file cannot be read, or holds anything else.
    """
    try:
        stream = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _content(stream)
    except Refused as refusal:
        raise UserError(f"{path}: refused, since {refusal}; nothing in it was run") from refusal
    except Exception as error:  # whatever a garbled program makes of its own stack, and NumPy of a garbled header
        raise UserError(f"{path}: no dict of tensors as np.save writes it ({type(error).__name__})") from error


def _content(stream: io.BytesIO) -> dict[str, np.ndarray]:
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise Refused(f"its version is {version}, expected (1, 0)")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if shape != () or dtype.char != "O":
        raise Refused("it does not hold a single pickled object")
    array = _run(stream)
    # NumPy's state: version, shape, dtype, order, items.
    items = array.state[4]
    if type(items) is not list or len(items) != 1 or type(items[0]) is not dict:
        raise Refused("it does not hold one dict")
    for name, tensor in items[0].items():
        if not isinstance(tensor, np.ndarray) or tensor.ndim != 2:
            raise Refused(f"{name[:200]!r} is no matrix of integers")
    return items[0]


# Instructions that put their argument on the stack.
_LITERALS = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def _run(stream: io.BytesIO) -> Any:
    """Interprets one pickle, and leaves the stream behind its end."""
    stack: list[Any] = []
    marks: list[int] = []
    notes: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        found = stack[start:]
        del stack[start:]
        return found

    argument: Any
    for instruction, argument, _ in pickletools.genops(stream):
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "POP":
                stack.pop()
            case "MEMOIZE":
                notes[len(notes)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                notes[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(notes[argument])
            case "GLOBAL":
                stack.append(_Name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if type(name) is not str or type(module) is not str:
                    raise Refused("it names something by other than text")
                stack.append(_Name(f"{module}.{name}"))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                if type(stack[-1]) is not _Opaque or stack[-1].state is not None:
                    raise Refused("it sets the state of something that has none")
                stack[-1].state = state
            case "BINPERSID":
                stack.append(_reference(stack.pop()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(instruction.name[-1])
                parts = tuple(stack[-count:])
                del stack[-count:]
                stack.append(parts)
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND":
                _extend(stack, [stack.pop()])
            case "APPENDS":
                _extend(stack, since_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack, [key, value])
            case "SETITEMS":
                _update(stack, since_mark())
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _LITERALS:
                stack.append(argument)
            case name:
                raise Refused(f"it has the instruction {name}, which a saved dict of tensors has not")
    raise Refused("it has no end")


def _extend(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise Refused("it appends to something that is no list")
    stack[-1].extend(items)


def _update(stack: list[Any], pairs: list[Any]) -> None:
    if type(stack[-1]) is not dict or len(pairs) % 2:
        raise Refused("it fills something that is no dict")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        # Text alone: to hash nested tuples can take for ever.
        if type(key) is not str or key in stack[-1]:
            raise Refused("a dict in it has a key twice, or one that is no text")
        stack[-1][key] = value


def _reference(identity: Any) -> _Reference:
    """PyTorch's name of a storage: ("storage", type, key, device, elements, view)."""
    match identity:
        case ("storage", _Name(kind), str(key), str(), int(count), None) if count >= 0:
            return _Reference(kind, key, count)
    raise Refused("it refers to something that is no storage")


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name) or function.name not in _CALLS:
        # The name alone is quoted: whatever else there is may be nested without end.
        what = repr(function.name[:200]) if isinstance(function, _Name) else "something that has no name"
        raise Refused(f"it calls {what}, which a saved dict of tensors does not")
    if type(arguments) is not tuple:
        raise Refused(f"it calls {function.name!r} with no tuple")
    return _CALLS[function.name](*arguments)


def _storage(content: Any) -> np.ndarray:
    """A storage as PyTorch's older format has it: five pickles, the number of elements, the elements."""
    if type(content) is not bytes:
        raise Refused("a storage in it is no bytes")
    stream = io.BytesIO(content)
    magic, protocol, machine, reference, keys = (_run(stream) for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C or protocol != 1001 or machine["little_endian"] is not True:
        raise Refused("a storage in it is not as PyTorch writes it")
    if type(reference) is not _Reference or reference.kind != "torch.LongStorage" or keys != [reference.key]:
        raise Refused("a storage in it holds no int64 numbers")
    count, start = int.from_bytes(stream.read(8), "little"), stream.tell()
    if count != reference.size or len(content) - start != 8 * count:
        raise Refused(f"a storage in it says that it has {reference.size} numbers, and has {(len(content) - start) // 8}")
    return np.frombuffer(content, "<i8", offset=start)


def _tensor(storage: Any, offset: Any, size: Any, strides: Any, *_: Any) -> np.ndarray:
    """A tensor as a view of its storage; what does not lie inside of it, or has more entries, is refused."""
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or type(size) is not tuple or type(strides) is not tuple:
        raise Refused("a tensor in it has no storage, size or strides")
    if (
        len(size) != 2
        or len(strides) != 2
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *size, *strides))
    ):
        raise Refused("a tensor in it is no matrix")
    if not 0 < size[0] * size[1] <= storage.size:
        raise Refused(f"a tensor in it says that it is {list(size)}, and its storage has {storage.size} numbers")
    if offset + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True)) >= storage.size:
        raise Refused("a tensor in it reaches beyond its storage")
    bytes_apart = tuple(stride * storage.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, bytes_apart, writeable=False)


def _opaque(*_: Any) -> _Opaque:
    return _Opaque()


def _empty_dict() -> dict[str, Any]:
    return {}


_CALLS: dict[str, Callable[..., Any]] = {
    "numpy._core.multiarray._reconstruct": _opaque,
    "numpy.core.multiarray._reconstruct": _opaque,  # NumPy before 2.0
    "numpy.dtype": _opaque,
    "collections.OrderedDict": _empty_dict,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
}
