"""The library's table of functions, asked by the extension: the emulated library in the place of the real one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pyllama import DeviceError
from pyllama.cuda import examine_cuda
from pyllama.native import load_native

from .conftest import Emulated, emulation_only


@pytest.fixture
def path(emulated: Emulated) -> str:
    return str(emulated.library._name)


@emulation_only("a device has another name")
def test_it_says_what_it_is(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = load_native().cuda
    assert cuda.build(path) == {"toolkit": 0, "emulated": True, "architectures": "the CPU"}
    (device,) = cuda.devices(path)
    assert device["name"] == "emulated device" and device["compute_capability"] == (8, 0)
    assert 0 < device["free_bytes"] <= device["memory_bytes"] and device["multiprocessors"] > 0
    monkeypatch.setenv("PYLLAMA_CUDA_LIBRARY", path)
    report = examine_cuda()
    assert report.library == "emulated on the CPU, code for the CPU" and report.trouble is None
    (line,) = report.devices
    assert "emulated device, compute capability 8.0" in line.text


@pytest.mark.parametrize("n_bytes", [16, 16 * 3, 1 << 20, (1 << 20) + 16 * 77, 5 << 20])
def test_every_word_is_read_once(path: str, emulated: Emulated, n_bytes: int) -> None:
    """The library itself compares the words' sum with what it must be; sizes around the four loads of a thread."""

    def read() -> np.ndarray:
        assert load_native().cuda.read_bandwidth(path, 0, n_bytes, 1) > 0
        return np.zeros(0)

    emulated.in_all_orders(read)


@emulation_only("a machine may have many devices, and much memory")
def test_failures_come_as_kind_and_text(path: str) -> None:
    cuda = load_native().cuda
    for n_bytes, repeats in ((0, 1), (24, 1), (-16, 1), (16, 0)):
        with pytest.raises(ValueError, match=f"read_bandwidth: {n_bytes} bytes, {repeats} repeats; expected"):
            cuda.read_bandwidth(path, 0, n_bytes, repeats)
    with pytest.raises(DeviceError, match=r"no NVIDIA device was found.*device 1"):
        cuda.read_bandwidth(path, 1, 16, 1)
    with pytest.raises(DeviceError, match="out of memory"):
        cuda.read_bandwidth(path, 0, 1 << 45, 1)


def test_a_failure_is_told_to_the_thread_that_had_it(path: str) -> None:
    cuda = load_native().cuda

    def fail(n_bytes: int) -> str:
        with pytest.raises(ValueError) as caught:
            cuda.read_bandwidth(path, 0, n_bytes, 1)
        return str(caught.value)

    sizes = [16 * i + 8 for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for n_bytes, text in zip(sizes, pool.map(fail, sizes), strict=True):
            assert f"read_bandwidth: {n_bytes} bytes" in text
