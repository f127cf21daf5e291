"""What the text of a compiled or lowered XLA program says about arrays that are moved, rounded and multiplied."""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.$-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.$-]+) = (?:\(?)(\w+)\[([\d,]*)\][^ ]* ?(?:.*?\) )?([\w-]+)\(([^)]*)\)(.*)$")
_NAME = re.compile(r"%?([\w.$-]+)$")
_CALLS = re.compile(r"calls=%?([\w.$-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_KERNEL = re.compile(r'"?(?:kernel_name|name)"?\s*[=:]\s*"?([\w.]+)')
_FLOATS = {"bf16", "f16", "f32", "f64"}

# A fused loop of these alone computes nothing: it copies, reorders or converts an array.
_MOVES = {
    *("bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "dynamic-slice", "pad", "parameter"),
    *("reshape", "reverse", "slice", "transpose", "iota", "select", "compare", "and", "tuple", "get-tuple-element"),
}
_MOVING = {"concatenate", "copy", "copy-start", "dynamic-slice", "pad", "reverse", "slice", "transpose"}


class Instruction(NamedTuple):
    """One instruction of a computation whose result is an array; of a tuple, the first array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    operation: str
    operands: tuple[str, ...]
    rest: str  # attributes
    is_root: bool

    @property
    def size(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)

    @property
    def array(self) -> str:
        """Its dtype and shape, such as bf16[4096,4096]."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


Computation = dict[str, Instruction]


def computations(text: str) -> dict[str, Computation]:
    """Return the instructions of every computation of an optimised HLO module by name."""
    found: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = found.setdefault(match[1], {})
        elif match := _INSTRUCTION.match(line):
            root, name, dtype, dimensions, operation, operands, rest = match.groups()
            shape = tuple(int(size) for size in dimensions.split(",") if size)
            # An operand may stand with its type before its name.
            names = tuple(each[1] for each in map(_NAME.search, operands.split(", ")) if each)
            current[name] = Instruction(name, dtype, shape, operation, names, rest, bool(root))
    return found


def copies(text: str, entries: int) -> Mapping[str, int]:
    """Count the arrays of at least so many numbers that a program copies, reorders or joins into new ones.

    A slice inside of a fused product or loop is read in place, and not counted. A fusion without arithmetic is a copy,
    unless it only writes a part of an array in place.

    Returns: "operation dtype[shape]" -> how often it stands in the program (once for all iterations of a loop).
    """
    bodies = computations(text)
    fused = {_called(each) for body in bodies.values() for each in body.values() if each.operation == "fusion"}
    found: collections.Counter[str] = collections.Counter()
    for name, body in bodies.items():
        for each in body.values() if name not in fused else ():
            if each.dtype not in _FLOATS or each.size < entries:
                continue
            if each.operation in _MOVING:
                found[f"{each.operation} {each.array}"] += 1
            elif each.operation == "fusion" and (moved := _moves(bodies.get(_called(each), {}), entries)):
                found[f"{moved} {each.array}"] += 1
    return found


def _called(instruction: Instruction) -> str:
    match = _CALLS.search(instruction.rest)
    return match[1] if match else ""


def _moves(body: Computation, entries: int) -> str:
    """Return the operation by which a fused computation moves a large array, "" where it does something else."""
    floats = [each for each in body.values() if each.dtype in _FLOATS]
    if any(each.operation not in _MOVES for each in floats):
        return ""
    moving = [each.operation for each in floats if each.operation in _MOVING and each.size >= entries]
    return "+".join(dict.fromkeys(moving))


class Dot(NamedTuple):
    """A matrix product: dtypes of its operands, and the size of the larger operand."""

    dtypes: tuple[str, ...]
    entries: int


def dots(text: str) -> Iterator[Dot]:
    """Yield every matrix product of a compiled program, of XLA's own and of cuBLAS."""
    for body in computations(text).values():
        for each in body.values():
            target = _TARGET.search(each.rest) if each.operation == "custom-call" else None
            if each.operation == "dot" or (target and "cublas" in target[1]):
                operands = [body[name] for name in each.operands[:2] if name in body]
                if len(operands) == 2:
                    yield Dot(tuple(one.dtype for one in operands), max(one.size for one in operands))


def wide_dots(text: str, entries: int) -> Mapping[str, int]:
    """Count, by dtypes, the products with an operand of at least so many numbers that are not of bfloat16 alone."""
    large = (dot.dtypes for dot in dots(text) if dot.entries >= entries)
    return collections.Counter(" x ".join(dtypes) for dtypes in large if set(dtypes) != {"bf16"})


def custom_calls(text: str) -> Mapping[str, int]:
    """Count a program's calls into libraries and GPU kernels of its own, by target."""
    return collections.Counter(_TARGET.findall(text))


def lost_rounding(stablehlo: str) -> int:
    """Count the pairs of conversions to bfloat16 and back that a lowered program uses beside the number itself.

    Such a pair stands for rounding, and XLA drops it on a GPU (xla_allow_excess_precision): the rounded number is then the
    number itself. Where nothing else reads the unrounded number, that only adds precision and is not counted.
    """
    pairs = 0
    for function in re.split(r"\n\s*func\.func ", stablehlo):
        uses, narrowed, widened = collections.Counter[str](), dict[str, str](), list[str]()
        for line in function.splitlines():
            result, _, right = line.strip().partition(" = ")
            if not right and not line.strip().startswith(("return", "stablehlo.return")):
                continue
            read = re.findall(r"%[\w#]+", right or line)
            uses.update(read)
            if match := re.search(r"stablehlo\.convert (%[\w#]+) : \(tensor<(.*?)>\) -> tensor<(.*?)>", right):
                before, after = match[2].rsplit("x", 1)[-1], match[3].rsplit("x", 1)[-1]
                if (before, after) == ("f32", "bf16"):
                    narrowed[result] = match[1]
                elif (before, after) == ("bf16", "f32") and match[1] in narrowed:
                    widened.append(narrowed[match[1]])
        pairs += sum(uses[source] > 1 for source in widened)
    return pairs


def reduced_precision(text: str) -> int:
    """Count the float32 numbers that a program, lowered or compiled, rounds by `lax.reduce_precision`, which XLA keeps."""
    return len(re.findall(r"stablehlo\.reduce_precision [^\n]*f32>|= f32\[[^\n]*? reduce-precision\(", text))
