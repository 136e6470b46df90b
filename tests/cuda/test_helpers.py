"""The helpers of csrc/cuda/device.h on the emulated device, against numpy: values, in all thread orders."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.cuda.conftest import Emulated, emulation_only

RNG = np.random.default_rng


@pytest.mark.parametrize("block", [1, 31, 32, 33, 256, 1024])
def test_threads_know_who_they_are(emulated: Emulated, block: int) -> None:
    grid = (3, 2, 2)
    found = emulated.run("who_and_where", np.zeros(1, np.uint32), 7 * 12 * block, grid=grid, block=block)
    z, y, x, t = np.indices((2, 2, 3, block)).reshape(4, -1)
    expected = np.stack([t, t % 32, t // 32, x, y, z, np.full_like(t, block)], axis=1)
    assert (found.reshape(-1, 7) == expected).all()


@pytest.mark.parametrize("block", [32, 96])
def test_shuffles(emulated: Emulated, block: int) -> None:
    values = RNG(1).integers(0, 2**32, (2, block), np.uint32)
    values[1, ::3] %= 40
    words = values.T
    found = emulated.in_all_orders(lambda: emulated.run("shuffles", words, 6 * block, block=block)).reshape(-1, 6)
    lanes = np.arange(block) % 32
    first = np.arange(block) - lanes
    v, argument = values
    small = argument % 32
    assert (found[:, 0] == v[first + small]).all()
    assert (found[:, 1] == v[first + (lanes ^ small)]).all()
    assert (found[:, 2] == v[first + np.where(lanes + small < 32, lanes + small, lanes)]).all()
    votes = (v.reshape(-1, 32) & 1) << np.arange(32, dtype=np.uint32)
    assert (found[:, 3].reshape(-1, 32) == votes.sum(axis=1, dtype=np.uint32)[:, None]).all()
    assert (found[:, 4] == v[first + small]).all() and (found[:, 5] == ~v[first + small]).all()


@emulation_only("what comes of lanes that are not there is undefined")
def test_lanes_that_a_block_has_not_got(emulated: Emulated) -> None:
    """40 threads: the second warp has 8 lanes. What comes of the others is poison, and they do not vote."""
    words = np.stack([np.arange(40, dtype=np.uint32) * 2 + 1, np.full(40, 8, np.uint32)], axis=1)
    found = emulated.in_all_orders(lambda: emulated.run("shuffles", words, 6 * 40, block=40)).reshape(-1, 6)
    assert (found[:32, 3] == 0xFFFFFFFF).all() and (found[32:, 3] == 0xFF).all()
    assert (found[:32, 0] == 17).all() and (found[32:, :3] == 0xFFFFFFFF).all()


@pytest.mark.parametrize("block", [1, 31, 33, 100, 256])
def test_barriers_and_shared_memory(emulated: Emulated, block: int) -> None:
    words = RNG(2).integers(0, 2**20, 3 * block, np.uint32)
    found = emulated.in_all_orders(
        lambda: emulated.run("block_sum", words, 3 * block, grid=(3, 1, 1), block=block, shared=4 * block)
    )
    assert (found.reshape(3, -1) == words.reshape(3, -1).sum(axis=1)[:, None]).all()


def test_the_last_block_sees_what_all_have_added(emulated: Emulated) -> None:
    words = RNG(3).integers(0, 2**20, 17, np.uint32)
    found = emulated.in_all_orders(
        lambda: emulated.run("last_block", words, np.zeros(3, np.uint32), grid=(17, 1, 1), block=64, shared=16)
    )
    assert list(found) == [words.sum(), words.sum(), 17]


def interesting_floats() -> np.ndarray:
    """65,536 floats: every half and its neighbours on both sides, midpoints between halves and theirs, random bits."""
    with np.errstate(over="ignore", invalid="ignore"):
        halves = np.arange(0, 65536, 5, dtype=np.uint16).view(np.float16).astype(np.float32)
        following = np.nextafter(halves.astype(np.float16), np.float16(np.inf)).astype(np.float32)
        middles = ((halves.astype(np.float64) + following) / 2).astype(np.float32)
        near = [np.nextafter(x, np.float32(s)) for x in (halves, middles) for s in (-np.inf, np.inf)]
    edges = np.array([0.0, -0.0, 65504, 65519.996, 65520, 2**-24, 2**-25, 2**-25 * 1.0000001, 1e-40, 3e38], np.float32)
    found = np.concatenate([halves, middles, *near, edges, -edges])
    random = RNG(4).integers(0, 2**32, 65536, np.uint32).view(np.float32)
    return np.concatenate([found, random])[: 65536 * 2]


def same_numbers(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Equal bits, or both NaN."""
    bits = f"u{found.dtype.itemsize}"
    return (found.view(bits) == expected.view(bits)) | (np.isnan(found) & np.isnan(expected))


