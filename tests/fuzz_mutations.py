"""Mutations that know the formats: each takes (random generator, a file's bytes) and returns other bytes."""

import copy
import gzip
import json
import struct

import numpy as np

from neuroada_jax.files import is_deeper

# Values of wrong types, sizes and kinds for any field of a JSON or YAML file.
JUNK = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.5, 10**6, 10**9, 10**12, 2**63, 2**70, -(2**31), 1e-320, 1e39, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "16",
        "x",
        "\ud800",
        "\0",
        "\x1b[31mred\x1b[0m",
        "a\nb",
        "../x",
        "/etc/passwd",
        "None",
        "float64",
        "é" * 100,
    ),
    *(
        "a" * 100_000,
        "{{ 'a' * 10**10 }}",
        "[" * 5000,
        "(((((((a+)+)+)+)+)+)+)$",
        "2024-13-45",
        "!!python/object:os.system",
    ),
    *(
        [],
        [[]],
        [[1]],
        [None],
        [1, 2, 3],
        ["a", 1],
        [[[[[[[[]]]]]]]],
        list(range(3000)),
        {},
        {"a": []},
        {"": None},
        {"0": {}},
    ),
    {"type": "x"},
]


def pick(rng, items):
    return items[int(rng.integers(len(items)))]


def flip_bits(rng, content):
    changed = bytearray(content)
    for place in rng.integers(0, len(content), rng.integers(1, 9)):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def truncate(rng, content):
    return content[: int(rng.integers(0, len(content)))]


def insert_bytes(rng, content):
    place = int(rng.integers(0, len(content)))
    return content[:place] + rng.bytes(int(rng.integers(1, 9))) + content[place:]


def replace_block(rng, content):
    place, size = int(rng.integers(0, len(content))), int(rng.integers(1, 65))
    return content[:place] + rng.bytes(size) + content[place + size :]


def repeat_block(rng, content):
    place, size = int(rng.integers(0, len(content))), int(rng.integers(1, 400))
    return content[: place + size] + content[place : place + size] * int(rng.integers(1, 4)) + content[place + size :]


def other_encoding(rng, content):
    return pick(
        rng, [b"", b"\xff\xfe" + content, b"\xef\xbb\xbf" + content, content + b"\0", content[::-1], b"[" * 10**5, b" "]
    )


BYTES = [flip_bits, flip_bits, truncate, insert_bytes, replace_block, repeat_block, other_encoding]


def _nodes(tree, found=None):
    """Every (parent, key) of a tree."""
    found = [] if found is None else found
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys)[:200]:
        found.append((tree, key))
        _nodes(tree[key], found)
    return found


def edit_tree(rng, tree):
    """Return a copy of a JSON tree with one to three edits: another value, a deletion, another name, a move, a nesting."""
    tree = copy.deepcopy(tree)
    for _ in range(int(rng.integers(1, 4))):
        nodes = _nodes(tree)
        if not nodes:
            return pick(rng, JUNK)
        node, key = pick(rng, nodes)
        kind = int(rng.integers(8))
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[pick(rng, [f"{key}x", "__class__", "", "\x1b[2J", "a.b", str(key).upper()])] = node.pop(key)
        elif kind == 2 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
            number = node[key]
            node[key] = pick(
                rng, [number + 1, number - 1, -number, number * 2, str(number), float(number), [number], number * 2**20]
            )
        elif kind == 3:
            other, name = pick(rng, nodes)
            found = other[name] if name in other or (isinstance(other, list) and name < len(other)) else None
            node[key] = None if is_deeper(found, 200) else copy.deepcopy(found)  # which recurses
        elif kind == 4:
            value = node[key]
            for _ in range(pick(rng, [1, 2, 50, 400])):
                value = [value] if rng.random() < 0.5 else {"a": value}
            node[key] = value
        elif kind == 5 and isinstance(node[key], str) and node[key]:
            at = int(rng.integers(len(node[key])))
            node[key] = (
                node[key][:at]
                + pick(rng, ["\0", "\x1b]0;x\x07", "{{", "{%", "\ud83d", "’", "\n", "(", "[", "*"])
                + node[key][at:]
            )
        else:
            node[key] = copy.deepcopy(pick(rng, JUNK))
    return tree


def dump(tree):
    if is_deeper(tree, 500):  # several nestings inside one another, which `json` cannot write
        return b"[" * 2000
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def edit_json(rng, content):
    return dump(edit_tree(rng, json.loads(content)))


def repeat_key(rng, content):
    """A JSON object in which one key stands twice."""
    tree = json.loads(content)
    if not isinstance(tree, dict) or not tree:
        return flip_bits(rng, content)
    key = pick(rng, list(tree))
    return content.rstrip()[:-1] + b", " + json.dumps(key).encode() + b": " + dump(pick(rng, JUNK)) + b"}"


