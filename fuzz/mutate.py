"""Damages foreign files by what they are made of: a container is taken apart, something in it is changed, and it is put
together again so that lengths, counts, offsets and checksums agree, or one of them lies.

Plain damage (cuts, flips, extremes, moved pieces) is for every file, and for those that cannot be taken apart any more.
Nothing here reads a file as our readers do, and no result needs to make sense.
"""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
SNIPPETS = [b"0", b"9", b"-1", b'"', b",", b":", b"[", b"]", b"{", b"}", b"99999999999", b"1e999", b"null", b"\x00"]

Damage = Callable[[bytes, random.Random], bytes]
words: list[str] = ["weight"]  # what readers look for: branches.words


def plain(content: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, overwritten by extremes and by JSON's words, or with a piece moved; mostly near the ends."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        near = rng.choice([len(out), min(len(out), 1500), min(len(out), 200)])
        at = rng.randrange(near) if near else 0
        if near < len(out) and rng.random() < 0.3:
            at = len(out) - 1 - at  # a zip's folder stands at its end
        match rng.randrange(7):
            case 0:
                del out[at:]
            case 1 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
            case 3:
                out[at : at + rng.randint(0, 3)] = rng.choice(SNIPPETS)
            case 4:
                del out[at : at + rng.randint(1, 16)]
            case 5:
                out[at : at + rng.randint(0, 8)] = rng.choice(words).encode()
            case _:
                out[at:at] = out[at : at + rng.randint(1, 64)]
    return bytes(out)


def by(taken_apart: Damage, share: float = 0.75) -> Damage:
    """Mostly by structure, now and then plainly, sometimes both; what cannot be taken apart plainly."""

    def damage(content: bytes, rng: random.Random) -> bytes:
        if rng.random() < share:
            try:
                content = taken_apart(content, rng)
            except Exception:  # damaged before, in any way
                return plain(content, rng)
            return plain(content, rng) if rng.random() < 0.1 else content
        return plain(content, rng)

    return damage


# ----------------------------------------------------------------------------------------------------------------- JSON


def number(rng: random.Random, near: float = 0) -> Any:
    """A number that readers stumble over, or one beside `near`."""
    if rng.random() < 0.5:
        return rng.choice([near + 1, near - 1, near * 2, -near, near / 2, near + 0.5, int(near)])
    return rng.choice([*EXTREMES, -1, 2, 3, 7, 1 << 16, 1 << 20, 10**30, 0.0, -0.0, 0.5, 1e-45, 1e38, 1e300, -1e9])


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind < 3:
        return number(rng)
    if kind < 5:
        return rng.choice(words)
    if kind == 5:
        return rng.choice(["", "\0", "é\ud800", "a" * 300, "[" * 40, "1", "nan", "../x", "%s", "\n", "<s>", "{}"])
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 3, 20]))]
    return {str(rng.choice(words)): value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 3]))}


def _places(tree: Any, inside: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    inside = [] if inside is None else inside
    if len(inside) < 5000:
        for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
            inside.append((tree, key))
            _places(tree[key], inside)
    return inside


def change_tree(tree: Any, rng: random.Random) -> None:
    """Changes one thing in a tree of dicts and lists."""
    places = _places(tree)
    if not places:
        if isinstance(tree, dict):
            tree[rng.choice(words)] = value(rng)
        return
    holder, key = rng.choice(places)
    if rng.random() < 0.3:  # what stands high in a tree would seldom be met otherwise
        holder, key = rng.choice([place for place in places if place[0] is tree])
    old = holder[key]
    match rng.randrange(9):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(words)] = holder.pop(key)
        case 1 if isinstance(holder, list):
            holder.insert(key, rng.choice([old, value(rng)]))
        case 2 | 3 if isinstance(old, (int, float)):
            holder[key] = number(rng, old)
        case 2 if isinstance(old, str):
            holder[key] = changed_text(old, rng)
        case 3 if isinstance(old, list):
            holder[key] = rng.choice([old[::-1], old[:-1], [*old, *old], [old], [*old, 1], [], [1, *old]])
        case 4:
            other, which = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[which]))
        case 5 if isinstance(tree, dict):
            tree[rng.choice(words)] = value(rng)
        case 6 if isinstance(old, dict):
            old[rng.choice(words)] = value(rng)
        case _:
            holder[key] = value(rng)


def changed_text(text: str, rng: random.Random) -> str:
    """A text that may itself be JSON, as in our metadata."""
    if text.startswith(("{", "[")):
        return json_text(text.encode(), rng).decode("utf-8", "replace")
    at = rng.randint(0, len(text))
    some = rng.choice(["", rng.choice(words), "/", "\0", "é", "9", "-1", " ", ".", text])
    return text[:at] + some + text[at + rng.choice([0, 0, 1, len(text)]) :]


