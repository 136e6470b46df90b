"""The format table and the bytes of docs/FORMAT.md: golden payloads, an independent reading of the tiles, round trips.

The oracle below walks a payload byte by byte as the document says, without the reshapes of the implementation.
"""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import (
    CODEBOOKS,
    FORMATS,
    GROUPS,
    Q4NL_CODEBOOK,
    STORAGE,
    Packed,
    TensorSpec,
    check_finite,
    dense,
    dequantize,
    from_bf16,
    from_float32,
    pack,
    pack_rows,
    to_bf16,
    unpack,
)
from tests.make_golden_formats import GOLDEN, SPECS, example, golden_text

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "FORMAT.md"
ARRAYS = ("codes", "scales", "offsets", "input_order")


@st.composite
def specs(draw: st.DrawFn, quantized: bool | None = None) -> TensorSpec:
    """Any matrix spec, sides from 1 to beyond two tiles and two groups."""
    names = [name for name, row in FORMATS.items() if quantized is None or row.quantized == quantized]
    row = FORMATS[draw(st.sampled_from(names))]
    shape = (draw(st.integers(1, 37)), draw(st.integers(1, 270)))
    return TensorSpec(
        "t",
        row.name,
        shape,
        group=draw(st.sampled_from(GROUPS)) if row.quantized else 0,
        scale=draw(st.sampled_from(["f16", "bf16"])) if row.has_offset else "f16",
        offset=draw(st.sampled_from(["f16", "bf16", "u8"])) if row.has_offset else "",
        codebook=tuple(draw(st.permutations(CODEBOOKS[row.name]))) if row.has_codebook else (),
        input_order=draw(st.booleans()) if row.has_offset else False,
    )


def random_bits(spec: TensorSpec, seed: int) -> Packed:
    """Every stored bit at random: NaNs, infinities, -128 and all."""
    rng = np.random.default_rng(seed)

    def fill(number: str, shape: tuple[int, ...]) -> Any:
        dtype = STORAGE[number]
        return rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8).view(dtype)

    codes = fill(spec.format, spec.shape)
    return Packed(
        codes & (2**spec.info.code_bits - 1) if spec.info.code_bits < 8 else codes,
        fill(spec.scale, (spec.shape[0], spec.n_groups)) if spec.info.quantized else None,
        fill(spec.offset, (spec.shape[0], spec.n_groups)) if spec.offset else None,
        rng.permutation(spec.shape[1]).astype(np.int32) if spec.input_order else None,
    )


def assert_same_bits(one: Packed, other: Packed) -> None:
    for name in ARRAYS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert a.tobytes() == b.tobytes(), name


