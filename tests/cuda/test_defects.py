"""The emulation reports what is wrong with a kernel: one kernel with one defect each (defect_kernels.cpp)."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.cuda.conftest import ORDERS, Emulated, EmulationError, emulation_only

pytestmark = emulation_only("on a device these kernels may do anything; compute-sanitizer looks for the like")

WORDS = np.arange(1, 257, dtype=np.uint32)

# kernel, threads, bytes of shared memory, what the message says
REPORTED = [
    ("left_at_barrier", 64, 0, r"block \(0,0,0\).* threads 32-36: at barrier\(\), thread 37: returned"),
    ("left_at_barrier", 40, 0, r"threads 32-36: at barrier\(\), thread 37: returned, threads 38-39: at barrier\(\)"),
    ("half_of_a_warp_at_barrier", 64, 0, r"warp [01] part: .*threads \d+-\d+: in warp_barrier"),
    ("one_lane_shuffles_not", 32, 0, r"threads 0-4: in shuffle, thread 5: returned, threads 6-31: in shuffle"),
    ("different_collectives", 32, 0, r"thread 0: in shuffle, thread 1: in ballot"),
    ("mma_in_half_a_warp", 48, 0, r"mma_m16n8k16 needs 32 lanes, warp 1 has 16"),
    ("copy_misaligned", 32, 512, r"copy_async_16 at an address 4 past a multiple of 16"),
    ("copy_past_shared", 32, 512, r"copy_async_16 at byte 512 of 512 bytes of shared memory"),
    ("load_misaligned", 32, 0, r"load_16 at an address 8 past a multiple of 16"),
    ("load_past_buffer", 32, 0, r"load_stream: .*(not device memory|of \"\w+\")"),
    ("load_host_memory", 32, 0, r"load_stream: an address that is not device memory"),
    ("matrix_misaligned", 32, 512, r"load_matrix_x4 at an address 8 past a multiple of 16"),
    ("write_past_shared", 32, 128, r"wrote 0 bytes behind its 128 bytes of shared memory"),
    ("write_before_shared", 32, 128, r"wrote 4 bytes before its 128 bytes of shared memory"),
    ("write_past_buffer", 32, 0, r"wrote 0 bytes behind \"out\" \(1024 bytes\)"),
    ("write_before_buffer", 32, 0, r"wrote 4 bytes before \"out\" \(1024 bytes\)"),
    ("deep_stack", 1, 0, r"thread 0: used more than 65536 bytes of stack"),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("kernel", "block", "shared", "expected"), REPORTED)
def test_defects_are_reported(
    emulated: Emulated, kernel: str, block: int, shared: int, expected: str, order: str
) -> None:
    emulated.call("set_order", order)
    try:
        with pytest.raises(EmulationError) as error:
            emulated.run(kernel, WORDS, 256, block=block, shared=shared)
    finally:
        emulated.call("set_order", "ascending")
    assert re.search(expected, str(error.value)), error.value
    assert "kernel of pyllama::cuda::tests::Words" in str(error.value)


@pytest.mark.parametrize(
    ("kernel", "block", "grid"),
    [("no_barrier", 64, 1), ("no_warp_barrier", 32, 1), ("no_second_barrier", 64, 1), ("blocks_in_order", 32, 4)],
)
def test_a_missing_barrier_changes_bits(emulated: Emulated, kernel: str, block: int, grid: int) -> None:
    with pytest.raises(AssertionError, match="gives other bits"):
        emulated.in_all_orders(
            lambda: emulated.run(kernel, WORDS, 256, block=block, grid=(grid, 1, 1), shared=4 * block)
        )


@pytest.mark.parametrize("kernel", ["copy_read_too_early", "copy_not_committed", "shared_not_written"])
def test_what_has_not_arrived_is_poison(emulated: Emulated, kernel: str) -> None:
    found = emulated.run(kernel, WORDS, 256, block=64, shared=1024)
    written = 64 if kernel == "shared_not_written" else 256
    assert np.isnan(found[:written].view(np.float32)).all() and np.isnan(found[:written].view(np.float16)).all()


def test_an_early_kernel_must_wait_for_the_one_before(emulated: Emulated) -> None:
    emulated.run("previous_not_waited_for", WORDS, 1, block=32, grid=(2, 1, 1))  # nothing runs early
    with pytest.raises(EmulationError, match=r"block \(1,0,0\): thread 3: left a kernel launched with Start::kEarly"):
        emulated.run("previous_not_waited_for", WORDS, 1, block=32, grid=(2, 1, 1), early=True)


def test_after_a_defect_the_next_launch_is_clean(emulated: Emulated) -> None:
    for kernel in ("left_at_barrier", "deep_stack", "write_past_buffer", "write_past_shared"):
        with pytest.raises(EmulationError):
            emulated.run(kernel, WORDS, 256, block=64, shared=256)
        found = emulated.run("block_sum", WORDS[:64], 64, block=64, shared=256)
        assert (found == WORDS[:64].sum()).all()


@pytest.mark.parametrize(
    "shape",
    [
        {"block": 0},
        {"block": 1025},
        {"grid": (0, 1, 1)},
        {"grid": (1, 65536, 1)},
        {"shared": (99 << 10) + 1},
    ],
)
def test_impossible_launches_are_refused(emulated: Emulated, shape: dict[str, object]) -> None:
    with pytest.raises(EmulationError, match="expected 1 to 2147483647 by 65535 by 65535 blocks of 1 to 1024 threads"):
        emulated.run("who_and_where", WORDS, 256, **shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["", "up", "random:", "random:-1", "ascending:3"])
def test_an_unknown_order_is_refused(emulated: Emulated, order: str) -> None:
    with pytest.raises(EmulationError, match="expected ascending, descending, random or random:SEED"):
        emulated.call("set_order", order)
