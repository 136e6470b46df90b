"""Damaged and malicious checkpoints: one test per defect, each a ModelFormatError that names the file and the thing.

Below the tables, hypothesis cuts and flips bytes of valid files: they load or raise ModelFormatError, in little memory.
Files that are fine are test_readers.py's affair.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import BoundedFile, parse_json, read_json
from pyllama.common.safetensors import MAX_HEADER_BYTES, read_safetensors
from quantize.readers import open_source
from quantize.readers.gguf import read_gguf
from tests import make_sources as make
from tests.make_sources import ARRAY, BOOL, F32, STRING, U8, U32, U64, GgufTensor, Shape, gguf_bytes, gguf_entry

SMALL = Shape(dim=32, hidden_dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, vocab_size=9)
WEIGHTS = make.random_weights(SMALL)


@contextlib.contextmanager
def little_memory(limit_bytes: int = 8 << 20) -> Iterator[None]:
    """Fails when more than `limit_bytes` are allocated at once inside."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= limit_bytes, f"{peak} bytes at once"


def refused(opener: Callable[[Path], Any], path: Path, pattern: str) -> None:
    with little_memory(), pytest.raises(ModelFormatError) as caught:
        opener(path)
    message = str(caught.value)
    assert re.search(pattern, message), f"{message!r} does not match {pattern!r}"
    assert path.name in message and len(message) < 1000 and message.isprintable(), message


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
    "type that is not read yet": (one(kind=12), r"'t' has type Q4_K \(12\), which is not supported; .* Q6_K"),
    "rows of half a block": (one(dims=(16, 2)), r"rows of 16 weights are no multiple of Q8_0's block of 32"),
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


# --- GGUF models -----------------------------------------------------------------------------------------------------

BAD_GGUF_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"general__architecture": None}, r"general.architecture: found None"),
    "unknown architecture": ({"general__architecture": (STRING, "mamba")}, r"'mamba' is not supported; .*llama"),
    "architecture that is a number": ({"general__architecture": (U32, 3)}, r"general.architecture: found 3"),
    "no embedding length": ({"llama__embedding_length": None}, r"llama.embedding_length: missing"),
    "embedding length 0": ({"llama__embedding_length": (U32, 0)}, r"llama.embedding_length: found 0, expected"),
    "embedding length 2^62": ({"llama__embedding_length": (U64, 2**62)}, r"llama.embedding_length: found 46116860"),
    "layers as text": ({"llama__block_count": (STRING, "1")}, r"llama.block_count: found '1'"),
    "too few layers": ({"llama__block_count": (U32, 2)}, r"tensor blk.1.attn_norm.weight .* is missing"),
    "a million layers": ({"llama__block_count": (U32, 10**6)}, r"llama.block_count: found 1000000"),
    "heads that do not divide": ({"llama__attention__head_count_kv": (U32, 3)}, r"head_count_kv: found 3, .*divisor"),
    "more kv heads than heads": ({"llama__attention__head_count_kv": (U32, 4)}, r"head_count_kv: found 4"),
    "odd head": ({"llama__attention__key_length": (U32, 15)}, r"key_length: found 15, expected an even"),
    "heads per layer differ": (
        {"llama__attention__head_count_kv": (ARRAY, (U32, [1, 2]))},
        r"head_count_kv: differs between layers",
    ),
    "epsilon NaN": ({"llama__attention__layer_norm_rms_epsilon": (F32, float("nan"))}, r"epsilon: found nan"),
    "epsilon 0": ({"llama__attention__layer_norm_rms_epsilon": (F32, 0.0)}, r"epsilon: found 0.0"),
    "rope base infinite": ({"llama__rope__freq_base": (F32, float("inf"))}, r"freq_base: found inf"),
    "part of the head rotated": ({"llama__rope__dimension_count": (U32, 8)}, r"dimension_count: found 8, expected"),
    "other value length": ({"llama__attention__value_length": (U32, 32)}, r"value_length: found 32"),
    "experts": ({"llama__expert_count": (U32, 8)}, r"llama.expert_count: found 8, only 0"),
    "sliding window": ({"llama__attention__sliding_window": (U32, 64)}, r"sliding_window: found 64"),
    "split": ({"split__count": (make.U16, 3)}, r"split.count: this is one part"),
    "unknown rope scaling": ({"llama__rope__scaling__type": (STRING, "longrope")}, r"scaling.type: found 'longrope'"),
    "rope factor NaN": (
        {"llama__rope__scaling__type": (STRING, "linear"), "llama__rope__scaling__factor": (F32, float("nan"))},
        r"scaling.factor: found nan",
    ),
    "rope factor for attention without yarn": (
        {"llama__rope__scaling__attn_factor": (F32, 2.0)},
        r"attn_factor: found without yarn",
    ),
    "yarn mixed by half": (
        {
            "llama__rope__scaling__type": (STRING, "yarn"),
            "llama__rope__scaling__factor": (F32, 4.0),
            "llama__rope__scaling__yarn_ext_factor": (F32, 0.5),
        },
        r"yarn_ext_factor: found 0.5, only 1",
    ),
    "clamped keys": ({"llama__attention__clamp_kqv": (F32, 8.0)}, r"clamp_kqv: found 8.0, only 0"),
    "attention scale": ({"llama__attention__scale": (F32, 0.5)}, r"attention.scale: found 0.5"),
    "bos beyond the vocabulary": ({"tokenizer__ggml__bos_token_id": (U32, 9)}, r"bos_token_id: found 9, expected .* 8"),
    "eos of 2^32 - 1": ({"tokenizer__ggml__eos_token_id": (U32, 2**32 - 1)}, r"eos_token_id: found 4294967295"),
    "vocabulary of another size": (
        {"tokenizer__ggml__tokens": (ARRAY, (STRING, ["a", "b", "c"]))},
        r"token_embd.weight \(tok_embeddings\): shape \[9, 32\], expected \[3, 32\]",
    ),
    "vocabulary that is a number": ({"tokenizer__ggml__tokens": (U32, 5)}, r"tokenizer.ggml.tokens: expected a list"),
}