def json_text(content: bytes, rng: random.Random) -> bytes:
    """Changes values, kinds and keys; sometimes what only the text can have, as a key that stands twice."""
    tree = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        change_tree(tree, rng)
    if rng.random() < 0.05 and isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        return b"{" + json.dumps(key).encode() + b": 1, " + json.dumps(tree).encode()[1:]
    return json.dumps(tree, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def json_lines(content: bytes, rng: random.Random) -> bytes:
    """A file of a JSON object per line."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, rng.choice(lines))
        case 2:
            rng.shuffle(lines)
        case _:
            lines[at] = json_text(lines[at], rng)
    return b"\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- safetensors

_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U32": 4}
_DTYPES |= {"F8_E4M3": 1, "U64": 8, "U16": 2}


def safetensors(content: bytes, rng: random.Random) -> bytes:
    """Changes tensors and lays them out again, so that a shape of 0 or 3 sides or another type is a sound file's."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    parts = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            parts[name] = data[first:end]
    for _ in range(rng.choice([1, 1, 2, 4])):
        if parts and rng.random() < 0.7:
            _change_tensor(header, parts, rng)
        else:
            change_tree(header, rng)
    if rng.random() < 0.85:
        data = _laid_out(header, parts)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % rng.choice([1, 8, 64, 64]))
    return struct.pack("<Q", len(text)) + text + data


