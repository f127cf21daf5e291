"""Bounds on chat templates, which are programs of others: what they make, and how long they compute.

Jinja's sandbox, which transformers uses, keeps a template from reaching Python. It does not keep it from computing for
ever, or from making much of little. Here everything by which texts, lists and numbers grow is bounded when it is made, and
a template that computes too long is interrupted wherever it is. A limit on the memory of the process would be simpler, but
Python itself does not survive every failed allocation.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2.compiler
import jinja2.filters
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

from neuroada_jax.data import interruption
from neuroada_jax.data.interruption import TooMuch

SECONDS = 3.0  # of the processor for a rendering; an honest one takes milliseconds
LARGEST = 10**7  # characters of a text, and of all in a list, that a template makes
LARGEST_NUMBER = 2**128  # of a product or power
MOST_VALUES = 10**5  # values in a list or dict once those that stand in it several times are counted as often
WIDEST = 10**4  # characters or digits of a field that a text is formatted to
LARGEST_SOURCE = 2**20  # characters; the longest templates of the hub have some 20,000
_WIDTH = re.compile(r"\d{5}")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _long() -> TooMuch:
    return TooMuch(f"it makes a text of more than {LARGEST:,} characters")


def _short(value: Any) -> Any:
    """Return a text unless it is too long."""
    if len(value) > LARGEST:
        raise _long()
    return value


def _weighed(value: Any) -> Any:
    """Return a list, tuple or dict unless it holds more than `MOST_VALUES`: doubled a few times over it has 2**60."""
    left, characters, level = MOST_VALUES, LARGEST, [value]
    while level:
        each = level.pop()
        if type(each) is str:
            characters -= len(each)
            if characters < 0:
                raise _long()
        elif type(each) in (list, tuple, dict):
            left -= len(each)
            if left < 0:
                raise TooMuch(f"it makes a list or dict of more than {MOST_VALUES:,} values")
            level.extend(each)
            if type(each) is dict:
                level.extend(each.values())
    return value


def _bounded(value: Any) -> Any:
    """Return what an operator made, unless it is too large."""
    if type(value) is str:
        return _short(value)
    return _weighed(value) if type(value) in (list, tuple, dict) else value


def _sum(left: Any, right: Any) -> Any:
    return _bounded(left + right)


def _chain(*parts: Any) -> Any:
    """Return the sum of parts of which the first or the second is a text."""
    try:
        value = "".join(parts)
    except TypeError:  # whose message would be another one
        return functools.reduce(lambda left, right: left + right, parts)
    return value if len(value) <= LARGEST else _short(value)


def _concat(parts: Iterable[str]) -> str:
    """Join what a template, a macro or a block has written."""
    if type(parts) is not list:
        parts, each, total = [], iter(parts), 0
        while chunk := list(itertools.islice(each, 1000)):
            total += sum(map(len, chunk))
            if total > LARGEST:
                raise _long()
            parts += chunk
    elif sum(map(len, parts)) > LARGEST:
        raise _long()
    return "".join(parts)


def _product(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and hasattr(other, "__len__") and one * len(other) > LARGEST:
            raise TooMuch(f"it repeats a text or list to more than {LARGEST:,} items")
    _check_numbers(left, right)
    return _bounded(left * right)


def _power(left: Any, right: Any) -> Any:
    _check_numbers(left, right)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > LARGEST_NUMBER.bit_length():
        raise TooMuch(f"it computes the power {left} ** {right}")
    return left**right


def _check_numbers(*numbers: Any) -> None:
    if any(isinstance(each, int) and abs(each) > LARGEST_NUMBER for each in numbers):
        raise TooMuch("it computes with numbers of more than 38 digits")


def _remainder(left: Any, right: Any) -> Any:
    if type(left) is str:
        _check_format(left, right if isinstance(right, tuple) else (right,))
    return _bounded(left % right)


def _check_format(text: str, arguments: Iterable[Any]) -> None:
    """Check that no field of a format is wider than `WIDEST`, or gets more than fits."""
    wide = _WIDTH.search(text) is not None
    for each in arguments:
        wide = wide or (isinstance(each, int) and abs(each) > WIDEST)  # a width may be an argument
        if type(each) in (list, tuple, dict, str):
            _weighed([each] * max(text.count("%"), text.count("{"), 1))
    if wide:
        raise TooMuch(f"it formats a field of more than {WIDEST:,} characters")


def _check_replaced(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    count = len(text) + 1 if not old else str(text).count(str(old))
    if len(text) + count * len(new) > LARGEST:
        raise _long()


def _check_joined(separator: Any, parts: Any) -> None:
    if len(separator) * len(parts) > LARGEST:
        raise _long()
    _weighed(list(parts) if not isinstance(parts, str) else parts)


def _check_widths(*arguments: Any) -> None:
    """Check the arguments of what pads, indents or wraps: its numbers, and its texts, which are repeated."""
    for each in arguments[1:]:
        if (isinstance(each, int) and abs(each) > WIDEST) or (isinstance(each, str) and len(each) > WIDEST):
            raise TooMuch(f"it pads, indents or rounds by more than {WIDEST:,}")


def _check_formatted(text: str, *arguments: Any, **named: Any) -> None:
    _check_format(text, (*arguments, *named.values()))


# Methods of texts and numbers that make more than they get, and filters that do: what checks (value, arguments...) before.
_METHODS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"), _check_widths),
    "replace": _check_replaced,
    "join": _check_joined,
    "translate": lambda text, table: _weighed(list(table.values()) * 100),
}
_FILTERS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(
        ("center", "indent", "wordwrap", "round", "tojson", "truncate", "urlize", "batch", "slice"), _check_widths
    ),
    "format": _check_formatted,
    "replace": _check_replaced,
}
_LISTS = ("batch", "slice")  # filters whose results are lists of lists
_BUILT_IN: Any = type("".join)
_OF_LOOPS = frozenset(("first", "last", "index", "index0", "length"))  # numbers, and true or false
_plain_call = jinja2.sandbox.SandboxedEnvironment.call


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds. An environment is made one by `bound`."""

    weighed, total, chain, short = staticmethod(_weighed), staticmethod(_sum), staticmethod(_chain), staticmethod(_short)
    concat: Any = staticmethod(_concat)
    intercepted_binops = frozenset(("*", "**", "%"))  # which are then not computed at compile time either

    def call(__self: Any, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method of a template."""
        if type(__obj) is _BUILT_IN and (check := _METHODS.get(__obj.__name__)):
            check(__obj.__self__, *args, **kwargs)
        return _plain_call(__self, __context, __obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute; those of a loop, which nearly every message asks for, without the sandbox's many looks."""
        if type(obj) is jinja2.runtime.LoopContext and attribute in _OF_LOOPS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def wrap_str_format(self, value: Any) -> Any:
        """Return what stands for `str.format` and `str.format_map` in a template."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_formatted(value.__self__, *args, **kwargs)
            return _short(wrapped(*args, **kwargs))

        return checked


class _Dict:
    """The global `dict` of chat templates, whose results are weighed."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return _weighed(dict(*args, **kwargs))

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return _weighed(dict.fromkeys(*args))


def _is_text(node: Any) -> bool:
    return isinstance(node, jinja2.nodes.Concat) or (isinstance(node, jinja2.nodes.Const) and type(node.value) is str)


class _Generator(jinja2.compiler.CodeGenerator):
    """Writes what makes texts, lists, tuples and dicts as calls of the functions that bound them."""

    def _visit_within(self, function: str, visit: Any, node: Any, frame: Any) -> None:
        self.write(f"environment.{function}(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: Any, frame: Any) -> None:
        self._visit_within("weighed", super().visit_List, node, frame)

    def visit_Dict(self, node: Any, frame: Any) -> None:
        self._visit_within("weighed", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: Any, frame: Any) -> None:
        if node.ctx == "load":
            self._visit_within("weighed", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: Any, frame: Any) -> None:
        self._visit_within("short", super().visit_Concat, node, frame)

    def visit_Add(self, node: Any, frame: Any) -> None:
        leaves = [node.right]
        while isinstance(node.left, jinja2.nodes.Add):
            node = node.left
            leaves.append(node.right)
        leaves = [node.left, *reversed(leaves)]
        if any(map(_is_text, leaves[:2])):
            self.write("environment.chain(")
        else:
            self.write("environment.total(" * (len(leaves) - 1))
        for number, leaf in enumerate(leaves):
            if number:
                self.write(", ")
            self.visit(leaf, frame)
            if number and not any(map(_is_text, leaves[:2])):
                self.write(")")
        if any(map(_is_text, leaves[:2])):
            self.write(")")


def bound(environment: jinja2.sandbox.ImmutableSandboxedEnvironment) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Bound what the templates make that are compiled in an environment from now on, and return it."""
    environment.__class__ = _Environment
    environment.code_generator_class = _Generator
    environment.binop_table |= {"*": _product, "**": _power, "%": _remainder}
    for name, check in _FILTERS.items():
        environment.filters[name] = functools.partial(_filtered, environment.filters[name], check, name in _LISTS)
        if getattr(jinja2.filters.FILTERS.get(name), "jinja_pass_arg", None) is not None and name != "tojson":
            environment.filters[name].jinja_pass_arg = jinja2.filters.FILTERS[name].jinja_pass_arg
    environment.filters["join"] = _joined
    if "dict" in environment.globals:
        environment.globals["dict"] = _Dict()
    environment.globals.pop("lipsum", None)  # makes texts of any length
    return environment


def _filtered(plain: Any, check: Any, is_list: bool, *arguments: Any, **named: Any) -> Any:
    passed = getattr(plain, "jinja_pass_arg", None) is not None
    check(*arguments[passed:], *named.values())
    result = plain(*arguments, **named)
    return _weighed(list(result)) if is_list else result


@jinja2.pass_eval_context
def _joined(context: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    parts = list(value)
    if attribute is None:
        _check_joined(d, parts)
    return _short(jinja2.filters.sync_do_join(context, parts, d, attribute))


@functools.lru_cache(maxsize=64)
def compiled(source: str) -> Any:
    """Compile a template in transformers' environment, with bounds.

    Raises:
      jinja2.TemplateError: it is none.
      TooMuch: it is too long.
    """
    if len(source) > LARGEST_SOURCE:
        raise TooMuch(f"it has {len(source):,} characters, expected at most {LARGEST_SOURCE:,}")
    environment = _transformers()._cached_compile_jinja_template("").environment  # a new one, despite its name
    template: Any = bound(environment).from_string(source)
    template.globals = dict(template.globals)  # Jinja's chain of dicts is read in full at each rendering
    if GENERATION.search(source):
        template.root_render_func = functools.partial(_written, template.root_render_func)
    return template


def _written(render: Any, context: Any) -> Iterator[str]:
    """Yield what a template writes, for code of transformers that joins it by itself."""
    total = 0
    for part in render(context):
        total += len(part)
        if total > LARGEST:
            raise _long()
        yield part


@functools.cache
def _transformers() -> Any:
    from transformers.utils import chat_template_utils  # slow to import

    return chat_template_utils


def render(conversations: Sequence[Any], **options: Any) -> tuple[list[str], list[Any]]:
    """Render conversations as transformers' `render_jinja_template` does, within the bounds above.

    Raises:
      TooMuch: a bound is exceeded.
      Exception: whatever a template raises.
    """
    return interruption.within(SECONDS, lambda: _render(conversations, options))


def _render(conversations: Sequence[Any], options: Mapping[str, Any]) -> Any:
    library = _transformers()
    plain = {name: found for name in _INSTEAD if (found := _original(name)) is not None}
    for name in plain:  # by what is in effect the same, so that other threads may meet it
        setattr(library, name, _INSTEAD[name])
    try:
        return library.render_jinja_template(conversations, **options)
    finally:
        for name, found in plain.items():
            setattr(library, name, found)


@functools.cache
def _original(name: str) -> Any:
    """Return what a private name of transformers stood for before the first rendering; None where it has no such name."""
    return getattr(_transformers(), name, None)


class Plain(list):
    """Messages that `plain` has made: their beginnings need no other copy."""


def plain(messages: list[dict[str, Any]]) -> Plain:
    """Return messages of what templates may see alone, of which several beginnings are rendered."""
    return Plain(_plain_data(messages))


def _plain_data(value: Any) -> Any:
    """Return what transformers' `_plain_template_data` does; what JSON holds is copied in half the time."""
    kind = type(value)
    if kind is str or value is None:
        return value
    if kind is Plain:
        return list(value)
    if kind is dict:
        return {_plain_data(key): item if type(item) is str else _plain_data(item) for key, item in value.items()}
    if kind is list:
        return [_plain_data(item) for item in value]
    return _original("_plain_template_data")(value)


def _aliased(chat: list[Any]) -> list[Any]:
    """Return what transformers' `_alias_reasoning_fields` does, which nearly all chats have no field for."""
    names = _original("_REASONING_FIELDS")
    if names is not None and all(map(frozenset(names).isdisjoint, chat)):
        return chat
    return _original("_alias_reasoning_fields")(chat)


_INSTEAD = {
    "_compile_jinja_template": compiled,
    "_plain_template_data": _plain_data,
    "_alias_reasoning_fields": _aliased,
}