@pytest.mark.parametrize("defect", BAD_GGUF_MODELS)
def test_bad_gguf_model(tmp_path: Path, defect: str) -> None:
    changes, pattern = BAD_GGUF_MODELS[defect]
    refused(open_source, make.write_gguf(tmp_path / "bad.gguf", SMALL, WEIGHTS, **changes), pattern)


def test_vocabulary_of_an_unknown_kind(tmp_path: Path) -> None:
    path = make.write_gguf(tmp_path / "bad.gguf", SMALL, WEIGHTS, tokenizer__ggml__model=(STRING, "sorcery"))
    source = open_source(path)
    refused(lambda _: source.tokenizer_files(), path, r"tokenizer.ggml.model .*'sorcery'")


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        (GgufTensor("blk.0.secret.weight", (4,), 0, bytes(16)), r"'blk.0.secret.weight' does not belong to a llama"),
        (GgufTensor("rope_factors_long.weight", (8,), 0, bytes(32)), r"'rope_factors_long.weight' does not belong"),
        (GgufTensor("blk.0.ffn_up.bias", (32,), 0, b"\1" * 128), r"blk.0.ffn_up.bias is not zero"),
        (GgufTensor("rope_freqs.weight", (7,), 0, bytes(28)), r"rope_freqs.weight is F32 \[7\], expected F32 \[8\]"),
        (GgufTensor("rope_freqs.weight", (8,), 0, bytes(32)), r"rope_freqs.weight holds factors that are not finite"),
        (GgufTensor("blk.0.attn_q.bias", (32,), 0, bytes(128)), r"blk.0.attn_k.bias \(layers.0.bk\) is missing"),
    ],
)
def test_gguf_tensors_that_do_not_belong(tmp_path: Path, extra: GgufTensor, pattern: str) -> None:
    refused(open_source, make.write_gguf(tmp_path / "bad.gguf", SMALL, WEIGHTS, extra=[extra]), pattern)


