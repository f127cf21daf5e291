"""Reading a dict of integer tensors from a pickled .npy file without unpickling it.

`np.save` of a dict writes a pickle, and a pickle is a program that names functions and calls them. Here `pickletools`,
which executes nothing, lists the program's opcodes, and a small interpreter builds the data from them. It knows the
opcodes that such a file has, and can call only the names in `_CALLS`: each stands for a function of this module that
checks its arguments. `pickle.Unpickler` with a restricted `find_class` would be shorter, but it lets a file set attributes
of whatever that function returns, and reserve memory for as large a memo as the file claims to need.
"""

import io
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neuroada_jax import files
from neuroada_jax.errors import UserError


class Refused(Exception):
    """The pickle does something that a saved dict of tensors does not do."""


class _Name(NamedTuple):
    """A global that the pickle names; it is looked up only when it is called, and only in `_CALLS`."""

    name: str


class _Reference(NamedTuple):
    """A storage that follows the pickle in the file: its type, its key and its number of elements."""

    kind: str
    key: str
    size: int


class _Opaque:
    """An object whose state is set after its construction: NumPy's array around the dict, and that array's dtype."""

    state: Any = None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a .npy file that `np.save` wrote from a dict of int64 tensors.

    Args:
      path: the file.

    Returns: name -> int64 array (n, m), none larger than its bytes in the file.

    Raises:
      UserError: the file cannot be read, or holds anything else.
    """
    stream = io.BytesIO(files.read_bytes(path, largest=None))
    try:
        return _content(stream)
    except Refused as refusal:
        raise UserError(f"{path}: refused, since {refusal}; nothing in it was run") from refusal
    except Exception as error:  # a damaged program fails on its own stack, NumPy on a damaged header
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


class _Interpreter:
    """The state of one pickle program: its stack, the positions of its marks, and its memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def pop_marked(self) -> list[Any]:
        """Pop the objects above the topmost mark, and the mark."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def ignore(self, _: Any) -> None:
        """PROTO, FRAME: nothing to do."""

    def push(self, argument: Any) -> None:
        """Push the opcode's own argument."""
        self.stack.append(argument)

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    def get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    def push_global(self, argument: str) -> None:
        self.stack.append(_Name(argument.replace(" ", ".")))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("it names a global by something other than text")
        self.stack.append(_Name(f"{module}.{name}"))

    def reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        self.stack.append(_call(self.stack.pop(), arguments))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is not _Opaque or self.stack[-1].state is not None:
            raise Refused("it sets the state of something that has none")
        self.stack[-1].state = state

    def persistent_id(self, _: Any) -> None:
        self.stack.append(_reference(self.stack.pop()))

    def pack(self, count: int) -> None:
        """Replace the topmost `count` objects by a tuple of them."""
        parts = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(parts)

    def pack_marked(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_marked()))

    def append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self.pop_marked())

    def setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def setitems(self, _: Any) -> None:
        self._update(self.pop_marked())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("it appends to something that is no list")
        self.stack[-1].extend(items)

    def _update(self, pairs: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(pairs) % 2:
            raise Refused("it fills something that is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Only text: hashing nested tuples can take forever.
            if type(key) is not str or key in self.stack[-1]:
                raise Refused("a dict in it has a key twice, or one that is no text")
            self.stack[-1][key] = value


_Handler = Callable[[_Interpreter, Any], None]
# Every opcode that such a pickle may have, with its effect; any other is refused.
_OPCODES: dict[str, _Handler] = {
    "PROTO": _Interpreter.ignore,
    "FRAME": _Interpreter.ignore,
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Interpreter.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _Interpreter.push),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), _Interpreter.push),
    "NONE": lambda state, _: state.push(None),
    "NEWTRUE": lambda state, _: state.push(True),
    "NEWFALSE": lambda state, _: state.push(False),
    "EMPTY_TUPLE": lambda state, _: state.push(()),
    "EMPTY_LIST": lambda state, _: state.push([]),
    "EMPTY_DICT": lambda state, _: state.push({}),
    "MARK": _Interpreter.mark,
    "POP": _Interpreter.pop,
    "MEMOIZE": _Interpreter.memoize,
    "BINPUT": _Interpreter.put,
    "LONG_BINPUT": _Interpreter.put,
    "BINGET": _Interpreter.get,
    "LONG_BINGET": _Interpreter.get,
    "GLOBAL": _Interpreter.push_global,
    "STACK_GLOBAL": _Interpreter.stack_global,
    "REDUCE": _Interpreter.reduce,
    "BUILD": _Interpreter.build,
    "BINPERSID": _Interpreter.persistent_id,
    "TUPLE1": lambda state, _: state.pack(1),
    "TUPLE2": lambda state, _: state.pack(2),
    "TUPLE3": lambda state, _: state.pack(3),
    "TUPLE": _Interpreter.pack_marked,
    "APPEND": _Interpreter.append,
    "APPENDS": _Interpreter.appends,
    "SETITEM": _Interpreter.setitem,
    "SETITEMS": _Interpreter.setitems,
}


def _run(stream: io.BytesIO) -> Any:
    """Interpret one pickle, and leave the stream at its end."""
    state = _Interpreter()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "STOP":
            return state.stack.pop()
        if opcode.name not in _OPCODES:
            raise Refused(f"it has the opcode {opcode.name}, which a saved dict of tensors does not have")
        _OPCODES[opcode.name](state, argument)
    raise Refused("it has no end")


def _reference(persistent_id: Any) -> _Reference:
    """Return the reference that PyTorch's persistent id stands for: ("storage", type, key, device, elements, view)."""
    match persistent_id:
        case ("storage", _Name(kind), str(key), str(), int(count), None) if count >= 0:
            return _Reference(kind, key, count)
    raise Refused("it refers to something that is no storage")


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name) or function.name not in _CALLS:
        # Only a name is quoted: anything else may be nested arbitrarily deep.
        called = repr(function.name[:200]) if isinstance(function, _Name) else "something that has no name"
        raise Refused(f"it calls {called}, which a saved dict of tensors does not")
    if type(arguments) is not tuple:
        raise Refused(f"it calls {function.name!r} with no tuple")
    return _CALLS[function.name](*arguments)


def _storage(content: Any) -> np.ndarray:
    """Read a storage in PyTorch's legacy format: five pickles, the number of elements, the elements."""
    if type(content) is not bytes:
        raise Refused("a storage in it is no bytes")
    stream = io.BytesIO(content)
    magic, protocol, platform, reference, keys = (_run(stream) for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C or protocol != 1001 or platform["little_endian"] is not True:
        raise Refused("a storage in it is not as PyTorch writes it")
    if type(reference) is not _Reference or reference.kind != "torch.LongStorage" or keys != [reference.key]:
        raise Refused("a storage in it holds no int64 numbers")
    count, start = int.from_bytes(stream.read(8), "little"), stream.tell()
    if count != reference.size or len(content) - start != 8 * count:
        raise Refused(f"a storage in it says that it has {reference.size} numbers, and has {(len(content) - start) // 8}")
    return np.frombuffer(content, "<i8", offset=start)


def _tensor(storage: Any, offset: Any, size: Any, strides: Any, *_: Any) -> np.ndarray:
    """Return a matrix as a view of its storage; refuse one that reaches beyond it or has more entries."""
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
