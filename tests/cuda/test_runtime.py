"""csrc/cuda/runtime.h over the emulation: graphs, streams that are as late as they may be, and a careless host."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.conftest import Emulated, EmulationError, emulation_only


def test_a_graph_runs_again_with_what_it_recorded(emulated: Emulated) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(-9, 9, 32, np.int32)
    tables = rng.integers(-9, 9, (4, 32), np.int32)
    found = np.zeros((5, 32), np.int32)
    emulated.call("graph_replay", values, tables, 4, found)
    for table, result in zip(tables, found, strict=False):
        values = (values * 3 + table) * 5 + table
        assert (result == values).all()
    assert (found[4] == 0).all(), "recording runs nothing"


def test_an_exception_ends_a_recording(emulated: Emulated) -> None:
    values = np.arange(-16, 16, dtype=np.int32)
    found = np.zeros(32, np.int32)
    emulated.call("abandoned_recording", values, found)
    assert (found == 5 * values).all(), "what was recorded first is not done"


@pytest.mark.parametrize("how", ["waits", "other memory", "a kernel between", "a copy between"])
def test_an_early_kernel_may_read_what_is_written(emulated: Emulated, how: str) -> None:
    found = np.zeros(32, np.int32)
    emulated.call("read_early", how, found)
    assert (found == 0x01010101).all()


@emulation_only("a device does not notice it")
def test_an_early_kernel_may_not_read_what_the_one_in_front_writes(emulated: Emulated) -> None:
    with pytest.raises(
        EmulationError, match=r"EarlyRead.*load_read_only of what the kernel in front wrote, before wait"
    ):
        emulated.call("read_early", "at once", np.zeros(32, np.int32))


@emulation_only("a device is as late as it likes")
def test_a_stream_does_nothing_before_it_must(emulated: Emulated) -> None:
    found = np.zeros(4, np.int32)
    emulated.call("copies_are_late", np.array([11, 22], np.int32), found)
    before, after, other_stream, end = found
    assert before == -1, "poison: nobody had waited"
    assert after == other_stream == 22, "the copy takes what the host has left there"
    assert end == 0, "what came behind the event is done in its turn"


@emulation_only("these are the emulation's words")
@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("copy too long", r'copy_to_device: bytes 0 to 65 of "weights" \(64 bytes\)'),
        ("copy from past the end", r'copy_to_host: bytes 60 to 68 of "weights"'),
        ("copy to host memory", "copy_to_device: an address that is not device memory"),
        ("fill too long", r'fill: bytes 0 to 65 of "weights"'),
        ("freed before it is copied", "copy_to_host: "),
        ("too much memory", "out of emulated device memory: 9663676416 bytes for cache"),
        ("another device", "device 1: the emulation has device 0 only"),
        ("recording twice", "the stream is recording already"),
        ("not recording", "the stream is not recording"),
        ("time without a clock", "the time between two events: one was made without a clock"),
        ("waiting while recording", "a stream that is recording cannot be waited for"),
    ],
)
def test_a_careless_host_is_told(emulated: Emulated, which: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        emulated.call("host_defect", which)


@emulation_only("a device's order is its own")
@pytest.mark.parametrize("order", ["descending", "random:5", "sideways"])
def test_the_order_of_a_whole_run(
    emulated: Emulated, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """blocks_in_order: each of eight blocks writes 1 + what the one before it wrote, 1 if that is yet to come."""

    def run(library: Emulated) -> list[int]:
        return library.run("blocks_in_order", np.zeros(1, np.uint32), 8, grid=(8, 1, 1)).tolist()

    monkeypatch.setenv("PYLLAMA_CUDA_ORDER", order)
    fresh = Emulated(Path(shutil.copy(emulated.path, tmp_path)))  # has not looked at the environment yet
    if order == "sideways":
        with pytest.raises(EmulationError, match='thread order "sideways"; expected ascending'):
            run(fresh)
        return
    try:
        emulated.call("set_order", order)
        assert run(fresh) == run(emulated) != [1, 2, 3, 4, 5, 6, 7, 8]
    finally:
        emulated.call("set_order", "ascending")