@pytest.mark.parametrize("missing", ["norm", "tok_embeddings", "layers.0.wk", "layers.0.mlp_norm"])
def test_gguf_missing_tensor(tmp_path: Path, missing: str) -> None:
    left = {name: values for name, values in WEIGHTS.items() if name != missing}
    pattern = rf"{re.escape(make.gguf_name(missing))} \({missing}\) is missing"
    refused(open_source, make.write_gguf(tmp_path / "bad.gguf", SMALL, left), pattern)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_gguf_values_that_are_not_finite(tmp_path: Path, kind: str, bad: float) -> None:
    tensors = make.llama_tensors(SMALL, WEIGHTS, kind)
    at = next(i for i, t in enumerate(tensors) if t.name == "blk.0.attn_k.weight")
    code = {"F32": "<f", "BF16": None}.get(kind, "<e")
    number = struct.pack(code, bad) if code else struct.pack("<f", bad)[2:]
    tensors[at].data = number + tensors[at].data[len(number) :]
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes(make.llama_entries(SMALL), tensors))
    found = open_source(path).tensors["layers.0.wk"]
    refused(lambda _: found.read(), path, r"'blk.0.attn_k.weight' \(layers.0.wk\): \d+ of 512 values are not finite")
    refused(lambda _: found.read_packed(), path, r"\(layers.0.wk\): 1 of \d+ (values|scales) are not finite")


def test_yarn_together_with_factors(tmp_path: Path) -> None:
    factors = GgufTensor("rope_freqs.weight", (8,), 0, np.full(8, 2, "<f4").tobytes())
    changes: dict[str, Any] = {
        "llama__rope__scaling__type": (STRING, "yarn"),
        "llama__rope__scaling__factor": (F32, 4.0),
    }
    path = make.write_gguf(tmp_path / "bad.gguf", SMALL, WEIGHTS, extra=[factors], **changes)
    refused(open_source, path, r"yarn together with the tensor rope_freqs.weight")


def test_arrays_that_are_too_long_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    half = struct.pack("<IIQ", ARRAY, U8, (1 << 21) + 1) + bytes((1 << 21) + 1)
    path.write_bytes(meta(make.gguf_string("k") + half, make.gguf_string("l") + half))
    with pytest.raises(ModelFormatError, match=r"'l': arrays hold more than 4194304 elements together"):
        read_gguf(path)


def test_q4_1_minimum_that_is_not_finite(tmp_path: Path) -> None:
    tensors = make.llama_tensors(SMALL, WEIGHTS, "Q4_1")
    at = next(i for i, t in enumerate(tensors) if t.name == "blk.0.ffn_up.weight")
    tensors[at].data = tensors[at].data[:2] + struct.pack("<e", float("inf")) + tensors[at].data[4:]
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes(make.llama_entries(SMALL), tensors))
    found = open_source(path).tensors["layers.0.w_up"]
    refused(lambda _: found.read(), path, r"\(layers.0.w_up\): 32 of 1024 values are not finite")
    refused(lambda _: found.read_packed(), path, r"\(layers.0.w_up\): 1 of 32 offsets are not finite")


# --- Hugging Face folders --------------------------------------------------------------------------------------------

