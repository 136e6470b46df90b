"""Reads the pickle in a PyTorch checkpoint without unpickling it: a small interpreter whose names do nothing.

A pickle is a program that may name any function of any module and have it called. Here a name is a constant: it is
looked up in a table that the caller gives, and one that is not in it is an error, so nothing is ever imported and
nothing but the caller's own functions is called. Only the opcodes that torch.save writes (protocol 2) are known. What
is built is numbers, texts, tuples, lists and dicts; nothing here walks over them, so deep or circular ones do no harm.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import shown

MAX_PICKLE_BYTES = 1 << 24
MAX_OPCODES = 1 << 20
MAX_VALUES = 1 << 18  # on the stack at a time, or in the memo
MAX_MARKS = 64
MAX_TEXT_BYTES = 1 << 12

Function = Callable[[tuple[Any, ...]], Any]


@dataclass(frozen=True)
class Name:
    """A global that the pickle names. `call`: what stands for calling it, None for one that is only mentioned."""

    name: str
    call: Function | None = None


Names = Mapping[str, Name]


def read_pickle(data: bytes, where: str, names: Names, persistent: Function) -> Any:
    """The value that the pickle describes.

    names: "module name" -> what may be named. persistent: makes a value of a persistent id (a storage). where: opens
    the message of each error. Raises ModelFormatError; those of `call` and `persistent` pass through.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ModelFormatError(f"{where}: {len(data)} bytes, at most {MAX_PICKLE_BYTES} are allowed")
    return _Interpreter(data, where, names, persistent).run()


