"""The weight formats: the Python twin of csrc/formats.h, and the bytes of docs/FORMAT.md in both directions.

A weight is seen in three ways: `TensorSpec` says what it is, `Packed` holds its plain numbers ([N, K] codes, [N, G]
scales), and a payload (uint8) holds them in tiles. `pack` and `unpack` are exact inverses; `dequantize` is the table
"value of a weight". Nothing here chooses codes (quantize/methods/) or touches files (model_folder.py, writer.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .errors import ModelFormatError
from .reader import shown

TILE_ROWS = 16  # output rows interleaved in a tile
COLUMN_PAD = 32  # columns are padded to this
ALIGN = 64  # sections and payloads start at multiples of this
GROUPS = (32, 64, 128)  # columns that may share a scale
VERSION = "1"

_MAX_SIDE = 2**31 - 1  # the kernels count rows and columns in int32
_MAX_METADATA_CHARS = 4096  # a tensor's JSON object is some 300 characters


@dataclass(frozen=True)
class FormatInfo:
    """One row of the table; the fields are those of `FormatInfo` in csrc/formats.h."""

    name: str
    code_bits: int  # bits of one stored weight
    quantized: bool  # has groups with scales
    has_offset: bool  # a minimum or a zero point per group
    has_codebook: bool  # the code is an index into 2^code_bits int8 entries
    code_bias: int  # value = scale * (code - code_bias), where there is no codebook


FORMATS: dict[str, FormatInfo] = {
    row.name: row
    for row in (
        FormatInfo("f32", 32, False, False, False, 0),
        FormatInfo("f16", 16, False, False, False, 0),
        FormatInfo("bf16", 16, False, False, False, 0),
        FormatInfo("q8", 8, True, False, False, 0),
        FormatInfo("q4", 4, True, False, False, 8),
        FormatInfo("q4a", 4, True, True, False, 0),
        FormatInfo("q4nl", 4, True, False, True, 0),
        FormatInfo("q5nl", 5, True, False, True, 0),
        FormatInfo("q6", 6, True, False, False, 32),
    )
}

# Codebooks unless a method finds better ones: steps grow with magnitude, as weights are denser near zero. That of q5nl
# was fitted (Lloyd) to normal, Laplace and Student numbers in groups of 32, 64 and 128, each by its best scale.
Q4NL_CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
Q5NL_CODEBOOK = (
    *(-127, -110, -95, -84, -75, -67, -59, -51, -43, -36, -30, -24, -18, -12, -7, -2),
    *(2, 7, 12, 18, 24, 30, 37, 44, 51, 59, 67, 75, 84, 94, 106, 118),
)
CODEBOOKS = {"q4nl": Q4NL_CODEBOOK, "q5nl": Q5NL_CODEBOOK}  # a row with has_codebook has one here

# How numbers lie in memory: bf16 has no numpy type, its bits travel as uint16.
STORAGE: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "u8": np.dtype("u1"),
    "q8": np.dtype("i1"),
    "q4": np.dtype("u1"),
    "q4a": np.dtype("u1"),
    "q4nl": np.dtype("u1"),
    "q5nl": np.dtype("u1"),
    "q6": np.dtype("u1"),
}


def round_up(n: int, to: int) -> int:
    """The smallest multiple of `to` that is not below `n`."""
    return -(-n // to) * to


def aligned_zeros(n_bytes: int) -> NDArray[np.uint8]:
    """Zeros in memory that begins where the engine wants a payload to."""
    room = np.zeros(n_bytes + ALIGN, np.uint8)
    start = -room.ctypes.data % ALIGN
    return room[start : start + n_bytes]


def to_bf16(values: ArrayLike) -> NDArray[np.uint16]:
    """Rounds float32 values to bf16 (to nearest, ties to even) and returns the bits as uint16. NaN stays NaN."""
    values32 = np.ascontiguousarray(values, dtype=np.float32)
    bits = values32.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(values32)
    if nan.any():  # the carry would turn some NaNs into infinity or zero
        rounded[nan] = ((bits[nan] >> np.uint32(16)) | np.uint32(0x0040)).astype(np.uint16)
    return rounded


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widens bf16 bits (uint16) to float32, exactly."""
    widened: NDArray[np.uint32] = np.asarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)
    return widened.view(np.float32)