BAD_HF_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"architectures": ["GPT2LMHeadModel"]}, r"'GPT2LMHeadModel' is not supported; .*Llama"),
    "no architecture at all": ({"architectures": ..., "model_type": ...}, r"architecture None is not supported"),
    "two architectures": ({"architectures": ["LlamaForCausalLM", "X"]}, r"architectures: found"),
    "architectures as text": ({"architectures": "LlamaForCausalLM"}, r"architectures: found 'LlamaForCausalLM'"),
    "no hidden_size": ({"hidden_size": ...}, r"config.json: hidden_size: missing"),
    "hidden_size as text": ({"hidden_size": "32"}, r"hidden_size: found '32'"),
    "hidden_size fractional": ({"hidden_size": 32.0}, r"hidden_size: found 32.0"),
    "hidden_size true": ({"hidden_size": True}, r"hidden_size: found True"),
    "hidden_size negative": ({"hidden_size": -32}, r"hidden_size: found -32"),
    "hidden_size 2^70": ({"hidden_size": 2**70}, r"hidden_size: found 11805916"),
    "heads do not divide": ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": ...}, r"3 heads do not"),
    "kv heads do not divide": ({"num_key_value_heads": 3}, r"num_key_value_heads: found 3"),
    "odd head_dim": ({"head_dim": 7}, r"head_dim: found 7, expected an even"),
    "vocab_size 0": ({"vocab_size": 0}, r"vocab_size: found 0"),
    "epsilon negative": ({"rms_norm_eps": -1e-5}, r"rms_norm_eps: found -1e-05"),
    "theta as list": ({"rope_theta": [1]}, r"rope_theta: found \[1\]"),
    "theta of 10^400": ({"rope_theta": 10**400}, r"rope_theta: found 1000"),
    "gelu": ({"hidden_act": "gelu"}, r"hidden_act: found 'gelu', only 'silu'"),
    "mlp_bias": ({"mlp_bias": True}, r"mlp_bias: biases in the MLP"),
    "flag as text": ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings: found 'yes'"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config: quantized"),
    "window": ({"sliding_window": 64}, r"sliding_window: found 64, shorter than max_position_embeddings 128"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: found 0.5"),
    "rope_scaling as text": ({"rope_scaling": "linear"}, r"rope_scaling: found 'linear', expected an object"),
    "unknown rope_type": ({"rope_scaling": {"rope_type": "magic", "factor": 2}}, r"rope_type 'magic' is not supported"),
    "no rope factor": ({"rope_scaling": {"type": "linear"}}, r"rope_scaling: factor: missing"),
    "rope factor 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling: factor: found 0"),
    "rope object inside": (
        {"rope_scaling": {"type": "linear", "factor": 2, "x": {}}},
        r"rope_scaling: x: found \{\}, expected a number",
    ),
    "llama3 bounds swapped": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 1,
                "original_max_position_embeddings": 64,
            }
        },
        r"high_freq_factor: found 1, expected more",
    ),
    "rope told twice": (
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 4}},
        r"rope_scaling .* and rope_parameters .* disagree",
    ),
    "rope_parameters as list": ({"rope_parameters": []}, r"rope_parameters: found \[\]"),
    "bos beyond the vocabulary": ({"bos_token_id": 9}, r"bos_token_id: found 9, expected an integer of 0 to 8"),
    "eos list with text": ({"eos_token_id": [2, "3"]}, r"eos_token_id: found \[2, '3'\]"),
    "eos negative": ({"eos_token_id": -2}, r"eos_token_id: found -2"),
    "more layers than tensors": ({"num_hidden_layers": 2}, r"model.layers.1.input_layernorm.weight .* is missing"),
    "wrong width": (
        {"intermediate_size": 48},
        r"gate_proj.weight \(layers.0.w_gate\): shape \[32, 32\], expected \[48, 32\]; check intermediate_size",
    ),
    "wrong heads": (
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        r"q_proj.weight \(layers.0.wq\): shape \[32, 32\], expected \[64, 32\]; check num_attention_heads, head_dim",
    ),
    "biases promised": ({"attention_bias": True}, r"q_proj.bias \(layers.0.bq\) is missing"),
    "tied, but a head of its own": ({"tie_word_embeddings": True}, r"lm_head.weight differs from"),
}


@pytest.mark.parametrize("defect", BAD_HF_CONFIGS)
def test_bad_hf_config(tmp_path: Path, defect: str) -> None:
    changes, pattern = BAD_HF_CONFIGS[defect]
    refused(open_source, make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS, **changes), pattern)


def test_mistral_with_its_default_window(tmp_path: Path) -> None:
    """An absent sliding_window means 4096 there, so a longer context cannot be had."""
    folder = make.write_hf_folder(
        tmp_path / "bad-model",
        SMALL,
        WEIGHTS,
        architectures=["MistralForCausalLM"],
        max_position_embeddings=32768,
    )
    refused(open_source, folder, r"sliding_window: found 4096, shorter than max_position_embeddings 32768")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (b"[]", r"holds a JSON list, expected an object"),
        (b"", r"not valid JSON"),
        (b'{"a": 1, "a": 2}', r"key 'a' appears twice"),
        (b'{"a": NaN}', r"holds NaN"),
        (b'{"a": "\xff"}', r"not valid UTF-8"),
        (b"[" * 50_000, r"nests deeper than 32"),
        (b'{"a":' * 50_000, r"nests deeper than 32"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"not valid JSON"),
        (b" " * ((1 << 20) + 1), r"of 1048577 bytes, at most 1048576 are allowed"),
    ],
)
def test_bad_json(tmp_path: Path, text: bytes, pattern: str) -> None:
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS)
    (folder / "config.json").write_bytes(text)
    refused(open_source, folder, rf"config\.json.*{pattern}")
    refused(read_json, folder / "config.json", pattern)