def edit_json_lines(rng, content):
    lines = content.splitlines()
    at = int(rng.integers(len(lines)))
    lines[at] = pick(
        rng, [b"null", b"[]", b"{", b"1e999", b"9" * 5000, edit_json(rng, lines[at]), edit_json(rng, lines[at])]
    )
    return b"\n".join(lines)


def split_safetensors(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def edit_safetensors(rng, content):
    header, data = split_safetensors(content)
    kind = int(rng.integers(4))
    names = [name for name in header if name != "__metadata__"]
    if kind == 0:
        first, second = rng.choice(names, 2, replace=False)
        header[first], header[second] = header[second], header[first]
    elif kind == 1:
        name = pick(rng, names)
        field = pick(rng, ["dtype", "shape", "data_offsets"])
        dtypes = ["F64", "I8", "BOOL", "F8_E4M3", "F4", "U64", "C64", "BF16", "x"]
        header[name][field] = (
            pick(rng, dtypes) if field == "dtype" else pick(rng, [[0], [], [2**62, 4], [-1, 2], [1] * 70, [0, 2**63]])
        )
    else:
        header = edit_tree(rng, header)
    text = dump(header)
    length = pick(rng, [len(text)] * 8 + [0, 2**40, 2**63, len(text) - 1])
    return length.to_bytes(8, "little") + text + data


def edit_gguf(rng, content):
    """Other lengths, counts and kinds in the header of a GGUF file, whose fields are not aligned."""
    changed = bytearray(content)
    end = min(len(content) - 8, 6000)
    at = pick(rng, [8, 16, int(rng.integers(4, end)), int(rng.integers(4, end)), int(rng.integers(4, end))])
    number = pick(rng, [0, 1, 2, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1])
    width = pick(rng, [1, 4, 8])
    changed[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return bytes(changed)


def gguf_value(rng, content):
    """Another value behind one of the keys of a GGUF file."""
    keys = [
        b"head_count",
        b"block_count",
        b"context_length",
        b"rope.freq_base",
        b"alignment",
        b"tokens",
        b"scores",
        b"merges",
        b"token_type",
        b"eos_token_id",
        b"rms_epsilon",
        b"embedding_length",
        b"key_length",
        b"sliding_window",
        b"pre",
        b"model",
    ]
    key = pick(rng, keys)
    at = content.find(key)
    if at < 0:
        return edit_gguf(rng, content)
    at += len(key)
    values = [
        struct.pack("<If", 6, pick(rng, [0.0, -1.0, float("nan"), float("inf"), 1e-38])),
        struct.pack("<IQ", 10, 2**63),
    ]
    values += [
        struct.pack("<II", 4, pick(rng, [0, 1, 3, 5, 2**31, 2**32 - 1])),
        struct.pack("<IQ", 8, 2**40),
        struct.pack("<IB", 7, 1),
    ]
    values += [
        struct.pack("<IIQ", 9, 4, pick(rng, [0, 1, 2**40])),
        struct.pack("<IIQ", 9, 9, 10**6),
        struct.pack("<IQ2s", 8, 2, b"\xff\x1b"),
    ]
    new = pick(rng, values)
    return content[:at] + new + content[at + pick(rng, [len(new), 8, 12]) :]


def edit_yaml(rng, content):
    """Edits of a YAML text by lines."""
    lines = content.decode().splitlines()
    at = int(rng.integers(len(lines)))
    key = lines[at].partition(":")[0]
    odd = ["!!python/object/apply:os.system [ls]", "!!binary aGk=", "!!timestamp 2001-99-99", "2001-02-30", "2001-01-01 25:00:00",
           "&a [*a]", "*missing", "{<<: *a}", "0o7", "1e999", ".nan", ".inf", "1_0", "12:30:45", "~", "'", '"\\ud83d"', '"\\e[31m"',
           "? x", "- -", "|", ">", "[" * 3000, "{" * 2000, "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "%TAG", "\t", "9" * 5000,
           "0x" + "f" * 4000, "1:2:3:4:5:6:7:8:9:10", "!!int x", "!!float x", "!!bool x", "!!null x", "=", "<<", "2001-01-01"]  # fmt: skip
    edits = [
        lambda: lines.pop(at),
        lambda: lines.insert(at, lines[at]),
        lambda: lines.insert(at, f"{key}: {pick(rng, odd)}"),
        lambda: lines.__setitem__(at, f"{key}: {pick(rng, odd)}"),
        lambda: lines.__setitem__(at, f"{key}: {json.dumps(pick(rng, JUNK))}"),
        lambda: lines.__setitem__(at, " " * int(rng.integers(9)) + lines[at]),
        lambda: lines.__setitem__(slice(None), [*lines[:at], *alias_bomb(int(rng.integers(2, 30))), *lines[at:]]),
    ]
    pick(rng, edits)()
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def alias_bomb(depth):
    return ["a0: &a0 [x, x]"] + [f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}]" for i in range(depth)]


def zip_bomb(rng, content):
    return pick(
        rng, [gzip.compress(b"a" * 10**7), gzip.compress(b'{"a":1}\n' * 10**5), gzip.compress(content) + b"x", content]
    )


def edit_numbers(rng, content):
    """Another of the numbers, byte for byte, in any binary file."""
    changed = bytearray(content)
    at = int(rng.integers(0, max(len(content) - 8, 1)))
    width = pick(rng, [1, 2, 4, 8])
    changed[at : at + width] = rng.bytes(width) if rng.random() < 0.3 else pick(rng, [b"\xff", b"\x00", b"\x7f"]) * width
    return bytes(changed)


TEMPLATES = [
    "{% for i in range(10**9) %}a{% endfor %}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}", "{{ [1] * 10**10 }}", "{{ 'a'.center(10**10) }}", "{{ 'a'.zfill(10**10) }}", "{{ 'a'.ljust(10**11) }}",
    "{{ 'a'|center(10**10) }}", "{{ 'a'|indent(10**10) }}", "{{ '%10000000000d' % 1 }}", "{{ '{:10000000000}'.format(1) }}",
    "{{ 10**10**8 }}", "{{ 9**9**9**9 }}", "{{ 7 ** (10**7) * 7 ** (10**7) }}", "{{ '\\t'.expandtabs(10**10) }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=[1], m=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}{% endfor %}"
    "{{ ns.l == ns.m }}",
    "{% set ns = namespace(l=(1,)) %}{% for i in range(60) %}{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ {ns.l: 1} }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('a', 'aaaaaaaaaa') %}{% endfor %}{{ ns.s }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 1/0 }}", "{% break %}", "{% continue %}", "{{ messages.x.y.z }}",
    "{{ messages[0]['content'] + 1 }}", "{{ raise_exception('\x1b[31mno') }}", "{{ lipsum(10**9) }}", "{{ range(10**18)|list }}",
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ messages|tojson(indent=10**10) }}",
    "{% set x %}{{ 'a' * 10**9 }}{% endset %}{{ x * 100 }}", "{{ (messages * 10**6)|tojson }}", "{{ 'a'|wordwrap(0) }}",
    "{{ messages|map(attribute='content')|join('a' * 10**9) }}", "{% include 'x' %}", "{% extends 'x' %}", "{{ '\\ud800' }}",
    "{{ [1]|batch(10**9, 1)|list }}", "{{ [1]|slice(10**9)|list }}", "{{ 1e308 * 10 }}", "{{ '{0.__class__}'.format(1) }}",
    "{% raw %}", "{% for m in messages %}", "{{ messages", "(" * 5000, "{{ " + "(" * 3000 + ")" * 3000 + " }}", "{{ -" + "-" * 3000 + "1 }}",
    "{% if x %}" * 300 + "{% endif %}" * 300, "{{ 'x'|" + "upper|" * 2000 + "upper }}", "{{ strftime_now('%Y' * 10**8) }}",
]  # fmt: skip


