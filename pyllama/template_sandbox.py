"""Runs templates that come with a model: jinja2's immutable sandbox, with an account that every template has to live
within.

The sandbox keeps a template from reaching Python; the account keeps it from running or growing without end. A step is
charged for each turn of a loop (as many as its body has nodes), each call and filter, and in proportion to texts and
lists that are made; texts have a longest length, and operations that multiply (`*`, `**`, replace, join, width
arguments) are measured beforehand. The clock is looked at with every charge. Not covered: work inside a single cheap
operation (comparing, slicing and searching texts that are already within the limits; it ends, and the clock is looked
at right after), and compiling (the source's size is capped).
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from types import GeneratorType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.utils
from jinja2 import nodes, pass_context
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SOURCE_CHARS = 128 << 10
MAX_WIDTH = 10_000
MAX_INTEGER_BITS = 4096

_TEXT_METHODS = frozenset(
    {
        "capitalize",
        "casefold",
        "center",
        "count",
        "endswith",
        "find",
        "format",
        "index",
        "isalnum",
        "isalpha",
        "isascii",
        "isdecimal",
        "isdigit",
        "isidentifier",
        "islower",
        "isnumeric",
        "isprintable",
        "isspace",
        "istitle",
        "isupper",
        "join",
        "ljust",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rindex",
        "rjust",
        "rpartition",
        "rsplit",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "swapcase",
        "title",
        "upper",
        "zfill",
    }
)
_SIZED_FILTERS = frozenset({"batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap"})
_NESTING_FILTERS = frozenset({"batch", "groupby", "map", "slice", "sum"})
_REMOVED_FILTERS = frozenset({"filesizeformat", "pprint", "random", "urlize", "xmlattr"})
# Widths of three digits, or computed ones: after % in its way of formatting, inside braces in the other.
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[^A-Za-z%]*(\d{3}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*(\d{3}|[:!][^{}]*\{)")


class LimitError(jinja2.TemplateError):
    """A template that does too much."""


class RefusedError(jinja2.TemplateError):
    """A template's own raise_exception: it does not take these messages."""


class Account:
    """What one rendering may still spend. `clock` is seconds, to be replaced in tests."""

    def __init__(self, steps: int, max_text: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps = steps
        self.max_text = max_text
        self._clock = clock
        self._end = clock() + seconds

    def charge(self, steps: int) -> None:
        self.steps -= max(1, steps)
        if self.steps < 0:
            raise LimitError("it does more work than any conversation needs; does a loop in it never end?")
        if self._clock() > self._end:
            raise LimitError("it takes too long")

    def limit(self, length: int) -> None:
        """Refuses a text that is too long, free of charge."""
        if length > self.max_text:
            raise LimitError(f"it makes a text of {length} characters, at most {self.max_text} are allowed")

    def text(self, length: int) -> None:
        """Charges for a text that is about to be, or has just been made."""
        self.limit(length)
        self.charge(length >> 4)

    def value(self, value: Any) -> None:
        """Charges for a value and everything inside it, shared parts as often as they appear."""
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.text(len(item))
                continue
            self.charge(1)
            if isinstance(item, dict):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set, frozenset)):
                stack += item


_account: ContextVar[Account | None] = ContextVar("account", default=None)


@contextmanager
def spending(account: Account) -> Iterator[None]:
    """Everything rendered inside is charged to `account`."""
    token = _account.set(account)
    try:
        yield
    finally:
        _account.reset(token)


def _current() -> Account:
    # Outside a rendering only constants are folded, and `optimized=False` turns that off.
    account = _account.get()
    if account is None:
        raise LimitError("it cannot be run outside a rendering")
    return account