class _Interpreter:
    def __init__(self, data: bytes, where: str, names: Names, persistent: Function) -> None:
        self._data, self._at, self._where = data, 0, where
        self._names, self._persistent = names, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        steps = 0
        while (code := self._take(1)) != b".":
            step = _OPCODES.get(code)
            if step is None:
                self._fail(f"opcode {shown(code)} is none that torch.save writes; such a file is not read")
            step(self)
            if len(self._stack) > MAX_VALUES or len(self._memo) > MAX_VALUES:
                self._fail(f"more than {MAX_VALUES} values at a time")
            steps += 1
            if steps > MAX_OPCODES:
                self._fail(f"more than {MAX_OPCODES} steps")
        if len(self._stack) != 1 or self._marks:
            self._fail(f"ends with {len(self._stack)} values, expected one")
        if self._at != len(self._data):
            self._fail(f"{len(self._data) - self._at} bytes follow the end")
        return self._stack[0]

    def _fail(self, message: str) -> NoReturn:
        raise ModelFormatError(f"{self._where}: at byte {self._at}: {message}")

    # ------------------------------------------------------------------------------------- bytes and the stack

    def _take(self, n: int) -> bytes:
        if n > len(self._data) - self._at:
            self._fail(f"{n} bytes expected, only {len(self._data) - self._at} are left; truncated or damaged?")
        self._at += n
        return self._data[self._at - n : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at, self._at + MAX_TEXT_BYTES)
        if end < 0:
            self._fail(f"a line that does not end within {MAX_TEXT_BYTES} bytes")
        text = self._text(end - self._at)
        self._at += 1
        return text

    def _text(self, n: int) -> str:
        if n > MAX_TEXT_BYTES:
            self._fail(f"a text of {n} bytes, at most {MAX_TEXT_BYTES} are allowed")
        try:
            return self._take(n).decode("utf-8")
        except UnicodeDecodeError:
            self._fail("a text that is not valid UTF-8")

    def _pop(self) -> Any:
        self._need(1)
        return self._stack.pop()

    def _need(self, n: int) -> None:
        """Raises unless `n` values lie above the last mark."""
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) - floor < n:
            self._fail("takes a value that is not there")

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            self._fail("takes values back to a mark that is not there")
        height = self._marks.pop()
        values = self._stack[height:]
        del self._stack[height:]
        return values

    def _top(self, kind: type, what: str) -> Any:
        self._need(1)
        value = self._stack[-1]
        if type(value) is not kind:
            self._fail(f"{what} a {describe(value)}, expected a {kind.__name__}")
        return value

    # ------------------------------------------------------------------------------------------------- opcodes

    def _protocol(self) -> None:
        found = self._number("<B")
        if found != 2:
            self._fail(f"pickle protocol {found}, expected 2, torch.save's own; save it again with the default")

    def _mark(self) -> None:
        if len(self._marks) >= MAX_MARKS:
            self._fail(f"nests deeper than {MAX_MARKS} levels")
        self._marks.append(len(self._stack))

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _long(self) -> None:
        n = self._number("<B")
        if n > 8:
            self._fail(f"an integer of {n} bytes, at most 8 are allowed")
        self._push(int.from_bytes(self._take(n), "little", signed=True))

    def _tuple(self, n: int) -> None:
        self._need(n)
        values = tuple(self._stack[len(self._stack) - n :])
        del self._stack[len(self._stack) - n :]
        self._push(values)

    def _put(self, key: int) -> None:
        self._need(1)
        self._memo[key] = self._stack[-1]

    def _get(self, key: int) -> None:
        if key not in self._memo:
            self._fail(f"takes value {key}, which it never kept")
        self._push(self._memo[key])

    def _global(self) -> None:
        module, name = self._line(), self._line()
        known = self._names.get(f"{module} {name}")
        if known is None:
            self._fail(
                f"names {shown(f'{module}.{name}')}, which no checkpoint needs: nothing is imported or run here; save"
                " the tensors alone, as safetensors or by torch.save(model.state_dict(), …)"
            )
        self._push(known)

    def _reduce(self) -> None:
        arguments = self._pop()
        function = self._pop()
        if type(function) is not Name or function.call is None or type(arguments) is not tuple:
            self._fail(f"calls a {describe(function)} with a {describe(arguments)}")
        try:
            self._push(function.call(arguments))
        except ModelFormatError as error:
            self._fail(f"{function.name}: {error}")

    def _persistent_id(self) -> None:
        key = self._pop()
        if type(key) is not tuple:
            self._fail(f"a storage named by a {describe(key)}, expected a tuple")
        try:
            self._push(self._persistent(key))
        except ModelFormatError as error:
            self._fail(str(error))

    def _build(self) -> None:
        """An OrderedDict's attributes (`_metadata` of a state_dict), which carry nothing that a model needs."""
        state = self._pop()
        if type(state) is not dict:
            self._fail(f"sets attributes from a {describe(state)}, expected a dict")
        self._top(dict, "sets attributes of")

    def _append(self, values: list[Any]) -> None:
        self._top(list, "appends to").extend(values)

    def _set(self, values: list[Any]) -> None:
        target = self._top(dict, "sets items of")
        if len(values) % 2:
            self._fail("sets a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                self._fail(f"a key that is a {describe(key)}, expected a text")
            if key in target:
                self._fail(f"key {shown(key)} appears twice")
            target[key] = value


def describe(value: Any) -> str:
    """What a value is, in a word or two; never looks into it."""
    if type(value) is Name:
        return value.name
    return "None" if value is None else type(value).__name__.lower()


def _pair(self: _Interpreter) -> list[Any]:
    value, key = self._pop(), self._pop()
    return [key, value]


_OPCODES: dict[bytes, Callable[[Any], None]] = {
    b"\x80": _Interpreter._protocol,
    b"(": _Interpreter._mark,
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"K": lambda m: m._push(m._number("<B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"J": lambda m: m._push(m._number("<i")),
    b"\x8a": _Interpreter._long,
    b"G": lambda m: m._push(m._number(">d")),
    b"X": lambda m: m._push(m._text(m._number("<I"))),
    b")": lambda m: m._push(()),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"t": lambda m: m._push(tuple(m._pop_to_mark())),
    b"]": lambda m: m._push([]),
    b"a": lambda m: m._append([m._pop()]),
    b"e": lambda m: m._append(m._pop_to_mark()),
    b"}": lambda m: m._push({}),
    b"s": lambda m: m._set(_pair(m)),
    b"u": lambda m: m._set(m._pop_to_mark()),
    b"q": lambda m: m._put(m._number("<B")),
    b"r": lambda m: m._put(m._number("<I")),
    b"h": lambda m: m._get(m._number("<B")),
    b"j": lambda m: m._get(m._number("<I")),
    b"c": _Interpreter._global,
    b"Q": _Interpreter._persistent_id,
    b"R": _Interpreter._reduce,
    b"b": _Interpreter._build,
}
