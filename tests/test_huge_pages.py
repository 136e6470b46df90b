"""Bringing a mapped file's cache into huge pages: what it holds, what is counted, and what cannot be helped."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import struct
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
    return int(match[1]) * 1024 if match else 0


def cached_bytes(fd: int, begin: int, n: int) -> int | None:
    """Of a part of a file, what is in the system's cache; None where the system does not say (Linux 6.5)."""
    wanted, found = (ctypes.c_uint64 * 2)(begin, n), (ctypes.c_uint64 * 5)()
    done = ctypes.CDLL(None, use_errno=True).syscall(451, fd, ctypes.byref(wanted), ctypes.byref(found), 0)
    return found[0] * mmap.PAGESIZE if done == 0 else None


def scans_pages(address: int) -> bool:
    """Whether the system tells which pages of a map are huge (PAGEMAP_SCAN, Linux 6.7)."""
    runs = (ctypes.c_uint64 * 3)()
    end = address + BLOCK_BYTES
    asked = struct.pack("=12Q", 96, 0, address, end, 0, ctypes.addressof(runs), 1, 0, 0, 1 << 6, 0, 1 << 6)
    with open("/proc/self/pagemap", "rb") as pagemap:
        try:
            fcntl.ioctl(pagemap, 0xC0606610, bytearray(asked))
        except OSError as error:
            assert error.errno in (errno.ENOTTY, errno.EINVAL, errno.EPERM)
            return False
    return True


@pytest.fixture
def able(tmp_path: Path) -> None:
    """Skips where blocks cannot be brought, whatever our code does: huge pages of files, or what tells of them."""
    path = tmp_path / "in whole blocks"
    with path.open("wb", buffering=0) as out:
        for _ in range(2):
            out.write(bytes(BLOCK_BYTES))
        os.fsync(out.fileno())
    with BoundedFile(path) as opened:
        opened.map(0, opened.size).sum()
        fd, everything = opened.mapped() or pytest.fail("was not mapped")
        if not huge_bytes(everything.ctypes.data):
            pytest.skip("this file system does not keep files in huge pages, or the system has none left")
        if cached_bytes(fd, 0, BLOCK_BYTES) is None or not scans_pages(everything.ctypes.data):
            pytest.skip("this system does not say what is cached and in which pages (Linux 6.7)")


@pytest.mark.usefixtures("able")
def test_content_stays_and_the_count_is_true(file: BoundedFile, content: NDArray[np.uint8]) -> None:
    whole = file.map(0, file.size)
    mapped = file.mapped()
    assert mapped is not None
    fd, everything = mapped
    assert int(whole.sum(dtype=np.int64)) == int(content.sum(dtype=np.int64))  # all of it is cached and mapped
    brought = _C.settle_in_huge_pages(fd, everything, NEVER)
    assert 1 <= brought <= 4
    assert huge_bytes(everything.ctypes.data) >= brought * BLOCK_BYTES
    assert _C.settle_in_huge_pages(fd, everything, NEVER) == 0  # nothing is left to do
    np.testing.assert_array_equal(whole, content)


@pytest.mark.usefixtures("able")
def test_a_block_that_would_have_to_be_read_from_the_disk_is_left_alone(
    file: BoundedFile, content: NDArray[np.uint8]
) -> None:
    file.map(0, 1)
    fd, everything = file.mapped() or pytest.fail("was not mapped")
    os.posix_fadvise(fd, 0, BLOCK_BYTES // 2, os.POSIX_FADV_DONTNEED)  # the first: nothing before it reads ahead
    before = cached_bytes(fd, 0, BLOCK_BYTES)
    assert before is not None
    if before > BLOCK_BYTES // 8 * 7:
        pytest.skip("the system keeps in its cache what it was told to forget")
    assert 1 <= _C.settle_in_huge_pages(fd, everything, NEVER) <= 3
    assert cached_bytes(fd, 0, BLOCK_BYTES) == before
    np.testing.assert_array_equal(everything, content)


def test_without_time_nothing_is_done(file: BoundedFile, content: NDArray[np.uint8]) -> None:
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