def _check_width(values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise LimitError(f"it asks for a width or count of {value}, at most {MAX_WIDTH} are allowed")


def _check_format(text: Any, wide: re.Pattern[str]) -> None:
    if isinstance(text, str) and wide.search(text):
        raise LimitError("it formats with a computed or very large width")


def _replaced_length(text: str, old: Any, new: Any) -> int:
    return len(text) + text.count(str(old)) * len(str(new))


def _joined_length(separator: Any, items: Any) -> int:
    # Items themselves are counted when the joined text is there; none of them is longer than a text may be.
    return len(str(separator)) * len(items) if hasattr(items, "__len__") else 0


class Environment(ImmutableSandboxedEnvironment):
    """jinja2 as transformers sets it up for chat templates, with every operation charged to the current account."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            finalize=_finalize,
            optimized=False,
        )
        self.filters["tojson"] = _tojson
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        self.filters = {name: _charged_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {"__tick": _tick, "__checked": _checked, "__concat": _concat}
        self.globals.pop("lipsum", None)
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace}

    def compile_counted(self, source: str) -> jinja2.Template:
        """The template with its counters built in. Raises jinja2's errors, RecursionError or MemoryError."""
        tree = _Counters().visit(self.parse(source))
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        account = _current()
        account.charge(1)
        if operator == "%":
            _check_format(left, _WIDE_PERCENT)
        elif operator in ("*", "**"):
            _check_product(account, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        if not isinstance(result, (int, float)):
            account.value(result)
        return result

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        account = _current()
        account.charge(1)
        receiver = getattr(__obj, "__self__", None)
        if isinstance(receiver, str):
            _check_text_method(account, receiver, __obj.__name__, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            account.text(len(result))
        elif __obj in (dict, _Namespace):
            account.value([*args, *kwargs.values()])
        elif hasattr(result, "__len__"):
            account.charge(len(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        receiver = getattr(value, "__self__", None)
        if isinstance(receiver, str):
            if value.__name__ == "format_map":
                return None  # then is_safe_attribute refuses it
            if value.__name__ == "format":
                _check_format(receiver, _WIDE_BRACES)
        return super().wrap_str_format(value)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        if isinstance(obj, (int, float, bytes)):
            return False
        return super().is_safe_attribute(obj, attr, value)


def _check_product(account: Account, operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise LimitError(f"it computes a number of {bits} bits")
        return
    for many, times in ((left, right), (right, left)):
        if isinstance(times, int) and hasattr(many, "__len__"):
            account.text(len(many) * max(times, 0))


def _check_text_method(account: Account, text: str, name: str, args: Any, kwargs: Any) -> None:
    if name in ("center", "ljust", "rjust", "zfill"):
        _check_width(args)
    elif name == "replace" and len(args) >= 2:
        account.text(_replaced_length(text, args[0], args[1]))
    elif name == "join" and args:
        account.text(_joined_length(text, args[0]))
    account.charge(len(text) >> 4)


def _charged_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its cost charged; keeps jinja2's marks of what it wants to be passed."""
    skip = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        account = _current()
        value, rest = args[skip], [*args[skip + 1 :], *kwargs.values()]
        account.charge(len(value) >> 2 if hasattr(value, "__len__") else 1)
        if name in _SIZED_FILTERS:
            _check_width(rest)
        if name == "format":
            _check_format(value, _WIDE_PERCENT)
        elif name == "replace" and len(rest) >= 2:
            account.text(_replaced_length(str(value), rest[0], rest[1]))
        elif name == "join" and rest:
            account.text(_joined_length(rest[0], value))
        elif name == "indent":
            account.text(
                str(value).count("\n") * max([len(r) if isinstance(r, str) else r for r in rest[:1]], default=4)
            )
        return _charged_result(account, name, function(*args, **kwargs))

    return charged


def _charged_result(account: Account, name: str, result: Any) -> Any:
    if isinstance(result, GeneratorType):
        items = []
        for item in result:
            account.charge(1)
            items.append(item)
        result = items
    if isinstance(result, str) or name in _NESTING_FILTERS:
        account.value(result)
    elif hasattr(result, "__len__"):
        account.charge(len(result) >> 2)
    return result


def _tick(cost: int) -> bool:
    _current().charge(cost if isinstance(cost, int) else 1)
    return True


def _checked(value: Any) -> Any:
    _current().value(value)
    return value


def _concat(values: Any) -> str:
    account = _current()
    parts: list[str] = []
    length = 0
    for value in values:
        account.value(value)
        parts.append(str(value))
        length += len(parts[-1])
        account.limit(length)
        account.charge(len(parts[-1]) >> 4)
    return "".join(parts)


@pass_context
def _finalize(context: jinja2.runtime.Context, value: Any) -> Any:
    _current().value(value)
    return value


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Unlike jinja2's own, this does not write < > & ' as escapes: the reader is a model, not a browser.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise RefusedError(str(message))


def _strftime_now(pattern: Any) -> str:
    if not isinstance(pattern, str) or len(pattern) > 200 or re.search(r"\d", pattern):
        raise LimitError("it asks for the date in a form that is not allowed")
    return datetime.now().strftime(pattern)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace; names with an underscore in front are Python's, not the template's."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")
        super().__setitem__(name, value)


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %} marks what an assistant said, for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _call_filter(name: str, value: nodes.Expr, lineno: int) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=lineno)


def _cost(body: list[nodes.Node]) -> int:
    """About how much work one pass over these nodes is, apart from loops and calls, which count for themselves."""
    cost, stack = 1, list(body)
    while stack:
        node = stack.pop()
        cost += 1 + (len(node.data) >> 4 if isinstance(node, nodes.TemplateData) else 0)
        stack += node.iter_child_nodes()
    return cost


class _Counters(NodeTransformer):
    """Builds the counters into a parsed template. They are filters, since a template cannot redefine a filter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self._count_body(node)
        if node.test is not None:
            node.test = nodes.And(_call_filter("__tick", nodes.Const(1), node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._count_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._count_body(node)

    def _count_body(self, node: Any) -> nodes.Node:
        tick = _call_filter("__tick", nodes.Const(_cost(node.body)), node.lineno)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._checked(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._checked(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        if node.ctx == "load":
            return self._checked(node)
        self.generic_visit(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call_filter("__concat", nodes.List(node.nodes, lineno=node.lineno), node.lineno)

    def _checked(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _call_filter("__checked", node, node.lineno)
