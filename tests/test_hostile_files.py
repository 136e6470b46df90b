"""Damaged and malicious containers: one test per defect of a safetensors or a GGUF file, each refused by name.

Containers that hold together but no model: test_hostile_models.py; random damage: test_hostile_random.py.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from pyllama.common.errors import ModelFormatError
from pyllama.common.safetensors import MAX_HEADER_BYTES, read_safetensors
from quantize.readers import open_source
from quantize.readers.gguf_file import read_gguf
from tests import make_sources as make
from tests.helpers_hostile import refused
from tests.make_sources import ARRAY, BOOL, F32, STRING, U8, U32, U64, GgufTensor, gguf_bytes, gguf_entry

# --- safetensors -----------------------------------------------------------------------------------------------------


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def header(*entries: Any, **named: Any) -> bytes:
    tensors = {f"t{i}": value for i, value in enumerate(entries)} | named
    return make.safetensors_bytes(tensors, b"abcd")


def raw(text: str | bytes, data: bytes = b"abcd") -> bytes:
    return make.safetensors_bytes(text, data)


ONE = json.dumps(entry())

BAD_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", r"holds 0 bytes"),
    "seven bytes": (b"\x02" + bytes(6), r"holds 7 bytes"),
    "length beyond the file": (make.safetensors_bytes("{}", claim=3), r"header claims 3 bytes, the file holds 2"),
    "length of 2^63": (make.safetensors_bytes("{}", claim=2**63), r"claims 9223372036854775808 bytes, at most"),
    "length of 2^64 - 1": (make.safetensors_bytes("{}", claim=2**64 - 1), r"at most 100000000 are allowed"),
    "length just above the cap": (make.safetensors_bytes("{}", claim=MAX_HEADER_BYTES + 1), r"at most 100000000"),
    "length of 0": (make.safetensors_bytes("", claim=0), r"not a JSON object"),
    "header that is a list": (raw("[]"), r"not a JSON object"),
    "header that is a number": (raw("17"), r"not a JSON object"),
    "header cut in the middle": (raw('{"t": {"dtype": "U8", '), r"header"),
    "bad UTF-8 in the header": (raw(b'{"\xff": ' + ONE.encode() + b"}"), r"not valid UTF-8"),
    "lone surrogate in a name": (raw('{"\\ud800": ' + ONE + "}"), r"not valid JSON in a tensor's name"),
    "garbage after the header": (raw('{"t": ' + ONE + "} {}"), r"goes on after its closing brace"),
    "trailing comma": (raw('{"t": ' + ONE + ",}"), r"expected a tensor's name"),
    "missing comma": (raw('{"t": ' + ONE + ' "u": ' + ONE + "}"), r"expected ','"),
    "missing colon": (raw('{"t" ' + ONE + "}"), r"expected ':'"),
    "control character in a name": (raw('{"a\nb": ' + ONE + "}"), r"not valid JSON"),
    "duplicate tensor": (raw('{"t": ' + ONE + ', "t": ' + ONE + "}"), r"names 't' twice"),
    "duplicate key in a tensor": (raw('{"t": {"dtype": "U8", "dtype": "I8"}}'), r"'dtype' appears twice"),
    "duplicate metadata": (raw('{"__metadata__": {"a": "1", "a": "2"}}'), r"'a' twice in __metadata__"),
    "metadata that is a list": (raw('{"__metadata__": []}'), r"__metadata__ that is not an object"),
    "metadata value that is a number": (raw('{"__metadata__": {"a": 1}}'), r"value of 'a' in __metadata__"),
    "deep nesting": (raw("[" * 200_000), r"not a JSON object"),
    "deep nesting in a tensor": (raw('{"t": ' + '{"a":' * 100_000), r"'t' by something else than a small flat"),
    "deep lists in a tensor": (raw('{"t": {"shape": ' + "[" * 2000 + "}}"), r"'t' by more lists"),
    "huge tensor description": (raw('{"t": {"shape": [' + "1," * 50_000 + "1]}}"), r"'t' by something else"),
    "tensor that is a list": (header([1, 2]), r"'t0' by something else"),
    "missing dtype": (header({"shape": [4], "data_offsets": [0, 4]}), r"'t0': expected exactly dtype"),
    "unknown key": (header(entry(color="red")), r"'t0': expected exactly dtype"),
    "unknown dtype": (header(entry(dtype="F7")), r"'t0': unknown dtype 'F7'"),
    "dtype that is a list": (header(entry(dtype=[])), r"unknown dtype|more lists"),
    "negative dimension": (header(entry(shape=[-4])), r"'t0': shape \[-4\]"),
    "dimension of 2^63": (header(entry(shape=[2**63])), r"'t0': shape \[9223372036854775808\]"),
    "fractional dimension": (header(entry(shape=[4.0])), r"'t0': shape \[4.0\]"),
    "boolean dimension": (header(entry(shape=[True, 4])), r"'t0': shape \[True, 4\]"),
    "nine dimensions": (header(entry(shape=[1] * 8 + [4])), r"'t0': shape"),
    "product that would wrap to 4": (header(entry(shape=[2**62, 4, 1, 4])), r"takes 73786976294838206464 bytes"),
    "product that would wrap to 0": (header(entry(shape=[2**32, 2**32], offsets=(0, 0))), r"span 0"),
    "size and offsets disagree": (header(entry(shape=[3])), r"'t0': U8 \[3\] takes 3 bytes, its data_offsets span 4"),
    "itemsize forgotten": (header(entry(dtype="F32")), r"F32 \[4\] takes 16 bytes"),
    "offsets swapped": (header(entry(offsets=(4, 0))), r"\[4, 0\] do not fit"),
    "offsets beyond the file": (header(entry(shape=[5], offsets=(0, 5))), r"\[0, 5\] do not fit in the 4 bytes"),
    "offset of 2^63": (header(entry(offsets=(2**63, 2**63 + 4))), r"not two positions"),
    "negative offset": (header(entry(offsets=(-4, 0))), r"\[-4, 0\] are not two positions"),
    "one offset": (header(entry(offsets=[4])), r"not two positions"),
    "overlap": (header(entry(), entry(shape=[2], offsets=(2, 4))), r"'t1' overlaps tensor 't0'"),
    "same bytes twice": (header(entry(), entry()), r"'t1' overlaps tensor 't0'"),
    "hole at the start": (header(entry(shape=[3], offsets=(1, 4))), r"hole of 1 bytes between the header and tensor"),
    "hole between": (header(entry(shape=[1], offsets=(0, 1)), entry(shape=[2], offsets=(2, 4))), r"hole of 1 bytes"),
    "bytes of nobody at the end": (header(entry(shape=[3], offsets=(0, 3))), r"1 bytes follow tensor 't0'"),
    "data without tensors": (raw("{}"), r"4 bytes follow the header"),
}


@pytest.mark.parametrize("defect", BAD_SAFETENSORS)
def test_bad_safetensors(tmp_path: Path, defect: str) -> None:
    content, pattern = BAD_SAFETENSORS[defect]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refused(read_safetensors, path, pattern)


def test_safetensors_cut_anywhere(tmp_path: Path) -> None:
    whole = make.safetensors_of({"a": ("F32", [2, 3], bytes(24)), "b": ("U8", [7], bytes(7))}, note="text")
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFormatError, match=r"cut\.safetensors"):
            read_safetensors(path)
    path.write_bytes(whole)
    assert read_safetensors(path).tensors.keys() == {"a", "b"}


# --- GGUF container --------------------------------------------------------------------------------------------------

META = [gguf_entry("a", U32, 1)]


def tensor(**changes: Any) -> GgufTensor:
    values = {"name": "t", "dims": (32, 1), "kind": 8, "data": bytes(34), "offset": None} | changes
    return GgufTensor(**values)


def one(**changes: Any) -> bytes:
    return gguf_bytes(META, [tensor(**changes)])


def meta(*entries: bytes, **options: Any) -> bytes:
    return gguf_bytes(entries, [], **options)


def entry_of(kind: int, value: bytes) -> bytes:
    return meta(make.gguf_string("k") + struct.pack("<I", kind) + value)


def nested(depth: int) -> bytes:
    return entry_of(ARRAY, struct.pack("<IQ", ARRAY, 1) * (depth - 1) + struct.pack("<IQ", U8, 0))


def aligned_to(kind: int, value: Any) -> bytes:
    return gguf_bytes([gguf_entry("general.alignment", kind, value)], [tensor()])


BAD_GGUF: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", r"does not start with GGUF"),
    "wrong magic": (gguf_bytes(META, [], magic=b"GGML"), r"does not start with GGUF"),
    "version 1": (gguf_bytes(META, [], version=1), r"GGUF version 1; versions 2 and 3"),
    "version 4": (gguf_bytes(META, [], version=4), r"GGUF version 4"),
    "version 0": (gguf_bytes(META, [], version=0), r"GGUF version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"big-endian"),
    "big-endian magic": (b"FUGG" + struct.pack(">IQQ", 3, 0, 0), r"big-endian"),
    "2^63 tensors": (meta(*META, n_tensors=2**63), r"tensor count is 9223372036854775808, at most"),
    "more tensors than bytes": (meta(*META, n_tensors=5000), r"tensor count is 5000, more than the \d+ bytes left"),
    "2^64 - 1 entries": (meta(*META, n_entries=2**64 - 1), r"metadata count is 18446744073709551615"),
    "more entries than bytes": (meta(*META, n_entries=60000), r"metadata count is 60000, more than"),
    "one entry more than there are": (meta(*META, n_entries=2), r"metadata entry 1 has an empty key"),
    "key length 2^63": (meta(make.gguf_string("k", claim=2**63)), r"key of metadata entry 0 claims 922337203685477580"),
    "key longer than the cap": (meta(gguf_entry("k" * 300, U8, 0)), r"key of metadata entry 0 claims 300 bytes"),
    "string length 2^63": (entry_of(STRING, make.gguf_string("x", claim=2**63)), r"'k' claims 922337203685477580"),
    "string beyond the file": (entry_of(STRING, make.gguf_string("x", claim=9999)), r"'k' claims 9999 bytes, only"),
    "bad UTF-8 in a key": (meta(gguf_entry(b"\xff\xfe", U8, 0)), r"key of metadata entry 0 is not valid UTF-8"),
    "bad UTF-8 in a string": (entry_of(STRING, make.gguf_string(b"\xc3")), r"'k' is not valid UTF-8"),
    "bad UTF-8 in an array": (
        entry_of(ARRAY, struct.pack("<IQ", STRING, 2) + make.gguf_string("x") + make.gguf_string(b"\xed\xa0\x80")),
        r"'k', element 1 is not valid UTF-8",
    ),
    "array of strings that runs out": (
        entry_of(ARRAY, struct.pack("<IQ", STRING, 3) + make.gguf_string("x") + make.gguf_string("y", claim=77)),
        r"'k', element 1 claims 77 bytes|more than the \d+ bytes left",
    ),
    "string of 2^63 in an array": (
        entry_of(ARRAY, struct.pack("<IQ", STRING, 2) + make.gguf_string("x") + make.gguf_string("y", claim=2**63)),
        r"'k', element 1 claims 9223372036854775808",
    ),
    "unknown value type": (entry_of(13, bytes(8)), r"'k' has the unknown value type 13"),
    "unknown element type": (entry_of(ARRAY, struct.pack("<IQ", 99, 1)), r"'k' has the unknown value type 99"),
    "array of 2^63": (entry_of(ARRAY, struct.pack("<IQ", U8, 2**63)), r"'k': element count is 9223372036854775808"),
    "array beyond the file": (entry_of(ARRAY, struct.pack("<IQ", U64, 1000)), r"'k': element count is 1000, more than"),
    "array whose bytes would wrap": (entry_of(ARRAY, struct.pack("<IQ", U64, 2**61)), r"'k': element count is"),
    "deep arrays": (nested(5), r"'k': arrays nest deeper than 4"),
    "very deep arrays": (nested(100_000), r"'k': arrays nest deeper than 4"),
    "boolean of 2": (entry_of(BOOL, b"\x02"), r"'k' holds the byte 2, expected 0 or 1"),
    "duplicate key": (meta(*META, *META), r"metadata key 'a' appears twice"),
    "alignment 0": (aligned_to(U32, 0), r"general.alignment is 0, expected a power of two"),
    "alignment 3": (aligned_to(U32, 3), r"general.alignment is 3"),
    "alignment 2^40": (aligned_to(U64, 2**40), r"general.alignment is 1099511627776"),
    "alignment that is text": (aligned_to(STRING, "32"), r"general.alignment is '32'"),
    "alignment that is true": (aligned_to(BOOL, 1), r"general.alignment is True"),
    "no dimensions": (one(dims=()), r"'t' has 0 dimensions"),
    "five dimensions": (one(dims=(32, 1, 1, 1, 1)), r"'t' has 5 dimensions"),
    "dimension 0": (one(dims=(32, 0)), r"'t' has dimensions \[32, 0\]"),
    "dimension 2^63": (one(dims=(2**63, 1)), r"'t' has dimensions \[9223372036854775808, 1\]"),
    "product that would wrap": (one(dims=(2**32, 2**32)), r"'t' claims \d{20} bytes at offset \d+, the file holds"),
    "four huge dimensions": (one(dims=(2**40,) * 4), r"'t' claims \d+ bytes"),
    "unknown type": (one(kind=200), r"'t' has type unknown \(200\)"),
    "type of 2^32 - 1": (one(kind=2**32 - 1), r"'t' has type unknown"),
    "type that is not read": (one(kind=16), r"'t' has type IQ2_XXS \(16\), which is not supported; .* Q6_K"),
    "rows of half a block": (one(dims=(16, 2)), r"rows of 16 weights are no multiple of Q8_0's block of 32"),
    "rows of an eighth of a block": (one(kind=12), r"rows of 32 weights are no multiple of Q4_K's block of 256"),
    "blocks beyond the file": (one(kind=12, dims=(256, 2)), r"'t' claims 288 bytes at offset \d+, the file holds"),
    "tensor beyond the file": (one(dims=(32, 2)), r"'t' claims 68 bytes at offset \d+, the file holds"),
    "offset beyond the file": (one(offset=4096), r"'t' claims 34 bytes at offset \d+"),
    "offset of 2^64 - 32": (one(offset=2**64 - 32), r"'t' claims 34 bytes at offset 1844674407370955\d+"),
    "offset off the alignment": (one(offset=8), r"'t' starts at offset 8, expected a multiple of the alignment 32"),
    "duplicate tensor": (gguf_bytes(META, [tensor(), tensor()]), r"'t' appears twice"),
    "overlap": (gguf_bytes(META, [tensor(), tensor(name="u", offset=32)]), r"'u' overlaps tensor 't'"),
    "hole": (gguf_bytes(META, [tensor(), tensor(name="v"), tensor(name="u", offset=0)][:1] + [
        tensor(name="u", offset=128, data=bytes(200))]), r"hole of \d+ bytes between tensor 't' and tensor 'u'"),
    "empty name": (one(name=""), r"a tensor has an empty name"),
    "name that is too long": (one(name="n" * 256), r"tensor name claims 256 bytes"),
    "name in bad UTF-8": (one(name=b"\x80"), r"tensor name is not valid UTF-8"),
    "name with control characters": (one(name="a\x1b[31m\n", kind=99), r"'a\\x1b\[31m\\n' has type unknown"),
}  # fmt: skip


@pytest.mark.parametrize("defect", BAD_GGUF)
def test_bad_gguf(tmp_path: Path, defect: str) -> None:
    content, pattern = BAD_GGUF[defect]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    refused(read_gguf, path, pattern)
    refused(open_source, path, "")


def test_gguf_cut_anywhere(tmp_path: Path) -> None:
    whole = gguf_bytes(
        [*META, gguf_entry("s", ARRAY, (STRING, ["ab", "c"])), gguf_entry("f", F32, 0.5)],
        [tensor(), GgufTensor("u", (3,), 0, bytes(12))],
    )
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFormatError, match=r"cut\.gguf"):
            read_gguf(path)
    path.write_bytes(whole)
    assert read_gguf(path).tensors.keys() == {"t", "u"}


def test_arrays_that_are_too_long_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    half = struct.pack("<IIQ", ARRAY, U8, (1 << 21) + 1) + bytes((1 << 21) + 1)
    path.write_bytes(meta(make.gguf_string("k") + half, make.gguf_string("l") + half))
    with pytest.raises(ModelFormatError, match=r"'l': arrays hold more than 4194304 elements together"):
        read_gguf(path)