def test_json_brackets_in_strings_do_not_nest() -> None:
    assert parse_json(b'{"a": "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\"[[["}', "x") == {"a": "[" * 36 + '"[[['}


def test_missing_and_extra_hf_tensors(tmp_path: Path) -> None:
    left = {name: values for name, values in WEIGHTS.items() if name != "layers.0.wo"}
    missing = make.write_hf_folder(tmp_path / "missing-model", SMALL, left)
    refused(open_source, missing, r"model.layers.0.self_attn.o_proj.weight \(layers.0.wo\) is missing")
    for name, pattern in (
        ("model.layers.0.mlp.extra.weight", r"'model.layers.0.mlp.extra.weight' does not belong to a LlamaForCausalLM"),
        ("model.layers.0.self_attn.q_proj.bias", r"q_proj.bias' does not belong"),
        ("model.layers.0.self_attn.o_proj.bias", r"o_proj.bias is not zero"),
        ("x\x1b[2J", r"'x\\x1b\[2J' does not belong"),
    ):
        extra = {name: ("F32", [1], b"\0\0\x80\x3f")}
        refused(open_source, make.write_hf_folder(tmp_path / "extra-model", SMALL, WEIGHTS, extra=extra), pattern)


def test_hf_types_that_no_weight_may_have(tmp_path: Path) -> None:
    left = {name: values for name, values in WEIGHTS.items() if name != "norm"}
    extra = {"model.norm.weight": ("F8_E4M3", [32], bytes(32))}
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, left, extra=extra)
    refused(open_source, folder, r"'model.norm.weight' \(norm\) has type F8_E4M3, which is not supported")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_hf_values_that_are_not_finite(tmp_path: Path, dtype: str) -> None:
    bad = WEIGHTS | {"layers.0.wq": WEIGHTS["layers.0.wq"].copy(), "norm": WEIGHTS["norm"].copy()}
    bad["layers.0.wq"][3, 4:6] = (np.nan, np.inf)
    bad["norm"][0] = -np.inf
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, bad, dtype=dtype)
    tensors = open_source(folder).tensors
    refused(lambda _: tensors["layers.0.wq"].read(), folder, r"\(layers.0.wq\): 2 of 1024 values are not finite")
    refused(lambda _: tensors["norm"].read(), folder, r"'model.norm.weight' \(norm\): 1 of 32 values")
    assert np.isfinite(tensors["layers.0.wq"].read(slice(4, 32))).all()
    if dtype != "F64":
        refused(lambda _: tensors["layers.0.wq"].read_packed(), folder, r"\(layers.0.wq\): 2 of 1024 values")


def test_f64_beyond_float32_is_refused(tmp_path: Path) -> None:
    huge: dict[str, Any] = dict(WEIGHTS) | {"norm": np.full(32, 1e300)}
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, huge, dtype="F64")
    refused(lambda _: open_source(folder).tensors["norm"].read(), folder, r"\(norm\): 32 of 32 values are not finite")


def test_bad_shards(tmp_path: Path) -> None:
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS, shards=2)
    index_path, first = folder / "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    index = json.loads(index_path.read_text())
    some = next(name for name, file in index["weight_map"].items() if file == first)

    def with_map(**changes: Any) -> None:
        index_path.write_text(json.dumps({"weight_map": index["weight_map"] | changes}))

    with_map(ghost=first)
    refused(open_source, folder, rf"{first}: tensor 'ghost' is not in it")
    with_map(**{some: "model-00002-of-00002.safetensors"})
    refused(open_source, folder, rf"holds tensor '{re.escape(some)}', but .* says 'model-00002")
    index_path.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != some}}))
    refused(open_source, folder, rf"holds tensor '{re.escape(some)}', but .* does not list it")
    for outside in ("../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", 7, None, "a\0.safetensors"):
        with_map(**{some: outside})
        refused(open_source, folder, r"expected a .safetensors file in this folder")
    for nothing in ({}, {"weight_map": {}}, {"weight_map": []}):
        index_path.write_text(json.dumps(nothing))
        refused(open_source, folder, r"weight_map: expected an object")
    index_path.write_text(json.dumps(index))
    (folder / first).unlink()
    refused(open_source, folder, rf"{first}: is missing; model.safetensors.index.json lists it for \d+ tensors")


