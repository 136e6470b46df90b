"""Weights in fragment order: the kernels' bytes against a second definition of the layout in numpy, built on the table
of mma.m16n8k16's operands, for all formats and odd shapes; and every code through csrc/cuda/dequant.cuh.
"""

from __future__ import annotations

import numpy as np
import pytest

from pyllama.common.formats import TensorSpec
from tests.cuda.conftest import Emulated, EmulationError, emulation_only
from tests.cuda.helpers_fragments import (
    CASES,
    UPLOADED_CASES,
    Layout,
    bytes_on_device,
    case_name,
    describe,
    random_weight,
    reference,
)

RNG = np.random.default_rng
Q4, Q4NL, Q8 = 0, 1, 2  # Codes of csrc/cuda/fragments.h


@pytest.mark.parametrize("case", CASES + UPLOADED_CASES, ids=case_name)
@pytest.mark.parametrize("shape", [(16, 64), (5, 33), (40, 200)])
def test_bytes_on_the_device(emulated: Emulated, case: dict[str, object], shape: tuple[int, int]) -> None:
    weight = random_weight(shape, seed=shape[1], **case)
    expected = reference([weight])
    found = bytes_on_device(emulated, [weight], expected)
    for name in ("codes", "scales", "row_scales"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@emulation_only("a device's order is its own")
@pytest.mark.parametrize("order", ["descending", "random:4"])
def test_bytes_in_other_thread_orders(emulated: Emulated, order: str) -> None:
    weight = random_weight((24, 100), seed=3, format="bf16")
    try:
        emulated.call("set_order", order)
        found = bytes_on_device(emulated, [weight], reference([weight]))
    finally:
        emulated.call("set_order", "ascending")
    assert found == reference([weight])


@pytest.mark.parametrize("format", ["q4a", "q8", "f16", "f32"])
def test_matrices_below_each_other_and_rows_moved(emulated: Emulated, format: str) -> None:
    """Three matrices as one, rows in any order, some twice, some nowhere."""
    case: dict[str, object] = {"format": format}
    if format.startswith("q"):
        case |= {"group": 64, "scale": "bf16", "offset": "u8"} if format == "q4a" else {"group": 64}
    weights = [random_weight((n, 100), seed=n, **case) for n in (20, 7, 16)]
    row_map = RNG(5).integers(-1, 43, 48).astype(np.int32)
    expected = reference(weights, row_map)
    assert bytes_on_device(emulated, weights, expected, row_map) == expected


def test_numbers_that_halves_have_not_got(emulated: Emulated) -> None:
    """bf16 rows from 2^-133 to 2^127 come out exactly: their power of two is the row's."""
    tiny, huge = 2.0**-133, float(np.float32(1.9921875 * 2.0**127))
    values = np.zeros((16, 64), np.float32)
    values[0, :3] = tiny, -3 * tiny, 0
    values[1, :3] = huge, -huge / 2**20, 2.0**100
    values[2, :3] = np.inf, 3.0, np.nan
    values[3, :2] = 1.0, 2.0**-31 * 1.9921875
    weight = random_weight(values.shape, seed=0, format="bf16", values=values)
    found = bytes_on_device(emulated, [weight], reference([weight]))
    halves = Layout(found.codes, tiles=1, chunks=1).halves()
    back = halves.astype(np.float64) * found.row_scales[:16, None]
    np.testing.assert_array_equal(back, values.astype(np.float64))
    assert found.row_scales[2] == 2.0 ** (1 - 14)


def test_scales_that_halves_have_not_got(emulated: Emulated) -> None:
    spec = TensorSpec("w", "q4a", (2, 128), group=32, scale="bf16", offset="bf16")
    weight = random_weight((2, 128), seed=1, spec=spec)
    scales = np.array([[1e-30, -3e-30, 1e-38, 0], [3e38, 1e30, np.inf, 1]], np.float32)
    offsets = np.array([[1e-29, 0, -1e-33, 1e-35], [-1e38, np.nan, 1e35, -2]], np.float32)
    weight = weight.with_scales(scales, offsets)
    expected = reference([weight])
    found = bytes_on_device(emulated, [weight], expected)
    np.testing.assert_array_equal(found.scales.view(np.float16), expected.scales.view(np.float16))  # NaN is NaN
    words = found.scales.view(np.float16).reshape(2, 8, 4, 2)[:, 0].astype(np.float64) * found.row_scales[0].astype(
        np.float64
    )
    kept = weight.scales_float64()[0]
    np.testing.assert_array_equal(words[:, :2, 0].ravel(), kept)
    np.testing.assert_array_equal(words[:, 2].ravel(), weight.offsets_float64()[0])


def dequantized(emulated: Emulated, kind: int, words: np.ndarray, bias: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(words, np.uint32)
    out = np.zeros((len(words), 4), np.uint32)
    emulated.call("dequantize_words", kind, len(words), words, np.ascontiguousarray(bias, np.uint32), codebook, out)
    return out.view(np.float16).reshape(-1, 4, 2).astype(np.float64)


def nibble_words() -> np.ndarray:
    """Every code in every place of a word, among all-equal neighbours of every code, and random words."""
    codes = np.arange(16, dtype=np.uint64)
    same = codes * 0x11111111
    places = 4 * np.arange(8, dtype=np.uint64)
    one = (same[:, None, None] & ~(np.uint64(15) << places)[None, :, None]) | (codes << places[:, None])[None]
    words = np.concatenate([one.ravel(), RNG(0).integers(0, 2**32, 500, np.uint64)]).astype(np.uint32)
    return np.stack([words, np.zeros_like(words)], axis=1)


def nibbles(words: np.ndarray) -> np.ndarray:
    return (words[:, :1] >> (4 * np.arange(8, dtype=np.uint32)) & 15).astype(np.int64)


def half_bits(values: object) -> np.ndarray:
    bits: np.ndarray = np.asarray(values, np.float16).view(np.uint16).astype(np.uint32)
    return bits * np.uint32(0x10001)


def test_every_q4_code_and_zero_point(emulated: Emulated) -> None:
    words = nibble_words()
    zero_points = np.arange(256)
    words = np.concatenate([words, np.repeat(nibble_words()[:16], 256, axis=0)])
    z = np.concatenate([np.full(len(words) - 16 * 256, 8), np.tile(zero_points, 16)])
    bias = np.stack([half_bits(-1024 - z), half_bits(-64 - z)], axis=1)
    found = dequantized(emulated, Q4, words, bias, np.zeros(4, np.uint32))
    n = nibbles(words)
    expected = np.stack([n[:, :4], n[:, 4:]], axis=2) - z[:, None, None]
    np.testing.assert_array_equal(found, expected)


def test_every_q4nl_code_and_entry(emulated: Emulated) -> None:
    words = nibble_words()
    for book in (
        np.arange(-127, 129, 16)[:16],
        np.arange(16) * 17 % 255 - 127,
        np.full(16, -127),
        RNG(1).integers(-127, 128, 16),
    ):
        packed = (book + 128).astype(np.uint8).view(np.uint32)
        found = dequantized(emulated, Q4NL, words, np.zeros_like(words), packed)
        np.testing.assert_array_equal(found, book[nibbles(words)].reshape(-1, 4, 2))


def test_every_q8_code(emulated: Emulated) -> None:
    codes = np.stack([np.roll(np.arange(256), shift) for shift in range(8)], axis=1).astype(np.uint8)
    found = dequantized(emulated, Q8, codes.view(np.uint32), np.zeros((256, 2)), np.zeros(4, np.uint32))
    np.testing.assert_array_equal(found, codes.reshape(-1, 4, 2).astype(np.int64) - 128)


def test_matrices_that_are_no_product(emulated: Emulated) -> None:
    a = random_weight((16, 64), seed=1, format="q4", group=32)
    for other in (
        random_weight((16, 96), seed=1, format="q4", group=32),
        random_weight((16, 64), seed=1, format="q4", group=64),
        random_weight((16, 64), seed=1, format="q8", group=32),
    ):
        with pytest.raises(EmulationError, match="weight0 and weight1 cannot be one product"):
            bytes_on_device(emulated, [a, other], reference([a]))
    u8, minimum = (random_weight((16, 64), seed=1, format="q4a", group=32, offset=o) for o in ("u8", "f16"))
    with pytest.raises(EmulationError, match="kind of offset"):
        bytes_on_device(emulated, [u8, minimum], reference([u8]))
    ordered = random_weight((16, 64), seed=1, format="q4a", group=32, offset="u8", input_order=True)
    with pytest.raises(EmulationError, match="input_order"):
        bytes_on_device(emulated, [ordered, ordered], reference([ordered]))
    with pytest.raises(EmulationError, match="4 matrices"):
        bytes_on_device(emulated, [a] * 4, reference([a]))
    numbers, payload = describe([a])
    numbers[4] = 0
    with pytest.raises(EmulationError, match="is a vector"):
        emulated.call(
            "make_fragments", numbers, 1, payload, payload.size, payload, 0, payload, payload, payload, payload
        )
