"""Where a tensor's numbers come from: slices, joined parts and scaled tensors against numpy on plain arrays."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import dequantize
from pyllama.common.reader import BoundedFile
from quantize.readers.gguf_types import GGUF_TYPES
from quantize.readers.source import DENSE_TYPES, Joined, Rows, Scaled, Slice, SourceTensor, StoredTensor, is_zero
from quantize.readers.torch_file import StridedTensor, _Storage, _Tensor
from quantize.readers.zip_stored import Entry

Q4_0, F32 = GGUF_TYPES[2], DENSE_TYPES["F32"]


def stored(folder: Path, values: np.ndarray, name: str = "w") -> StoredTensor:
    path = folder / f"{name}.bin"
    values.astype("<f4").tofile(path)
    return StoredTensor(BoundedFile(path), name, "F32", F32, values.shape, 0, values.size * 4)


def stored_q4(folder: Path, n: int, k: int, name: str = "q") -> StoredTensor:
    """Random Q4_0 blocks with scales of moderate size."""
    blocks = np.random.default_rng(n * k).integers(0, 256, (n, k // 32, 18), np.uint8)
    blocks[..., 1] = 0x24 | (blocks[..., 1] & 0x80)
    path = folder / f"{name}.bin"
    blocks.tofile(path)
    return StoredTensor(BoundedFile(path), name, "Q4_0", Q4_0, (n, k), 0, blocks.size)


def whole(rows: Rows) -> np.ndarray:
    return rows.read(np.arange(rows.shape[0]))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("rows")
    values = np.arange(12 * 5, dtype=np.float32).reshape(12, 5)
    return folder, values


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (5, 0), (2, 3, 4)])
def test_shapes_that_no_tensor_of_a_model_has(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Said by whatever reads such a tensor first, before numpy sees the shape."""
    path = tmp_path / "w.pth"
    path.write_bytes(bytes(4 * 24))
    place = _Storage("0", "F32", 4, 24, Entry("0", 0, 96, 0))
    strange = [
        StoredTensor(BoundedFile(path), "w", "F32", F32, shape, 0, 4 * math.prod(shape)),
        StridedTensor("w", BoundedFile(path), _Tensor(place, 0, shape, (1,) * len(shape)), F32),
    ]
    for rows in strange:
        pattern = rf"w.pth: tensor 'w'.* has shape \[{', '.join(map(str, shape))}\], expected that of a matrix or"
        for use in (
            lambda rows=rows: rows.read(np.arange(0)),
            lambda rows=rows: SourceTensor("layers.0.wq", rows),
            lambda rows=rows: SourceTensor("norm", Scaled(rows, 2.0)),
            lambda rows=rows: Joined("w", [rows, rows], 1),
        ):
            with pytest.raises(ModelFormatError, match=pattern):
                use()


def test_only_matrices_are_joined_side_by_side(tmp_path: Path) -> None:
    parts = [stored(tmp_path, np.ones(4), name) for name in "ab"]
    with pytest.raises(ModelFormatError, match=r"a.bin: tensor 'a' has shape \[4\], expected a matrix"):
        Joined("w", parts, 1)


@given(cuts=st.sets(st.integers(1, 11)), index=st.lists(st.integers(0, 11)))
def test_joined_rows_are_the_whole_in_any_order(
    matrix: tuple[Path, np.ndarray], cuts: set[int], index: list[int]
) -> None:
    folder, values = matrix
    edges = [0, *sorted(cuts), 12]
    parts = [stored(folder, values[a:b], f"w{a}-{b}") for a, b in pairwise(edges)]
    joined = Joined("w", parts, 0)
    wanted = np.array(index, np.intp)
    if index:
        assert np.array_equal(joined.read(wanted), values[wanted])
    assert joined.shape == (12, 5) and joined.n_bytes == 240


def test_joined_columns(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    joined = Joined("w", [stored(tmp_path, values[:, :2], "a"), stored(tmp_path, values[:, 2:], "b")], 1)
    assert np.array_equal(joined.read(np.array([3, 1])), values[[3, 1]])


def test_joined_vectors(tmp_path: Path) -> None:
    values = np.arange(9, dtype=np.float32)
    joined = Joined("v", [stored(tmp_path, values[:4], "a"), stored(tmp_path, values[4:], "b")], 0)
    order = np.arange(9)[::-1].copy()
    assert np.array_equal(SourceTensor("v", joined, order).read(), values[::-1])


@pytest.mark.parametrize(("axis", "shape"), [(0, (8, 64)), (1, (4, 128))])
def test_joined_parts_keep_their_grid(tmp_path: Path, axis: int, shape: tuple[int, int]) -> None:
    parts = [stored_q4(tmp_path, 4, 64, "a"), stored_q4(tmp_path, 4, 64, "b")]
    tensor = SourceTensor("layers.0.wq", Joined("q", parts, axis))
    assert tensor.grid is not None and tensor.shape == shape and tensor.exact
    expected = np.concatenate([whole(part) for part in parts], axis=axis)
    assert np.array_equal(tensor.read(), expected)
    assert np.array_equal(dequantize(tensor.grid, tensor.read_packed()), expected)


def test_no_grid_where_parts_differ(tmp_path: Path) -> None:
    wide, narrow = stored_q4(tmp_path, 4, 64, "a"), stored_q4(tmp_path, 4, 32, "b")
    assert Joined("q", [wide, narrow], 1).grid is not None
    with pytest.raises(ModelFormatError, match="does not continue"):
        Joined("q", [wide, narrow], 0)
    with pytest.raises(ModelFormatError, match="is F32, but Q4_0"):
        Joined("q", [wide, stored(tmp_path, np.zeros((4, 64)), "c")], 0)


def test_slice(tmp_path: Path) -> None:
    parent = stored_q4(tmp_path, 12, 64)
    part = Slice("part", parent, 4, 6)
    assert np.array_equal(whole(part), whole(parent)[4:10]) and part.n_bytes * 2 == parent.n_bytes
    tensor = SourceTensor("layers.0.wk", part, np.array([5, 4, 3, 2, 1, 0]))
    assert np.array_equal(tensor.read(), whole(parent)[9:3:-1])
    assert tensor.grid is not None
    assert np.array_equal(dequantize(tensor.grid, tensor.read_packed(slice(1, 3))), whole(parent)[[8, 7]])
    with pytest.raises(ModelFormatError, match="has 12 rows, expected at least 13"):
        Slice("part", parent, 10, 3)


def test_scaled_and_zero(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 7, dtype=np.float32)
    scaled = Scaled(stored(tmp_path, values), 0.125)
    assert np.array_equal(whole(scaled), values * np.float32(0.125)) and scaled.grid is None
    assert not is_zero(scaled) and is_zero(stored(tmp_path, np.zeros((3, 4)), "z"))