def _change_tensor(header: dict[str, Any], parts: dict[str, bytes], rng: random.Random) -> None:
    name = rng.choice([name for name in header if name in parts] or [""])
    entry = header[name]
    match rng.randrange(9):
        case 0:
            entry["dtype"] = rng.choice(list(_DTYPES))
        case 1:
            del header[name]
        case 2:
            header[changed_text(name, rng)] = header.pop(name)
            parts.update({other: parts[name] for other in header if other not in parts})
        case 3:
            other = rng.choice(list(parts))
            header[other] = dict(entry)
            parts[other] = parts[name]
        case 4 if parts[name]:
            parts[name] = plain(parts[name], rng)
        case 5 if parts[name]:
            raw = bytearray(parts[name])
            at = rng.randrange(len(raw))
            raw[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\xc0\x7f", b"\0\xfc\0\xfc", b"\0\0\0\x80"])
            parts[name] = bytes(raw)
        case _:
            entry["shape"] = changed_shape(entry["shape"], rng)


def changed_shape(shape: Sequence[int], rng: random.Random) -> list[int]:
    """Fewer sides or more, longer ones or shorter, empty ones."""
    sides = list(shape)
    at = rng.randrange(len(sides)) if sides else 0
    match rng.randrange(8):
        case 0:
            return []
        case 1:
            return [*sides[:at], 1, *sides[at:]]
        case 2:
            return sides[:at] + sides[at + 1 :]
        case 3:
            return sides[::-1]
        case 4 if len(sides) > 1:
            return [sides[0] * sides[1], *sides[2:]]
        case 5 if sides:
            sides[at] = rng.choice([0, 1, 2, 2**32, 2**63])
        case 6 if sides:
            sides[at] //= 2
        case 7 if sides:
            sides[at] *= 2
        case _ if sides:
            sides[at] += rng.choice([-1, 1, 32, -32])
    return sides


def _laid_out(header: dict[str, Any], parts: dict[str, bytes]) -> bytes:
    """Gives every tensor bytes for its type and shape, one behind the other."""
    out = b""
    for name, entry in header.items():
        if name == "__metadata__" or not isinstance(entry, dict):
            continue
        size = sized(entry["shape"], _DTYPES[entry["dtype"]])
        entry["data_offsets"] = [len(out), len(out) + size]
        out += filled(parts.get(name, b""), size)
    return out


def sized(shape: Sequence[int], each: int) -> int:
    """Bytes of a shape; ValueError where a file would be too large to write."""
    size = each
    for side in shape:
        size *= side
    if not 0 <= size <= 1 << 18:
        raise ValueError("too large")
    return size


def filled(data: bytes, size: int) -> bytes:
    """`data`, repeated or cut."""
    data = data or b"\0\x3c"
    return (data * (size // len(data) + 1))[:size]


# ---------------------------------------------------------------------------------------------- SentencePiece, tiktoken


def protobuf(content: bytes, rng: random.Random) -> bytes:
    """Changes fields of a message, or of the messages in it, whose lengths follow."""
    fields = _fields(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(fields))
        number_, wire, held = fields[at]
        match rng.randrange(9):
            case 0:
                del fields[at]
            case 1:
                fields.insert(at, rng.choice(fields))
            case 2:
                fields[at] = (rng.choice([0, 1, 2, 3, 4, 5, 15, 2**28]), wire, held)
            case 3:
                fields[at] = (number_, rng.choice([0, 1, 2, 5]), held)
            case 4 | 5 if wire == 2:
                fields[at] = (number_, 2, protobuf(held, rng))
            case 6 if wire == 0:
                fields[at] = (number_, 0, _varint(int(abs(number(rng, held[0] if held else 0))) & (2**70 - 1)))
            case _:
                fields[at] = (number_, wire, plain(held, rng))
    return b"".join(_field(*field) for field in fields)


def _fields(content: bytes) -> list[tuple[int, int, bytes]]:
    out, at = [], 0
    while at < len(content):
        key, at = _read_varint(content, at)
        wire = key & 7
        if wire == 0:
            end = _read_varint(content, at)[1]
        elif wire == 2:
            length, at = _read_varint(content, at)
            end = at + length
        else:
            end = at + {1: 8, 5: 4}[wire]
        if end > len(content):
            raise ValueError("no message")
        out.append((key >> 3, wire, content[at:end]))
        at = end
    return out


def _field(number_: int, wire: int, held: bytes) -> bytes:
    return _varint(number_ << 3 | wire) + (_varint(len(held)) if wire == 2 else b"") + held


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    n = shift = 0
    while True:
        byte = content[at]
        at, n, shift = at + 1, n | (byte & 127) << shift, shift + 7
        if byte < 128:
            return n, at


def ranks(content: bytes, rng: random.Random) -> bytes:
    """Lines of tiktoken's file: a token in base64 and its rank."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    token, _, rank = lines[at].partition(b" ")
    match rng.randrange(7):
        case 0:
            del lines[at]
        case 1:
            lines.insert(rng.randrange(len(lines)), lines[at])
        case 2:
            lines[at] = token + b" " + str(number(rng, int(rank or b"0"))).encode()
        case 3:
            lines[at] = base64.b64encode(plain(base64.b64decode(token), rng)) + b" " + rank
        case 4:
            del lines[at:]
        case 5:
            lines[at] = rng.choice(
                [b"", b" ", token, rank, token + b"  " + rank, token + b"\t" + rank, b"=" + lines[at]]
            )
        case _:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
    return b"\n".join(lines)


# ------------------------------------------------------------------------------------------------------- chat templates

_EXPRESSIONS = [
    "messages", "messages[0]", "messages[0]['content']", "messages|length", "range(99999999)", "'a' * 99999999",
    "2 ** 99999", "loop", "loop.index0", "namespace(a=[])", "[1] * 9999999", "'%9999999d' % 1",
    "'{:>9999999}'.format(1)", "x", "''.join(messages)", "messages|tojson(indent=9999)",
    "messages|map('upper')|list", "''.__class__", "messages.__init__", "cycler('a', 'b')", "lipsum(99)",
    "dict(a=messages)", "raise_exception('no')", "strftime_now('%Y' * 9999)", "bos_token * 3", "x ~ x", "-x",
    "messages|selectattr('role')|list", "messages|groupby('role')|list", "messages[::-1]", "messages[0:99999:2]",
    "('a' ~ x)[0]", "'a'.replace('', 'bbbb')", "'a b'.split()", "messages|sum(start=[])", "'a'|center(99999)",
    "messages|batch(99999, 1)|list", "joiner('x')", "self", "caller()", "messages == messages", "'é' in x",
    "1 // 0", "x.append(x)", "x|attr('__class__')", "messages|first|string|wordwrap(1)", "10 ** 10 ** 10",
    "'x'|indent(99999)", "[messages, messages]|tojson", "{}.items()|list",
]  # fmt: skip
_BLOCKS = [
    "{{% for x in {} %}}{}{{% endfor %}}",
    "{{% for x in {} recursive %}}{{{{ loop(x) }}}}{}{{% endfor %}}",
    "{{% if {} %}}{}{{% endif %}}",
    "{{% set x = {} %}}{}",
    "{{% set ns = namespace(x={}) %}}{}{{% set ns.x = ns.x ~ ns.x %}}",
    "{{% macro m(a) %}}{{{{ {} }}}}{}{{{{ m(a) }}}}{{% endmacro %}}{{{{ m(1) }}}}",
    "{{{{ {} }}}}{}",
    "{{% generation %}}{{{{ {} }}}}{}{{% endgeneration %}}",
    "{{% filter upper %}}{{{{ {} }}}}{}{{% endfilter %}}",
    "{{% call(u) {} %}}{}{{% endcall %}}",
    "{{%- set x %}}{{{{ {} }}}}{}{{% endset -%}}",
    "{{% include {} %}}{}",
    "{{% break %}}{}{}",
]


def template(content: bytes, rng: random.Random) -> bytes:
    """Puts blocks into each other and expressions into their places."""
    text = content.decode()
    block = rng.choice(_BLOCKS).format(rng.choice([*_EXPRESSIONS, "x", "messages"]), rng.choice([text, "x", "{{ x }}"]))
    match rng.randrange(5):
        case 0:
            return block.encode()
        case 1:
            at = text.find("}}") if "}}" in text else len(text)
            return (text[:at] + "|" + rng.choice(words) + text[at:]).encode()
        case 2:
            return text.replace("x", rng.choice(_EXPRESSIONS), 1).encode()
        case 3:
            return (text + block).encode()
        case _:
            at = rng.randint(0, len(text))
            return (text[:at] + block + text[at:]).encode()
