"""GGUF's block types, all of them: against their definitions weight by weight, and against golden numbers of the gguf
package, always with ==. Also what a repack to our grids keeps, and what it rounds.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import dequantize
from pyllama.common.reader import BoundedFile
from quantize.readers.gguf_types import GGUF_TYPES, IQ4_LEVELS
from quantize.readers.source import SourceTensor, StoredTensor
from tests.helpers_gguf import decode_rows
from tests.make_sources import BLOCKS, TYPE_IDS

GOLDEN = Path(__file__).parent / "golden" / "gguf_blocks.npz"
TYPES = {row.name: row for row in GGUF_TYPES.values()}
RNG = np.random.default_rng(5)


def tensor(folder: Path, kind: str, raw: np.ndarray) -> SourceTensor:
    """Rows of stored bytes as the tensor of a file."""
    row = TYPES[kind]
    shape = (len(raw), raw.shape[1] // row.block_bytes * row.block)
    path = folder / f"{kind}.bin"
    raw.tofile(path)
    return SourceTensor("layers.0.wv", StoredTensor(BoundedFile(path), "v", kind, row, shape, 0, raw.size))


def random_rows(kind: str, n: int, blocks: int, low: float = -0.05, high: float = 0.05) -> np.ndarray:
    """Random blocks whose own numbers lie in low…high."""
    _, size, places = BLOCKS[kind]
    raw = RNG.integers(0, 256, (n * blocks, size), np.uint8)
    for at in places:
        numbers = RNG.uniform(low, high, len(raw)).astype("<f4" if kind == "Q8_K" else "<f2")
        raw[:, at : at + numbers.itemsize] = numbers.view(np.uint8).reshape(len(raw), -1)
    return raw.reshape(n, -1)


def test_the_table_is_the_formats_own() -> None:
    assert {name: (row.block, row.block_bytes) for name, row in TYPES.items() if row.block > 1} == {
        name: (weights, size) for name, (weights, size, _) in BLOCKS.items()
    }
    assert {row.name: number for number, row in GGUF_TYPES.items()} == TYPE_IDS


@pytest.mark.parametrize("kind", BLOCKS)
@given(data=st.data())
def test_blocks_decode_like_their_definition(kind: str, data: st.DataObject) -> None:
    weights, size, places = BLOCKS[kind]
    raw = bytearray(data.draw(st.binary(min_size=2 * size, max_size=2 * size)))
    width, code = (32, "<f") if kind == "Q8_K" else (16, "<e")
    for block in range(2):  # numbers of any sign and size, subnormals too, but finite
        for at in places:
            number = data.draw(st.floats(width=width, allow_nan=False, allow_infinity=False))
            struct.pack_into(code, raw, block * size + at, number)
    with np.errstate(over="ignore"):
        expected = decode_rows(kind, bytes(raw), (1, 2 * weights))
        found = TYPES[kind].decode(np.frombuffer(bytes(raw), np.uint8).reshape(1, -1))
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "Q8_K"])
def test_blocks_decode_to_golden_numbers(kind: str, tmp_path: Path) -> None:
    with np.load(GOLDEN) as golden:
        raw, expected = golden[f"{kind}.bytes"], golden[f"{kind}.values"]
    rows = raw.reshape(2, -1)
    found = tensor(tmp_path, kind, rows).read()
    assert np.array_equal(found, expected.reshape(2, -1))


@pytest.mark.parametrize("kind", [kind for kind, row in TYPES.items() if row.block > 1 and row.grid and row.grid.exact])
def test_exact_grids_lose_nothing(kind: str, tmp_path: Path) -> None:
    source = tensor(tmp_path, kind, random_rows(kind, 5, 3))
    assert source.exact and source.grid is not None
    assert np.array_equal(dequantize(source.grid, source.read_packed()), source.read())


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "Q8_K"])
def test_other_grids_keep_codes_and_round_scales_to_the_nearest_half(kind: str, tmp_path: Path) -> None:
    """A value is off by no more than half a unit of an 11-bit number in its scale and one in its minimum."""
    source = tensor(tmp_path, kind, random_rows(kind, 7, 2))
    assert not source.exact and source.grid is not None
    packed, values = source.read_packed(), source.read()
    assert packed.scales is not None
    scales = np.abs(np.repeat(packed.scales.astype(np.float64), 32, axis=1))
    codes = np.abs((np.array(IQ4_LEVELS)[packed.codes] if kind == "IQ4_XS" else packed.codes).astype(np.float64))
    bound = np.ldexp(codes * scales, -11)
    if packed.offsets is not None:
        bound += np.ldexp(np.abs(np.repeat(packed.offsets.astype(np.float64), 32, axis=1)), -11)
    error = np.abs(dequantize(source.grid, packed).astype(np.float64) - values)
    assert (error <= bound + 2.0**-24 * np.abs(values)).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS"])
def test_tiny_scales_come_over_exactly(kind: str, tmp_path: Path) -> None:
    """Where a block's number is subnormal in f16, its small multiples are exact too: nothing vanishes."""
    source = tensor(tmp_path, kind, random_rows(kind, 4, 2, 0, 2.0**-20))
    assert source.grid is not None and source.read().any()
    assert np.array_equal(dequantize(source.grid, source.read_packed()), source.read())


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "Q8_K"])
def test_numbers_that_are_not_finite_are_refused(kind: str, tmp_path: Path) -> None:
    raw = random_rows(kind, 3, 2)
    raw[1, BLOCKS[kind][2][-1] : BLOCKS[kind][2][-1] + 2] = 0, 0x7E  # NaN
    source = tensor(tmp_path, kind, raw)
    with pytest.raises(ModelFormatError, match=r"tensor 'v' \(layers.0.wv\): \d+ of \d+ values are not finite"):
        source.read()
    if source.grid is not None:
        with pytest.raises(ModelFormatError, match=r"\d+ of \d+ (scales|offsets) are not finite"):
            source.read_packed()


def test_scales_beyond_f16_are_refused_when_repacked(tmp_path: Path) -> None:
    source = tensor(tmp_path, "Q4_K", random_rows("Q4_K", 2, 1, 60000, 60001))
    assert np.isfinite(source.read()).all()
    with pytest.raises(ModelFormatError, match="scales are not finite"):
        source.read_packed()
