"""Bringing a mapped file's cache into huge pages: what it holds, what is counted, and what cannot be helped."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllama import _C
from pyllama.common.reader import BoundedFile
from pyllama.open import open_model
from quantize import convert
from tests import make_sources as make

BLOCK_BYTES = 1 << 21
NEVER = 1e9


@pytest.fixture
def content() -> NDArray[np.uint8]:
    """Four blocks, and a part of a fifth."""
    return np.random.default_rng(3).integers(0, 256, 4 * BLOCK_BYTES + 12345, dtype=np.uint8)


@pytest.fixture
def file(tmp_path: Path, content: NDArray[np.uint8]) -> Iterator[BoundedFile]:
    """`content`, written as a copying program would, and on the disk."""
    path = tmp_path / "weights"
    with path.open("wb", buffering=0) as out:
        for at in range(0, len(content), 1 << 14):
            out.write(content[at : at + (1 << 14)].data)
        os.fsync(out.fileno())
    with BoundedFile(path) as opened:
        yield opened


def huge_bytes(address: int) -> int:
    """Of the map at `address`, what is mapped by huge pages."""
    text = Path("/proc/self/smaps").read_text()
    match = re.search(rf"^{address:08x}-.*?^FilePmdMapped:\s+(\d+) kB", text, re.MULTILINE | re.DOTALL)
    assert match is not None
    return int(match[1]) * 1024


def test_content_stays_and_the_count_is_true(file: BoundedFile, content: NDArray[np.uint8]) -> None:
    whole = file.map(0, file.size)
    mapped = file.mapped()
    assert mapped is not None
    fd, everything = mapped
    assert int(whole.sum(dtype=np.int64)) == int(content.sum(dtype=np.int64))  # all of it is cached and mapped
    brought = _C.settle_in_huge_pages(fd, everything, NEVER)
    assert 0 <= brought <= 4
    if brought:
        assert huge_bytes(everything.ctypes.data) >= brought * BLOCK_BYTES
        assert _C.settle_in_huge_pages(fd, everything, NEVER) == 0  # nothing is left to do
    np.testing.assert_array_equal(whole, content)


def test_without_time_one_look_is_all(file: BoundedFile, content: NDArray[np.uint8]) -> None:
    whole = file.map(0, file.size)
    assert _C.settle_in_huge_pages(file.mapped()[0], whole, 0.0) == 0  # type: ignore[index]
    np.testing.assert_array_equal(whole, content)


def test_pages_that_somebody_else_has_mapped_stay(file: BoundedFile, content: NDArray[np.uint8]) -> None:
    file.map(0, 1)
    fd, everything = file.mapped() or pytest.fail("was not mapped")
    with mmap.mmap(fd, file.size, access=mmap.ACCESS_READ) as other:
        before = bytes(other)
        _C.settle_in_huge_pages(fd, everything, NEVER)
        assert bytes(other) == before == content.tobytes()
    np.testing.assert_array_equal(everything, content)


def test_a_descriptor_that_is_none_changes_nothing(file: BoundedFile, content: NDArray[np.uint8]) -> None:
    whole = file.map(0, file.size)
    assert _C.settle_in_huge_pages(-1, whole, NEVER) == 0
    np.testing.assert_array_equal(whole, content)


def test_only_arrays_of_bytes_are_taken() -> None:
    with pytest.raises(TypeError):
        _C.settle_in_huge_pages(0, np.zeros(4, np.float32), NEVER)
    assert _C.settle_in_huge_pages(0, np.zeros(64, np.uint8), NEVER) == 0  # less than a block


def test_nothing_is_mapped_where_maps_are_off_or_closed(file: BoundedFile) -> None:
    assert file.mapped() is None
    with BoundedFile(file.path, use_mmap=False) as copied:
        copied.map(0, 16)
        assert copied.mapped() is None
    file.map(0, 16)
    file.close()
    assert file.mapped() is None


def test_opening_a_model_settles_its_map_once_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = make.Shape()
    source = make.write_gguf(tmp_path / "small.gguf", shape, make.random_weights(shape), "Q4_0")
    folder = convert(source, tmp_path / "model")
    asked: list[tuple[int, float]] = []

    def settle(fd: int, mapped: NDArray[np.uint8], seconds: float) -> int:
        assert os.fstat(fd).st_size == len(mapped)
        asked.append((len(mapped), seconds))
        return 0

    monkeypatch.setattr(_C, "settle_in_huge_pages", settle)
    open_model(folder)
    ((size, seconds),) = asked
    assert size == (folder / "model.safetensors").stat().st_size
    assert 0 <= seconds <= 0.1
    open_model(folder, mmap=False)
    assert len(asked) == 1