def test_conversions_of_all_halves_and_bfloats(emulated: Emulated) -> None:
    floats = interesting_floats()
    n = floats.size // 256 * 256
    bits = np.arange(n, dtype=np.uint32) % 65536
    assert len(set(bits.tolist())) == 65536
    words = np.stack([bits, floats[:n].view(np.uint32)], axis=1)
    found = emulated.run("convert", words, 4 * n, grid=(n // 256, 1, 1), block=256).reshape(-1, 4)
    halves = bits.astype(np.uint16).view(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        assert same_numbers(found[:, 0].copy().view(np.float32), halves.astype(np.float32)).all()
        expected = floats[:n].astype(np.float16)
    assert (found[:, 1] == bits << 16).all()
    assert same_numbers(found[:, 2].astype(np.uint16).view(np.float16), expected).all()
    # bfloat16: of the two neighbours in the upper halves of a float the nearer one, of two as near the even one.
    raw = floats[:n].view(np.uint32).astype(np.uint64)
    rest = raw & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & ((raw >> 16) & 1 == 1))
    rounded = ((raw >> 16) + up).astype(np.uint16)
    assert (found[:, 3] == np.where(np.isnan(floats[:n]), 0x7FFF, rounded)).all()


def correctly_rounded(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """No half is nearer to `exact` (extended precision) than `found`; one as near has an odd last bit. Infinity stands
    where the next half would: numpy's own conversion from extended precision rounds to float first."""

    def distance(h: np.ndarray) -> np.ndarray:
        at = np.where(np.isinf(h), np.copysign(np.longdouble(65536), h), h.astype(np.longdouble))
        return np.abs(at - exact)

    mine = distance(found)
    others = np.stack([distance(np.nextafter(found, np.float16(s))) for s in (-np.inf, np.inf)])
    even = found.view(np.uint16) % 2 == 0
    nearest = np.where(even, mine <= others, mine < others).all(axis=0)
    beyond = np.isinf(exact) | (np.abs(exact) >= 65536)
    return np.where(beyond, found == exact.astype(np.float16), nearest & (np.signbit(found) == np.signbit(exact)))


def test_half_arithmetic_rounds_once(emulated: Emulated) -> None:
    """Against sums and products in extended precision, whose 64 bits hold all that a half's rounding tells apart."""
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("long double is no wider than double here")
    n = 65536
    halves = RNG(5).integers(0, 65536, (n, 3, 2), np.uint16)
    edges = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x3C00, 0x3C01, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00])
    halves[:2197] = np.repeat(np.stack(np.meshgrid(edges, edges, edges), -1).reshape(-1, 3, 1), 2, axis=2)
    halves[30000:] = (halves[30000:] & 0x83FF) | 0x3800  # of about the same size, so that ties come up
    halves[50000:, 2] = halves[50000:, 2] & 0x8003  # and with a summand far below the product
    words = halves.reshape(-1, 6).view(np.uint32)
    found = emulated.run("half_arithmetic", words, 6 * n, grid=(n // 256, 1, 1), block=256).reshape(-1, 6)
    with np.errstate(invalid="ignore"):
        exact = halves.view(np.float16).astype(np.longdouble)
    a, b, c = exact[:, 0], exact[:, 1], exact[:, 2]
    with np.errstate(all="ignore"):
        expected = [a + b, a - b, a * b, a * b + c]
        for i, value in enumerate(expected):
            result = np.ascontiguousarray(found[:, i]).view(np.float16).reshape(-1, 2)
            assert (correctly_rounded(result, value) | (np.isnan(result) & np.isnan(value))).all(), i
        mixed = np.stack([halves[:, 0, 0], halves[:, 1, 1]], axis=1)
        assert (np.ascontiguousarray(found[:, 4]).view(np.uint16).reshape(-1, 2) == mixed).all()
        low, high = exact[:, 0, 0].astype(np.float32), exact[:, 0, 1].astype(np.float32)
        sums = np.stack([high, low * np.float32(2) + high], axis=1).astype(np.float16)
        assert same_numbers(np.ascontiguousarray(found[:, 5]).view(np.float16).reshape(-1, 2), sums).all()


def test_bit_tricks(emulated: Emulated) -> None:
    words = RNG(6).integers(0, 2**32, (1024, 3), np.uint32)
    found = emulated.run("bit_tricks", words, 5 * 1024, grid=(4, 1, 1), block=256).reshape(-1, 5)
    a, b, c = words.T
    assert (found[:, 0] == ((a & b) | c)).all()
    assert (found[:, 1] == ((a & b) ^ c)).all()
    assert (found[:, 2] == (a ^ b ^ c)).all()
    each = (np.stack([a, b, c])[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    table = (0x1B >> (4 * each[0] + 2 * each[1] + each[2])) & 1
    assert (found[:, 3] == (table.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1)).all()
    sources = np.ascontiguousarray(np.stack([a, b], axis=1)).view(np.uint8)
    nibbles = (c[:, None] >> np.array([0, 4, 8, 12], np.uint32)) & 15
    picked = np.take_along_axis(sources, (nibbles & 7).astype(np.intp), axis=1)
    signs = np.where(picked & 0x80, 0xFF, 0).astype(np.uint8)
    expected = np.where(nibbles & 8, signs, picked).astype(np.uint8)
    assert (found[:, 4] == expected.view(np.uint32).ravel()).all()


def test_wide_loads_and_stores(emulated: Emulated) -> None:
    words = RNG(7).integers(0, 2**32, 4 * 3 * 64, np.uint32)
    shape = {"grid": (3, 1, 1), "block": 64, "shared": 16 * 64}
    assert (emulated.in_all_orders(lambda: emulated.run("wide_copy", words, words.size, **shape)) == words).all()
    for words_each in (1, 2, 4):
        found = emulated.run(
            f"read_only_copy_{4 * words_each}", words, words.size, grid=(12 // words_each, 1, 1), block=64
        )
        assert (found == words).all()


@pytest.mark.parametrize("words_each", [1, 2, 4])
def test_loads_that_only_some_lanes_make(emulated: Emulated, words_each: int) -> None:
    """The others' addresses are not looked at: the last thread's lies behind the buffer."""
    words = RNG(10).integers(0, 2**32, (63, words_each), np.uint32)
    kernel = f"load_if_{4 * words_each}"
    found = emulated.run(kernel, words, 64 * words_each, block=64).reshape(64, -1)
    assert (found[::2] == words[::2]).all()
    assert (found[1::2] == np.arange(1, 64, 2)[:, None]).all()


def test_powers_of_two(emulated: Emulated) -> None:
    x = np.concatenate([RNG(11).uniform(-150, 130, 1018), [0, -np.inf, np.inf, np.nan, -126, -126.5]]).astype(
        np.float32
    )
    found = emulated.run("exponential", x, 1024, grid=(4, 1, 1), block=256).view(np.float32)
    with np.errstate(over="ignore"):
        expected = np.exp2(x.astype(np.float64))
    expected[expected < 2.0**-126] = 0
    finite = np.isfinite(expected) & (expected < 3e38)
    assert (np.abs(found[finite] - expected[finite]) <= expected[finite] * 2.0**-22).all()
    assert same_numbers(found[1019:1022], np.array([0, np.inf, np.nan], np.float32)).all()
    assert np.isinf(found[x >= 128]).all()


def test_the_larger_one(emulated: Emulated) -> None:
    special = np.array([0, 1.5, -2, np.inf, -np.inf, np.nan], np.float32)
    pairs = np.stack(np.meshgrid(special, special), -1).reshape(-1, 2)
    found = emulated.run("larger_ones", pairs, 72, block=36).reshape(36, 2)
    assert same_numbers(found[:, 0].copy().view(np.float32), np.fmax(pairs[:, 0], pairs[:, 1])).all()
    assert (found[:, 1] == np.arange(36)).all()


def test_exact_powers_of_two(emulated: Emulated) -> None:
    exponents = np.arange(-127, 128, dtype=np.int32)
    found = emulated.run("powers_of_two", exponents, 255, block=255).view(np.float32)
    assert (found[1:] == np.ldexp(np.float32(1), exponents[1:])).all() and found[0] == 0


def check_mma(emulated: Emulated, found: np.ndarray, expected: np.ndarray, magnitude: np.ndarray) -> None:
    """The emulation rounds once from double: exact but for the order of 17 double additions, far below a float's last
    bit. Hardware cuts each summand off at about the 24th bit of the largest, and the sum."""
    bound = magnitude * 2.0**-21 if emulated.on_device else np.abs(expected) * 2.0**-24 * 1.0001
    assert (np.abs(found - expected) <= bound).all()


def test_the_short_product(emulated: Emulated) -> None:
    rng = RNG(12)
    a, b = rng.standard_normal((16, 8)).astype(np.float16), rng.standard_normal((8, 8)).astype(np.float16)
    words = np.concatenate([a.ravel(), b.ravel()]).view(np.uint32)
    found = emulated.in_all_orders(lambda: emulated.run("mma_half_short", words, 128)).view(np.float32)
    a, b = a.astype(np.float64), b.astype(np.float64)
    check_mma(emulated, found.reshape(16, 8), a @ b, np.abs(a) @ np.abs(b))


def test_every_helper_is_tested() -> None:
    """What device.h offers stands in helper_kernels.cpp, which also goes through nvcc (scripts/check_device.sh)."""
    header = (ROOT / "csrc" / "cuda" / "device.h").read_text()
    header = re.sub(r"namespace detail \{.*?\}  // namespace detail", "", header, flags=re.DOTALL)
    helpers = set(re.findall(r"^(?:PYLLAMA_DEVICE|inline) (?:\w+[ *&]+)+(\w+)\(", header, re.MULTILINE))
    assert len(helpers) > 50
    kernels = (Path(__file__).parent / "helper_kernels.cpp").read_text()
    assert {h for h in helpers if not re.search(rf"\b{h}\b", kernels)} == set()


@pytest.mark.parametrize("kernel", ["mma_half", "mma_half_transposed", "mma_bfloat16", "mma_bfloat16_transposed"])
def test_tensor_cores_multiply_matrices(emulated: Emulated, kernel: str) -> None:
    rng = RNG(8)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    if "half" in kernel:
        narrow = [x.astype(np.float16).view(np.uint16).ravel() for x in (a, b)]
        a, b = (x.view(np.float16).astype(np.float64) for x in narrow)
    else:
        narrow = [(x.view(np.uint32) >> 16).astype(np.uint16).ravel() for x in (a, b)]
        a, b = ((x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in narrow)
    words = np.concatenate([np.concatenate(narrow).view(np.uint32), c.view(np.uint32).ravel()])
    found = emulated.in_all_orders(lambda: emulated.run(kernel, words, 128, shared=768)).view(np.float32)
    a, b = a.reshape(16, 16), b.reshape(16, 8)
    check_mma(emulated, found.reshape(16, 8), c + a @ b, np.abs(c) + np.abs(a) @ np.abs(b))


@pytest.mark.parametrize("rows", [1, 2, 3, 10])
def test_asynchronous_copies(emulated: Emulated, rows: int) -> None:
    block = 40
    data = RNG(9).integers(0, 2**20, (rows, block, 4), np.uint32)
    words = np.concatenate([np.array([rows, 0, 0, 0], np.uint32), data.ravel()])
    found = emulated.in_all_orders(
        lambda: emulated.run("staged_sum", words, 4 * block, block=block, shared=3 * 16 * block, early=True)
    )
    assert (found.reshape(block, 4) == np.roll(data.sum(axis=0, dtype=np.uint32), -1, axis=0)).all()