def test_too_many_shards(tmp_path: Path) -> None:
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS, shards=2)
    index = {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(4097)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(open_source, folder, r"index.json: lists 4097 files, at most 4096")


@pytest.mark.parametrize("vectored", [True, False])
def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectored: bool) -> None:
    if not vectored:  # as on systems without preadv
        monkeypatch.delattr(os, "preadv")
    path = tmp_path / "shrinking"
    path.write_bytes(bytes(range(100)))
    file = BoundedFile(path, use_mmap=False)
    assert file.map(90, 10).tobytes() == bytes(range(90, 100))
    os.truncate(path, 60)
    refused(lambda _: file.map(50, 50), path, r"ends at offset 60, expected 100; the file shrank")


def test_tokenizer_file_beyond_its_cap(tmp_path: Path) -> None:
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS)
    with open(folder / "chat_template.jinja", "wb") as file:
        file.truncate(1 << 32)
    source = open_source(folder)
    refused(lambda _: source.tokenizer_files(), folder, r"chat_template.jinja of 4294967296 bytes, at most")


# --- what a path can be ----------------------------------------------------------------------------------------------


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    def made(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    refused(open_source, tmp_path / "nowhere", r"nowhere: does not exist")
    refused(open_source, made("empty.gguf", b""), r"is empty")
    refused(open_source, made("a.txt", b"hello"), r"starts with b'hell'; expected a .gguf or .safetensors")
    refused(open_source, made("model.pth", b"PK\3\4"), r"PyTorch checkpoint; this version reads safetensors and GGUF")
    refused(open_source, made("weights", b"PK\3\4"), r"PyTorch checkpoint")
    refused(open_source, made("pytorch_model.bin", b"\x80\x02"), r"PyTorch checkpoint")
    refused(open_source, made("m.gguf", b"GGML"), r"does not start with GGUF")
    refused(open_source, made("x.safetensors", b"{}"), r"config.json: is missing; .* needs a config.json")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    refused(open_source, tmp_path / "dangling", r"cannot be opened: No such file")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    refused(open_source, tmp_path / "circle", r"cannot be opened|cannot be listed")
    with pytest.raises(ModelFormatError, match="does not exist"):
        open_source("a\0b")


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    def made(name: str, **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file.replace("__", ".")).write_text(content)
        return folder

    refused(open_source, made("empty-one"), r"is an empty folder")
    refused(open_source, made("texts", notes__txt="x"), r"holds no config.json")
    refused(open_source, made("only-weights", model__safetensors=""), r"holds no config.json")
    refused(open_source, made("only-config", config__json=json.dumps(make.hf_config(SMALL))), r"found none")
    refused(open_source, made("torch", config__json="{}", pytorch_model__bin="x"), r"PyTorch checkpoint")
    refused(
        open_source, made("two", a__gguf="x", b__gguf="x"), r"holds 2 .gguf files; name one of them: a.gguf, b.gguf"
    )
    ours = made("ours", config__json='{"format": "pyllama", "version": 1}', model__safetensors="")
    refused(open_source, ours, r"is already a pyllama model")
    several = make.write_hf_folder(tmp_path / "several", SMALL, WEIGHTS)
    (several / "model.safetensors").rename(several / "a.safetensors")
    (several / "b.safetensors").write_bytes(b"")
    refused(open_source, several, r"found a.safetensors, b.safetensors")


def test_things_that_are_no_files(tmp_path: Path) -> None:
    """None of these may block, and none may be read."""
    os.mkfifo(tmp_path / "fifo.gguf")
    refused(open_source, tmp_path / "fifo.gguf", r"a FIFO, expected a regular file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "folder")
    refused(open_source, tmp_path / "link.gguf", r"is an empty folder")
    refused(BoundedFile, tmp_path / "link.gguf", r"a folder, expected a regular file")
    with pytest.raises(ModelFormatError, match=r"/dev/zero: a character device"):
        open_source("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        place = os.getcwd()
        os.chdir(tmp_path)  # the address of a socket may only have some 100 characters
        try:
            server.bind("s.gguf")
        finally:
            os.chdir(place)
        refused(open_source, tmp_path / "s.gguf", r"cannot be opened|a socket")
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(open_source, folder, r"config.json: a FIFO, expected a regular file")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes(META, [], version=9))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with contextlib.suppress(ModelFormatError):
            open_source(path)
        with contextlib.suppress(ModelFormatError):
            open_source(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before


# --- properties ------------------------------------------------------------------------------------------------------

KINDS = {"tok_embeddings": "Q8_0", "layers.0.wq": "Q4_1", "layers.0.wk": "Q4_0", "layers.0.wo": "F16"}
VALID_GGUF = gguf_bytes(
    make.llama_entries(SMALL), make.llama_tensors(SMALL, WEIGHTS, lambda name: KINDS.get(name, "BF16"))
)
VALID_SAFETENSORS = make.safetensors_of(
    {make.hf_name(name): ("F16", values.shape, make.encode_dense(values, "F16")) for name, values in WEIGHTS.items()}
)


def damaged(whole: bytes, header_bytes: int) -> st.SearchStrategy[bytes]:
    """`whole` cut, with bytes flipped (mostly in the header), overwritten by extreme integers, or spliced."""

    def below(n: int) -> st.SearchStrategy[int]:
        return st.integers(0, n - 1).map(lambda i: i * 7919 % n)  # hypothesis prefers small numbers: spread them

    position = st.one_of(below(header_bytes), below(header_bytes), below(len(whole)))
    text = st.sampled_from([b"0", b"9", b"-", b".", b'"', b",", b":", b"[", b"]", b"{", b"}", b"F", b"99999999", b"\\"])
    extreme = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n))
    patch = st.tuples(position, st.one_of(text, st.binary(min_size=1, max_size=4), extreme))

    def apply(patches: list[tuple[int, bytes]], cut: int, moved: tuple[int, int]) -> bytes:
        out = bytearray(whole)
        for at, new in patches:
            out[at : at + len(new)] = new
        if moved[1]:
            del out[moved[0] : moved[0] + moved[1]]
        return bytes(out[:cut])

    moved = st.one_of(st.just((0, 0)), st.tuples(position, st.integers(0, 16)))
    cut = st.one_of(st.just(len(whole)), st.just(len(whole)), below(len(whole) + 1))
    return st.builds(apply, st.lists(patch, max_size=4), cut, moved)


def read_everything(path: Path) -> None:
    source = open_source(path)
    for found in source.tensors.values():
        found.read()
        if found.grid is not None:
            found.read_packed()
    source.tokenizer_files()


def test_what_gets_damaged_is_valid(tmp_path: Path) -> None:
    (tmp_path / "valid.gguf").write_bytes(VALID_GGUF)
    read_everything(tmp_path / "valid.gguf")
    folder = make.write_hf_folder(tmp_path / "valid", SMALL, WEIGHTS)
    (folder / "model.safetensors").write_bytes(VALID_SAFETENSORS)
    read_everything(folder)


@settings(max_examples=400)
@given(content=damaged(VALID_GGUF, 1500))
def test_damaged_gguf(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.unlink(missing_ok=True)  # a new file each time: an old one may still be mapped
    path.write_bytes(content)
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(path)


@settings(max_examples=400)
@given(content=damaged(VALID_SAFETENSORS, VALID_SAFETENSORS.index(b"}}") + 2))
def test_damaged_safetensors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        make.write_hf_folder(folder, SMALL, WEIGHTS)
    path = folder / "model.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(folder)


@settings(max_examples=200)
@given(content=damaged(json.dumps(make.hf_config(SMALL)).encode(), 100))
def test_damaged_config(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-config"
    if not folder.exists():
        make.write_hf_folder(folder, SMALL, WEIGHTS)
    (folder / "config.json").write_bytes(content)
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200)
@given(data=st.data())
def test_config_values_of_any_type(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-config"
    if not folder.exists():
        make.write_hf_folder(folder, SMALL, WEIGHTS)
    keys = [*make.hf_config(SMALL), "sliding_window", "rope_parameters", "quantization_config", "format"]
    changes = {data.draw(st.sampled_from(keys)): data.draw(json_values) for _ in range(data.draw(st.integers(1, 2)))}
    if data.draw(st.booleans()):
        rope = st.sampled_from(
            ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "partial_rotary_factor"]
        )
        changes["rope_scaling"] = {data.draw(rope): data.draw(json_values), "type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(make.hf_config(SMALL, **changes)))
    with little_memory(), contextlib.suppress(ModelFormatError):
        read_everything(folder)