def edit_template(rng, content):
    """A template with one that asks for too much in it, or another operator, number or bracket."""
    text = content.decode("utf-8", "replace")
    at = int(rng.integers(len(text)))
    if rng.random() < 0.15:
        return (pick(rng, TEMPLATES) + (text if rng.random() < 0.5 else "")).encode("utf-8", "surrogatepass")
    pieces = [
        "{{ ",
        " }}",
        "{% ",
        " %}",
        "(",
        ")",
        "'",
        "* 3",
        "** 2",
        "|upper",
        "|tojson",
        ".x",
        "[0]",
        "[1:]",
        "[::-1]",
        "-",
        "not ",
        "{#",
    ]
    pieces += [
        " + 1",
        " ~ 1",
        "|length",
        "|int",
        ".split('a')",
        "|join",
        "loop.index",
        "|list",
        "|sort",
        "namespace(",
        "{% endif %}",
    ]
    cut = int(rng.integers(0, 6))
    return (text[:at] + pick(rng, pieces) + text[at + cut :]).encode()


def columns_file(rng, content):
    """A parquet or Arrow file with odd numbers in it."""
    return pick(rng, [edit_numbers, edit_numbers, flip_bits, truncate])(rng, content)


def rng_of(seed):
    return np.random.default_rng(seed)