def to_float32(stored: NDArray[Any], number: str) -> NDArray[np.float32]:
    """Stored numbers (`f32 f16 bf16 u8`) as float32, exactly."""
    return from_bf16(stored) if number == "bf16" else np.asarray(stored, dtype=np.float32)


def from_float32(values: ArrayLike, number: str) -> NDArray[Any]:
    """float32 values rounded to the nearest number of the kind `f32 f16 bf16`; infinite beyond its range."""
    if number == "bf16":
        return to_bf16(values)
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float32).astype(STORAGE[number])


@dataclass(frozen=True)
class Section:
    """A run of bytes inside a payload: codes, scales, offsets or input_order. `shape` is its layout in C order."""

    name: str
    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes without the padding that follows."""
        n = self.dtype.itemsize
        for side in self.shape:
            n *= side
        return n


@dataclass(frozen=True)
class TensorSpec:
    """What a stored tensor is: everything of its metadata except the checksum. Checked when made.

    `shape` is [N, K] for a matrix, [N] for a vector (f32 only). `group`, `offset` and `codebook` are empty where the
    format has none. Raises ModelFormatError that names the tensor.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    group: int = 0
    scale: str = "f16"
    offset: str = ""
    codebook: tuple[int, ...] = ()
    input_order: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ModelFormatError(f"a tensor needs a name, found {shown(self.name)}")
        if not isinstance(self.format, str) or self.format not in FORMATS:
            self._fail(f"unknown format {shown(self.format)}, expected one of {' '.join(FORMATS)}")
        object.__setattr__(self, "shape", self._integers("shape", self.shape))
        object.__setattr__(self, "codebook", self._integers("codebook", self.codebook))
        self._check_shape()
        self._check_numbers()

    def _fail(self, what: str) -> NoReturn:
        raise ModelFormatError(f"{self.name}: {what}")

    def _integers(self, what: str, values: Any) -> tuple[int, ...]:
        if not isinstance(values, (tuple, list)):
            self._fail(f"{what} is {shown(values)}, expected a list of integers")
        if any(isinstance(v, (bool, np.bool_)) or not isinstance(v, (int, np.integer)) for v in values):
            self._fail(f"{what} {list(values)} has something else than integers")
        return tuple(int(v) for v in values)

    def _check_shape(self) -> None:
        if len(self.shape) not in (1, 2) or any(not 0 < side <= _MAX_SIDE for side in self.shape):
            self._fail(f"shape {list(self.shape)}, expected [N] or [N, K] with sides of 1 to {_MAX_SIDE}")
        if len(self.shape) == 1 and self.format != "f32":
            self._fail(f"a vector of shape {list(self.shape)} in format {self.format}; vectors are always f32")

    def _check_numbers(self) -> None:
        info = self.info
        if isinstance(self.group, bool) or not isinstance(self.group, (int, np.integer)):
            self._fail(f"group is {shown(self.group)}, expected an integer")
        if info.quantized and self.group not in GROUPS:
            self._fail(f"group {self.group}, expected 32, 64 or 128")
        if not info.quantized and self.group:
            self._fail(f"group {self.group}, but format {self.format} has no groups")
        scales = ("f16", "bf16") if info.has_offset else ("f16",)
        if self.scale not in scales:
            self._fail(f"scale {shown(self.scale)}, format {self.format} takes {' or '.join(scales)}")
        offsets = ("f16", "bf16", "u8") if info.has_offset else ("",)
        if self.offset not in offsets:
            self._fail(f"offset {shown(self.offset)}, format {self.format} takes {' or '.join(offsets) or 'none'}")
        entries = 2**info.code_bits if info.has_codebook else 0
        if len(self.codebook) != entries:
            self._fail(f"{len(self.codebook)} codebook entries, format {self.format} takes {entries}")
        if any(abs(entry) > 127 for entry in self.codebook):
            self._fail(f"codebook {list(self.codebook)}, expected integers of -127 to 127")
        if not isinstance(self.input_order, bool):
            self._fail(f"input_order is {shown(self.input_order)}, expected true or false")
        if self.input_order and self.format != "q4a":
            self._fail(f"input_order with format {self.format}; only q4a has it")

    @property
    def info(self) -> FormatInfo:
        """The format's row in the table."""
        return FORMATS[self.format]

    @property
    def is_vector(self) -> bool:
        """True for shape [N], stored as it is."""
        return len(self.shape) == 1

    @property
    def arguments(self) -> dict[str, Any]:
        """All of it by name, as the engine's `Weight` takes it beside `data`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def n_weights(self) -> int:
        """Numbers of the logical shape."""
        return self.shape[0] * (1 if self.is_vector else self.shape[1])

    @property
    def n_groups(self) -> int:
        """Groups of a row, G; 0 for dense formats."""
        return -(-self.shape[1] // self.group) if self.info.quantized else 0

    @property
    def sections(self) -> tuple[Section, ...]:
        """The payload's sections in order: codes, then scales, offsets and input_order where the format has them."""
        plan: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []
        codes = STORAGE[self.format]
        if self.is_vector:
            plan.append(("codes", codes, self.shape))
        else:
            tiles, padded = -(-self.shape[0] // TILE_ROWS), round_up(self.shape[1], COLUMN_PAD)
            if self.info.quantized:
                lines = padded * self.info.code_bits // 32  # of 64 bytes: of 32 columns there are as many as bits
                plan.append(("codes", codes, (tiles, lines, TILE_ROWS, 4)))
                plan.append(("scales", STORAGE[self.scale], (tiles, self.n_groups, TILE_ROWS)))
            else:
                plan.append(("codes", codes, (tiles, padded, TILE_ROWS)))
            if self.offset:
                plan.append(("offsets", STORAGE[self.offset], (tiles, self.n_groups, TILE_ROWS)))
            if self.input_order:
                plan.append(("input_order", np.dtype("<i4"), (self.shape[1],)))
        sections: list[Section] = []
        start = 0
        for name, dtype, shape in plan:
            sections.append(Section(name, start, dtype, shape))
            start = round_up(start + sections[-1].nbytes, ALIGN)
        return tuple(sections)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payload, a multiple of 64."""
        last = self.sections[-1]
        return round_up(last.start + last.nbytes, ALIGN)

    def to_metadata(self, sha256: str | None = None) -> str:
        """The JSON object that describes this tensor in `__metadata__`, with the payload's checksum if given."""
        entry: dict[str, Any] = {"format": self.format, "shape": list(self.shape)}
        if self.info.quantized:
            entry["group"] = int(self.group)
        if self.info.has_offset:
            entry["scale"] = self.scale
            entry["offset"] = self.offset
        if self.info.has_codebook:
            entry["codebook"] = list(self.codebook)
        if self.input_order:
            entry["input_order"] = True
        if sha256 is not None:
            entry["sha256"] = sha256
        return json.dumps(entry, separators=(",", ":"))

    @classmethod
    def from_metadata(cls, name: str, text: str) -> TensorSpec:
        """Reads what `to_metadata` wrote; keys that version 1 does not know are ignored.

        Raises ModelFormatError for anything that is no description of a tensor.
        """
        entry = parse_metadata(name, text)
        info = FORMATS.get(str(entry.get("format")))
        if info is None:
            raise ModelFormatError(
                f"{name}: unknown format {shown(entry.get('format'))}, expected one of {' '.join(FORMATS)}; "
                "the model may come from a newer version"
            )
        needed = {
            "group": info.quantized,
            "scale": info.has_offset,
            "offset": info.has_offset,
            "codebook": info.has_codebook,
        }
        for key, wanted in needed.items():
            if wanted != (key in entry):
                raise ModelFormatError(
                    f"{name}: format {info.name} {'needs' if wanted else 'has no'} {key!r} in its metadata"
                )
        if "shape" not in entry:
            raise ModelFormatError(f"{name}: no 'shape' in its metadata")
        known = {
            key: entry[key] for key in ("shape", "group", "scale", "offset", "codebook", "input_order") if key in entry
        }
        return cls(name, info.name, **known)


def parse_metadata(name: str, text: str) -> dict[str, Any]:
    """The JSON object of one tensor's metadata, as it stands. Raises ModelFormatError when it is none."""
    if len(text) > _MAX_METADATA_CHARS:
        raise ModelFormatError(f"{name}: metadata of {len(text)} characters, expected at most {_MAX_METADATA_CHARS}")
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{name}: metadata is not valid JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ModelFormatError(f"{name}: metadata is {type(entry).__name__}, expected a JSON object")
    return entry


@dataclass
class Packed:
    """A tensor's stored numbers in plain order, before tiling.

    codes: uint8 [N, K] of 0…2^code_bits − 1; q8 int8 [N, K]; dense float32, float16, uint16 (bf16 bits) [N, K];
    float32 [N].
    scales: [N, G] float16, or uint16 holding bf16; None for dense formats.
    offsets: [N, G] float16, uint16 (bf16) or uint8, as the spec's `offset` says; None without.
    input_order: int32 [K], a permutation; None without.
    """

    codes: NDArray[Any]
    scales: NDArray[Any] | None = None
    offsets: NDArray[Any] | None = None
    input_order: NDArray[Any] | None = None


def dense(spec: TensorSpec, values: NDArray[np.float32]) -> Packed:
    """float32 values as a Packed of the dense spec, rounded to nearest. Beyond f16's range they become infinite."""
    return Packed(from_float32(values, spec.format))


@dataclass(frozen=True)
class Tiles:
    """How plain numbers get into tiles: codes of a number of bits, and columns of dense values, scales, offsets."""

    put_codes: Callable[[NDArray[Any], NDArray[Any], int], None]
    put_columns: Callable[[NDArray[Any], NDArray[Any]], None]


def pack(spec: TensorSpec, packed: Packed, tiles: Tiles | None = None) -> NDArray[np.uint8]:
    """The payload of a tensor: uint8 [spec.payload_bytes], padding zero. `tiles`: another way to the same bytes.

    Raises ModelFormatError when an array's shape or type is not what the spec demands, a code exceeds its bits, or
    input_order is no permutation. Source: docs/FORMAT.md, "Tiles".
    """
    payload = np.zeros(spec.payload_bytes, dtype=np.uint8)
    pack_rows(spec, payload, packed, 0, tiles)
    return payload


def pack_rows(
    spec: TensorSpec, payload: NDArray[np.uint8], packed: Packed, first_row: int, by: Tiles | None = None
) -> None:
    """Puts rows first_row… of a tensor into a zeroed payload, so that a big one need not be held whole in plain order.

    `packed` holds the rows of a block; a block starts at a multiple of 16 and, unless it ends the tensor, has a
    multiple of 16 rows. input_order is the whole tensor's in every block. Raises ModelFormatError like `pack`.
    """
    n_rows = int(packed.codes.shape[0]) if packed.codes.ndim else 0
    last_row = first_row + n_rows
    whole = first_row % TILE_ROWS == 0 and (n_rows % TILE_ROWS == 0 or last_row == spec.shape[0])
    if not n_rows or last_row > spec.shape[0] or not whole:
        raise ModelFormatError(
            f"{spec.name}: rows {first_row} to {last_row} are no block of whole tiles of {spec.shape[0]} rows"
        )
    _check_arrays(spec, packed, n_rows)
    by = by or NUMPY_TILES
    for section in spec.sections:
        target = payload[section.start : section.start + section.nbytes].view(section.dtype).reshape(section.shape)
        values = getattr(packed, section.name)
        if spec.is_vector or section.name == "input_order":
            target[...] = values
            continue
        tiles = slice(first_row // TILE_ROWS, -(-last_row // TILE_ROWS))
        if section.name == "codes" and spec.info.quantized:
            by.put_codes(target[tiles], values, spec.info.code_bits)
        else:
            by.put_columns(target[tiles], values)


def unpack(spec: TensorSpec, payload: NDArray[np.uint8]) -> Packed:
    """The plain numbers of a payload: the exact inverse of `pack`. Padding is not looked at.

    Raises ModelFormatError when the payload's length is not what the spec demands.
    """
    if payload.dtype != np.uint8 or payload.ndim != 1 or payload.size != spec.payload_bytes:
        raise ModelFormatError(
            f"{spec.name}: payload {payload.dtype} {list(payload.shape)}, expected uint8 [{spec.payload_bytes}] "
            f"for {spec.format} {list(spec.shape)}"
        )
    found: dict[str, NDArray[Any]] = {}
    n = spec.shape[0]
    for section in spec.sections:
        start = section.start
        source = np.frombuffer(np.ascontiguousarray(payload[start : start + section.nbytes]), dtype=section.dtype)
        tiled = source.reshape(section.shape)
        if spec.is_vector or section.name == "input_order":
            found[section.name] = tiled.copy()
        elif section.name == "codes" and spec.info.quantized:
            found["codes"] = _get_codes(tiled, n, spec.shape[1], spec.info.code_bits)
        else:
            width = spec.shape[1] if section.name == "codes" else spec.n_groups
            found[section.name] = _get_columns(tiled, n, width)
    return Packed(**found)


def dequantize(spec: TensorSpec, packed: Packed) -> NDArray[np.float32]:
    """The values of a weight: float32 [N, K] (or [N]), columns in the order of the inputs.

    With input_order, stored column k is column input_order[k] of the result. Source: FORMAT.md, "Value of a weight".
    """
    if not spec.info.quantized:
        return to_float32(packed.codes, spec.format)
    if packed.scales is None or (packed.offsets is None) != (not spec.offset):
        raise ModelFormatError(f"{spec.name}: format {spec.format} without scales or offsets")
    scales = _per_column(to_float32(packed.scales, spec.scale), spec)
    if spec.info.has_codebook:
        codes = np.array(spec.codebook, dtype=np.float32)[packed.codes]
    else:
        codes = packed.codes.astype(np.float32) - np.float32(spec.info.code_bias)
    offsets = None if packed.offsets is None else _per_column(to_float32(packed.offsets, spec.offset), spec)
    with np.errstate(over="ignore", invalid="ignore"):  # check_finite() says so in words
        if offsets is not None and spec.offset == "u8":
            codes -= offsets
        values: NDArray[np.float32] = scales * codes
        if offsets is not None and spec.offset != "u8":
            values += offsets
    if packed.input_order is None:
        return values
    ordered = np.empty_like(values)
    ordered[:, packed.input_order] = values
    return ordered


def check_finite(spec: TensorSpec, packed: Packed) -> None:
    """Raises ModelFormatError naming the tensor if any of its values is NaN or infinite."""
    if packed.scales is None:
        values = to_float32(packed.codes, spec.format)
    else:
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # the largest magnitude that the group's codes could make of them
            values = np.abs(to_float32(packed.scales, spec.scale)) * np.float32(255 if spec.offset == "u8" else 128)
            if spec.offset in ("f16", "bf16") and packed.offsets is not None:
                values += np.abs(to_float32(packed.offsets, spec.offset))
    finite = np.isfinite(values)
    if not finite.all():
        where = [int(i) for i in np.argwhere(~finite)[0]]
        place = f"at {where}" if not spec.info.quantized else f"in row {where[0]}, group {where[1]}"
        raise ModelFormatError(f"{spec.name}: NaN or infinite value {place}; the checkpoint is damaged")


def _per_column(per_group: NDArray[np.float32], spec: TensorSpec) -> NDArray[np.float32]:
    return np.repeat(per_group, spec.group, axis=1)[:, : spec.shape[1]]


def _check_arrays(spec: TensorSpec, packed: Packed, n_rows: int) -> None:
    def check(what: str, values: NDArray[Any] | None, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
        if values is None or values.dtype != dtype or values.shape != shape:
            found = "nothing" if values is None else f"{values.dtype} {list(values.shape)}"
            raise ModelFormatError(f"{spec.name}: {what} {found}, expected {np.dtype(dtype)} {list(shape)}")

    check("codes", packed.codes, STORAGE[spec.format], (n_rows, *spec.shape[1:]))
    most = 2**spec.info.code_bits - 1
    if spec.info.code_bits < 8 and packed.codes.max() > most:
        raise ModelFormatError(f"{spec.name}: code {int(packed.codes.max())}, expected 0 to {most}")
    per_group = (n_rows, spec.n_groups)
    for what, values, number in (
        ("scales", packed.scales, spec.scale if spec.info.quantized else ""),
        ("offsets", packed.offsets, spec.offset),
    ):
        if number:
            check(what, values, STORAGE[number], per_group)
        elif values is not None:
            raise ModelFormatError(f"{spec.name}: {what} given, but format {spec.format} has none")
    if spec.input_order:
        check("input_order", packed.input_order, np.int32, (spec.shape[1],))
        check_permutation(spec, packed)
    elif packed.input_order is not None:
        raise ModelFormatError(f"{spec.name}: input_order given, but the spec says there is none")


def check_permutation(spec: TensorSpec, packed: Packed) -> None:
    """Raises ModelFormatError unless input_order, if there is one, is a permutation of 0…K−1."""
    order = packed.input_order
    if order is not None and not np.array_equal(np.sort(order), np.arange(spec.shape[1])):
        raise ModelFormatError(f"{spec.name}: input_order is no permutation of 0 to {spec.shape[1] - 1}")


def _pad(values: NDArray[Any], n_rows: int, n_columns: int) -> NDArray[Any]:
    if values.shape == (n_rows, n_columns):
        return np.ascontiguousarray(values)
    padded = np.zeros((n_rows, n_columns), dtype=values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    return padded


def _put_codes(tiled: NDArray[Any], codes: NDArray[Any], bits: int) -> None:
    """codes [rows, K] into tiled [tiles, lines, 16, 4]."""
    tiles, lines = tiled.shape[:2]
    plain = _pad(codes, tiles * TILE_ROWS, lines * 32 // bits)
    if bits == 8:
        tiled[...] = plain.reshape(tiles, TILE_ROWS, lines, 4).transpose(0, 2, 1, 3)
    elif bits == 4:
        halves = plain.reshape(tiles, TILE_ROWS, lines, 2, 4)
        both = halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)  # joined before the transpose: half the bytes to move
        tiled[...] = both.transpose(0, 2, 1, 3)
    else:
        _put_codes_with_planes(tiled, plain, bits)


def _put_codes_with_planes(tiled: NDArray[Any], plain: NDArray[Any], bits: int) -> None:
    """Of 32 columns: the lines of their nibbles, then one with the fifth bits, or two with the fifth and sixth."""
    tiles, blocks, above = tiled.shape[0], tiled.shape[1] // bits, bits - 4
    quads = plain.reshape(tiles, TILE_ROWS, blocks, 8, 4)
    nibbles = (quads[:, :, :, 0::2] & 15) | (quads[:, :, :, 1::2] & 15) << 4
    shifts = np.arange(0, 8, above, dtype=np.uint8)[:, None]  # of the quads that share a byte
    planes = ((quads >> 4).reshape(tiles, TILE_ROWS, blocks, above, 8 // above, 4) << shifts).sum(
        axis=4, dtype=np.uint8
    )
    both = np.concatenate([nibbles, planes], axis=3)  # [tiles, 16, blocks, bits, 4]
    tiled[...] = both.reshape(tiles, TILE_ROWS, blocks * bits, 4).transpose(0, 2, 1, 3)


def _get_codes_with_planes(tiled: NDArray[Any], bits: int) -> NDArray[Any]:
    """The inverse: [tiles, 16, blocks, 32]."""
    tiles, blocks, above = tiled.shape[0], tiled.shape[1] // bits, bits - 4
    lines = tiled.transpose(0, 2, 1, 3).reshape(tiles, TILE_ROWS, blocks, bits, 4)
    nibbles = np.stack([lines[:, :, :, :4] & 15, lines[:, :, :, :4] >> 4], axis=4)
    shifts = np.arange(0, 8, above, dtype=np.uint8)[:, None]
    planes = lines[:, :, :, 4:, None] >> shifts & np.uint8(2**above - 1)
    shape = (tiles, TILE_ROWS, blocks, 32)
    codes: NDArray[Any] = nibbles.reshape(shape) | planes.reshape(shape) << 4
    return codes


def _get_codes(tiled: NDArray[Any], n: int, k: int, bits: int) -> NDArray[Any]:
    tiles, blocks = tiled.shape[:2]
    rows_first = tiled.transpose(0, 2, 1, 3)
    if bits in (5, 6):
        rows_first = _get_codes_with_planes(tiled, bits)
    if bits == 4:
        rows_first = np.stack([rows_first & 15, rows_first >> 4], axis=3)
    plain = rows_first.reshape(tiles * TILE_ROWS, blocks * 32 // bits)
    return np.ascontiguousarray(plain[:n, :k])


def _put_columns(tiled: NDArray[Any], values: NDArray[Any]) -> None:
    """values [rows, width] into tiled [tiles, columns, 16]: dense values, scales and offsets."""
    tiles, columns = tiled.shape[:2]
    tiled[...] = _pad(values, tiles * TILE_ROWS, columns).reshape(tiles, TILE_ROWS, columns).transpose(0, 2, 1)


def _get_columns(tiled: NDArray[Any], n: int, width: int) -> NDArray[Any]:
    plain = tiled.transpose(0, 2, 1).reshape(-1, tiled.shape[1])
    return np.ascontiguousarray(plain[:n, :width])


NUMPY_TILES = Tiles(_put_codes, _put_columns)