def read_by_the_document(spec: TensorSpec, payload: bytes) -> dict[str, Any]:
    """Codes, scales, offsets and input_order, each number fetched from the byte where docs/FORMAT.md puts it."""
    n, k = spec.shape
    tiles, padded, groups = -(-n // 16), -(-k // 32) * 32, spec.n_groups
    found: dict[str, Any] = {}
    start = 0

    def section(name: str, n_bytes: int) -> bytes:
        nonlocal start
        data = payload[start : start + n_bytes]
        start += -(-n_bytes // 64) * 64
        return data

    def numbers(name: str, kind: str, width: int, stored_width: int) -> None:
        size = STORAGE[kind].itemsize
        data = section(name, tiles * stored_width * 16 * size)
        found[name] = [
            [data[(((r // 16) * stored_width + c) * 16 + r % 16) * size :][:size] for c in range(width)]
            for r in range(n)
        ]

    if spec.info.code_bits == 4:
        data = section("codes", tiles * padded * 8)
        octets = padded // 8

        def code4(r: int, c: int) -> int:
            byte = data[(((r // 16) * octets + c // 8) * 16 + r % 16) * 4 + c % 4]
            return byte & 15 if c % 8 < 4 else byte >> 4

        found["codes"] = [[bytes([code4(r, c)]) for c in range(k)] for r in range(n)]
    elif spec.info.code_bits in (5, 6):
        bits = spec.info.code_bits
        data = section("codes", tiles * padded * 2 * bits)

        def code56(r: int, c: int) -> int:
            block = data[((r // 16) * (padded // 32) + c // 32) * 64 * bits :]
            at, quad = r % 16 * 4 + c % 4, c % 32 // 4
            nibble = block[quad // 2 * 64 + at] >> 4 * (quad % 2) & 15
            if bits == 5:
                return nibble | (block[256 + at] >> quad & 1) << 4
            return nibble | (block[256 + quad // 4 * 64 + at] >> 2 * (quad % 4) & 3) << 4

        found["codes"] = [[bytes([code56(r, c)]) for c in range(k)] for r in range(n)]
    elif spec.info.code_bits == 8:
        data = section("codes", tiles * padded * 16)
        quads = padded // 4
        found["codes"] = [
            [data[(((r // 16) * quads + c // 4) * 16 + r % 16) * 4 + c % 4 :][:1] for c in range(k)] for r in range(n)
        ]
    else:
        numbers("codes", spec.format, k, padded)
    if spec.info.quantized:
        numbers("scales", spec.scale, groups, groups)
    if spec.offset:
        numbers("offsets", spec.offset, groups, groups)
    if spec.input_order:
        data = section("input_order", 4 * k)
        found["input_order"] = [data[4 * i : 4 * i + 4] for i in range(k)]
    assert start == len(payload)
    return found


# ---- the table -------------------------------------------------------------------------------------------------------


def test_table_equals_the_extensions() -> None:
    from pyllama import _C

    assert [dataclasses.asdict(row) for row in FORMATS.values()] == _C.format_table()


def test_formats_are_those_of_the_document() -> None:
    (listed,) = re.findall(r"\| `format` \| all \| `([a-z0-9 ]+)` \|", DOCUMENT.read_text(encoding="utf-8"))
    assert listed.split() == list(FORMATS)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_golden_file_is_what_its_script_makes() -> None:
    assert GOLDEN.read_text(encoding="utf-8") == golden_text(), (
        "python -m tests.make_golden_formats, then review the diff"
    )


@pytest.mark.parametrize("golden", json.loads(GOLDEN.read_text(encoding="utf-8")), ids=lambda entry: entry["name"])
def test_golden_bytes(golden: dict[str, Any]) -> None:
    spec = TensorSpec.from_metadata(golden["name"], json.dumps(golden["metadata"]))
    payload = np.frombuffer(bytes.fromhex("".join(golden["payload"])), dtype=np.uint8)

    def stored(name: str, dtype: Any) -> Any:
        numbers = golden[name]
        if numbers is None:
            return None
        dtype = np.dtype(dtype)
        return np.array(numbers, dtype=f"u{dtype.itemsize}" if dtype.kind == "f" else dtype).view(dtype)

    packed = Packed(
        stored("codes", STORAGE[spec.format]),
        stored("scales", STORAGE[spec.scale]),
        stored("offsets", STORAGE.get(spec.offset, np.uint8)),
        stored("input_order", np.int32),
    )
    np.testing.assert_array_equal(pack(spec, packed), payload)
    assert_same_bits(unpack(spec, payload), packed)
    np.testing.assert_array_equal(dequantize(spec, packed).view(np.uint32), np.array(golden["value_bits"], np.uint32))


def test_golden_file_covers_every_format() -> None:
    assert {spec.format for spec in SPECS} == set(FORMATS)
    assert {spec.offset for spec in SPECS} == {"", "f16", "bf16", "u8"}


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.info.code_bits in (4, 5, 6)], ids=lambda spec: spec.name
)
def test_decoder_printed_in_the_document(spec: TensorSpec) -> None:
    (code,) = re.findall(r"^    def decode_codes.*?(?=^\S)", DOCUMENT.read_text(encoding="utf-8") + "\n.", re.M | re.S)
    scope: dict[str, Any] = {"np": np}
    exec(re.sub(r"^    ", "", code, flags=re.M), scope)
    packed = example(spec)
    found = scope["decode_codes"](pack(spec, packed), *spec.shape, spec.info.code_bits)
    np.testing.assert_array_equal(found, packed.codes)


@given(specs(), st.integers(0, 2**32 - 1))
def test_unpack_inverts_pack(spec: TensorSpec, seed: int) -> None:
    packed = random_bits(spec, seed)
    payload = pack(spec, packed)
    assert payload.dtype == np.uint8 and payload.shape == (spec.payload_bytes,) and payload.size % 64 == 0
    assert_same_bits(unpack(spec, payload), packed)


@given(specs(), st.integers(0, 2**32 - 1))
def test_pack_puts_every_number_where_the_document_says(spec: TensorSpec, seed: int) -> None:
    packed = random_bits(spec, seed)
    payload = pack(spec, packed)
    found = read_by_the_document(spec, payload.tobytes())
    for name in ARRAYS:
        values = getattr(packed, name)
        if values is not None:
            flat = found[name] if name == "input_order" else [number for row in found[name] for number in row]
            assert b"".join(flat) == values.tobytes(), name


@given(specs())
def test_padding_is_zero(spec: TensorSpec) -> None:
    def ones(values: Any) -> Any:
        return None if values is None else np.frombuffer(b"\xff" * values.nbytes, values.dtype).reshape(values.shape)

    random = random_bits(spec, 0)
    bits = spec.info.code_bits
    codes = np.full(spec.shape, 2**bits - 1, np.uint8) if bits < 8 else ones(random.codes)
    full = Packed(codes, ones(random.scales), ones(random.offsets), random.input_order)
    # With every bit of every number set, as many bits are set in the payload.
    n_bits = codes.size * spec.info.code_bits
    n_bits += sum(values.nbytes * 8 for values in (full.scales, full.offsets) if values is not None)
    tail = next((section.start for section in spec.sections if section.name == "input_order"), spec.payload_bytes)
    payload = pack(spec, full)
    assert int(np.unpackbits(payload[:tail]).sum()) == n_bits
    assert not payload[tail + 4 * spec.shape[1] * spec.input_order :].any()


@given(specs(), st.integers(0, 2**32 - 1), st.data())
def test_blocks_of_rows_give_the_same_payload(spec: TensorSpec, seed: int, data: st.DataObject) -> None:
    packed = random_bits(spec, seed)
    payload = np.zeros(spec.payload_bytes, dtype=np.uint8)
    cuts = sorted(data.draw(st.sets(st.sampled_from(range(0, spec.shape[0], 16)))) | {0, spec.shape[0]})
    for first, last in pairwise(cuts):
        rows = slice(first, last)
        part = [None if v is None else v[rows] for v in (packed.codes, packed.scales, packed.offsets)]
        pack_rows(spec, payload, Packed(*part, packed.input_order), first)
    np.testing.assert_array_equal(payload, pack(spec, packed))


def test_payload_bytes_of_a_real_shape() -> None:
    # 576 x 1536 in q4a: half a byte per weight and, per 32 of them, two halves: 5 bits per weight.
    assert TensorSpec("w", "q4a", (576, 1536), 32, offset="f16").payload_bytes == 576 * 1536 * 5 // 8


# ---- values ----------------------------------------------------------------------------------------------------------


@given(specs(quantized=True), st.integers(0, 2**32 - 1))
def test_values_follow_the_table(spec: TensorSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed = random_bits(spec, seed)
    packed.scales = from_float32(rng.standard_normal(packed.scales.shape), spec.scale)  # type: ignore[union-attr]
    if spec.offset in ("f16", "bf16"):
        packed.offsets = from_float32(rng.standard_normal(packed.scales.shape), spec.offset)
    n, k = spec.shape

    def number(stored: Any, kind: str) -> float:
        return float(np.array(int(stored) << 16, np.uint32).view(np.float32)) if kind == "bf16" else float(stored)

    expected = np.empty((n, k))
    for r in range(0, n, 5):
        for c in range(k):
            code, s = int(packed.codes[r, c]), number(packed.scales[r, c // spec.group], spec.scale)
            if spec.format == "q4":
                value = s * (code - 8)
            elif spec.format == "q6":
                value = s * (code - 32)
            elif spec.codebook:
                value = s * spec.codebook[code]
            elif spec.offset == "u8":
                value = s * (code - int(packed.offsets[r, c // spec.group]))  # type: ignore[index]
            elif spec.offset:
                value = s * code + number(packed.offsets[r, c // spec.group], spec.offset)  # type: ignore[index]
            else:
                value = s * code
            expected[r, int(packed.input_order[c]) if packed.input_order is not None else c] = value
    found = dequantize(spec, packed)
    assert found.dtype == np.float32 and found.shape == (n, k)
    # Products are exact in float32 (11 + 8 bits); a minimum adds one rounding.
    np.testing.assert_array_equal(found[::5], expected[::5].astype(np.float32))


@given(specs(quantized=False), st.integers(0, 2**32 - 1))
def test_dense_values_are_the_nearest(spec: TensorSpec, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(spec.shape).astype(np.float32)
    found = dequantize(spec, unpack(spec, pack(spec, dense(spec, values))))
    bits = {"f32": 24, "f16": 11, "bf16": 8}[spec.format]
    # Half a unit in the last place; the smallest f16 step is 2^-24.
    assert (np.abs(found - values) <= np.maximum(np.abs(values) * 2.0**-bits, 2.0**-25)).all()


def test_bf16_widens_and_rounds_back_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    wide = from_bf16(bits)
    number = ~np.isnan(wide)
    np.testing.assert_array_equal(to_bf16(wide)[number], bits[number])
    assert np.isnan(from_bf16(to_bf16(wide[~number]))).all()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bf16_rounds_to_nearest_even(values: list[float]) -> None:
    for value, bits in zip(values, to_bf16(np.array(values, np.float32)), strict=True):
        exact = np.float64(np.float32(value))
        below = (np.array([value], np.float32).view(np.uint32) >> 16).astype(np.uint16)
        low, high = (np.float64(from_bf16(b)[0]) for b in (below, below + np.uint16(1)))
        if np.isinf(high):
            high = np.copysign(2.0**128, exact)  # where infinity stands for rounding
        nearest = below[0] if abs(exact - low) < abs(high - exact) else below[0] + 1
        if abs(exact - low) == abs(high - exact):
            nearest = below[0] + (below[0] & 1)
        assert bits == nearest


def test_bf16_keeps_nan_whose_payload_would_carry_over() -> None:
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(from_bf16(to_bf16(nans))).all()


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_finds_the_place(format: str, bad: float) -> None:
    spec = next(spec for spec in SPECS if spec.format == format and not spec.is_vector)
    packed = example(spec)
    check_finite(spec, packed)
    target, number = (packed.scales, spec.scale) if spec.info.quantized else (packed.codes, spec.format)
    assert target is not None
    target[1, 0] = from_float32(np.float32([bad]), number)[0]
    with pytest.raises(ModelFormatError, match=rf"{spec.name}: .*(at \[1, 0\]|row 1, group 0)"):
        check_finite(spec, packed)


def test_check_finite_looks_at_minimums_and_at_overflow() -> None:
    spec = TensorSpec("w", "q4a", (1, 32), 32, "bf16", "bf16")
    codes, one = np.full((1, 32), 15, np.uint8), to_bf16(np.float32([[1.0]]))
    check_finite(spec, Packed(codes, one, one))
    with pytest.raises(ModelFormatError, match="row 0, group 0"):
        check_finite(spec, Packed(codes, one, to_bf16(np.float32([[np.nan]]))))
    with pytest.raises(ModelFormatError, match="row 0, group 0"):
        check_finite(spec, Packed(codes, to_bf16(np.float32([[3e38]])), one))


# ---- descriptions ----------------------------------------------------------------------------------------------------


@given(specs())
def test_metadata_round_trip(spec: TensorSpec) -> None:
    assert TensorSpec.from_metadata("t", spec.to_metadata()) == spec
    assert json.loads(spec.to_metadata("ab" * 32))["sha256"] == "ab" * 32
    assert TensorSpec.from_metadata("t", spec.to_metadata("ab" * 32)) == spec


Q4A: dict[str, Any] = {"format": "q4a", "shape": [4, 32], "group": 32, "scale": "f16", "offset": "f16"}
Q4NL: dict[str, Any] = {"format": "q4nl", "shape": [4, 32], "group": 32, "codebook": list(Q4NL_CODEBOOK)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 3000, "not valid JSON"),
        (" " * 5000, "5000 characters"),
        ("[]", "list, expected a JSON object"),
        ("{}", "unknown format None"),
        (json.dumps({"format": "q3", "shape": [4, 32]}), "unknown format 'q3'"),
        (json.dumps({"format": ["f32"], "shape": [4, 32]}), "unknown format"),
        (json.dumps({"format": "f32"}), "no 'shape'"),
        (json.dumps({"format": "f32", "shape": 4}), "expected a list of integers"),
        (json.dumps({"format": "f32", "shape": []}), r"shape \[\]"),
        (json.dumps({"format": "f32", "shape": [1, 2, 3]}), r"shape \[1, 2, 3\]"),
        (json.dumps({"format": "f32", "shape": [0, 32]}), r"shape \[0, 32\]"),
        (json.dumps({"format": "f32", "shape": [-1, 32]}), r"shape \[-1, 32\]"),
        (json.dumps({"format": "f32", "shape": [2**31, 32]}), "expected .* sides"),
        (json.dumps({"format": "f32", "shape": [4.0, 32]}), "something else than integers"),
        (json.dumps({"format": "f32", "shape": [True, 32]}), "something else than integers"),
        (json.dumps({"format": "f16", "shape": [4]}), "vectors are always f32"),
        (json.dumps({"format": "q8", "shape": [4, 32]}), "needs 'group'"),
        (json.dumps({"format": "q8", "shape": [4, 32], "group": 16}), "group 16"),
        (json.dumps({"format": "q8", "shape": [4, 32], "group": "32"}), "expected an integer"),
        (json.dumps({"format": "f32", "shape": [4, 32], "group": 32}), "has no 'group'"),
        (json.dumps({"format": "q8", "shape": [4, 32], "group": 32, "scale": "bf16"}), "has no 'scale'"),
        (json.dumps({**Q4A, "scale": "f32"}), "scale 'f32'"),
        (json.dumps({**Q4A, "offset": "i8"}), "offset 'i8'"),
        (json.dumps({**Q4A, "offset": ["u8"]}), "offset"),
        (json.dumps({**Q4A, "input_order": 1}), "expected true or false"),
        (json.dumps({**Q4NL, "input_order": True}), "only q4a"),
        (json.dumps({**Q4NL, "codebook": [1] * 15}), "15 codebook entries"),
        (json.dumps({**Q4NL, "codebook": [-128] + [1] * 15}), "-127 to 127"),
        (json.dumps({**Q4NL, "codebook": [0.5] * 16}), "something else than integers"),
    ],
)
def test_nonsense_metadata_is_refused(text: str, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message) as caught:
        TensorSpec.from_metadata("layers.3.wq", text)
    assert str(caught.value).startswith("layers.3.wq: ")


def test_unknown_metadata_keys_are_ignored() -> None:
    assert TensorSpec.from_metadata("t", json.dumps({**Q4A, "note": {"any": 1}})) == TensorSpec(
        "t", "q4a", (4, 32), 32, "f16", "f16"
    )


# ---- arrays that do not fit ------------------------------------------------------------------------------------------


def changed(**arrays: Any) -> Packed:
    spec = TensorSpec("layers.3.wq", "q4a", (3, 40), 32, "f16", "u8", input_order=True)
    return dataclasses.replace(random_bits(spec, 0), **arrays)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (changed(codes=np.zeros((3, 39), np.uint8)), r"codes uint8 \[3, 39\]"),
        (changed(codes=np.zeros((3, 40), np.int8)), r"codes int8"),
        (changed(codes=np.full((3, 40), 16, np.uint8)), "code 16"),
        (changed(codes=np.zeros((2, 40), np.uint8)), "no block of whole tiles"),
        (changed(codes=np.zeros((4, 40), np.uint8)), "no block of whole tiles"),
        (changed(scales=None), "scales nothing"),
        (changed(scales=np.zeros((3, 2), np.float32)), r"scales float32"),
        (changed(scales=np.zeros((3, 1), np.float16)), r"scales float16 \[3, 1\], expected float16 \[3, 2\]"),
        (changed(offsets=None), "offsets nothing"),
        (changed(offsets=np.zeros((3, 2), np.float16)), "offsets float16"),
        (changed(input_order=None), "input_order nothing"),
        (changed(input_order=np.zeros(40, np.int32)), "no permutation"),
        (changed(input_order=np.arange(1, 41, dtype=np.int32)), "no permutation"),
        (changed(input_order=np.arange(40, dtype=np.int64)), "input_order int64"),
    ],
)
def test_pack_refuses_what_does_not_fit(packed: Packed, message: str) -> None:
    spec = TensorSpec("layers.3.wq", "q4a", (3, 40), 32, "f16", "u8", input_order=True)
    with pytest.raises(ModelFormatError, match=rf"layers\.3\.wq: .*{message}"):
        pack(spec, packed)


def test_pack_refuses_arrays_that_the_format_lacks() -> None:
    codes, scales = np.zeros((3, 40), np.uint8), np.zeros((3, 2), np.float16)
    with pytest.raises(ModelFormatError, match="offsets given"):
        pack(TensorSpec("w", "q4", (3, 40), 32), Packed(codes, scales, scales))
    with pytest.raises(ModelFormatError, match="scales given"):
        pack(TensorSpec("w", "f16", (3, 40)), Packed(np.zeros((3, 40), np.float16), scales))
    with pytest.raises(ModelFormatError, match="input_order given"):
        pack(TensorSpec("w", "q4", (3, 40), 32), Packed(codes, scales, None, np.arange(40, dtype=np.int32)))


@pytest.mark.parametrize("change", [-64, -1, 1, 64])
def test_unpack_refuses_other_lengths(change: int) -> None:
    spec = TensorSpec("w", "q4", (3, 40), 32)
    with pytest.raises(ModelFormatError, match="w: payload"):
        unpack(spec, np.zeros(spec.payload_bytes + change, np.uint8))
