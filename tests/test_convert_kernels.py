"""The extension's loops for conversion equal their numpy definitions, bit for bit, on every instruction set.

The definition is run by taking the extension away; rounding, sums and ties are compared by ==, also at the ends of the
number range. What the searches find at all is tested in test_rtn.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllama import _C
from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import CODEBOOKS, FORMATS, GROUPS, NUMPY_TILES, Packed, TensorSpec, dense, pack
from quantize import kernels
from quantize.methods import gptq, quantize_rtn
from quantize.methods.rtn import Search
from tests.test_rtn import spec_of

EXTENSION = kernels.extension()
assert EXTENSION is not None, "the extension is not built, or older than the sources; run `make dev`"
ISAS = EXTENSION.isas()
FORMATS_MADE = [name for name, row in FORMATS.items() if row.quantized]


class Forced:
    """The loops, all on one instruction set."""

    def __init__(self, isa: str) -> None:
        self.isa = isa

    def __getattr__(self, name: str) -> Any:
        call = getattr(EXTENSION, name)
        return call if name.startswith("put_") else lambda *arguments: call(*arguments, isa=self.isa)


@contextmanager
def using(extension: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "extension", lambda: extension)
        yield


def same_bits(a: Packed, b: Packed) -> None:
    for name in ("codes", "scales", "offsets"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype and left.shape == right.shape
            np.testing.assert_array_equal(left.view(f"u{left.itemsize}"), right.view(f"u{right.itemsize}"), name)


def check(
    weights: NDArray[np.float32],
    format: str,
    group: int,
    codebook: tuple[int, ...] | None = None,
    importance: NDArray[np.float32] | None = None,
) -> None:
    with using(None), np.errstate(all="ignore"):
        expected = quantize_rtn(weights, format, group, codebook, importance=importance)
    for isa in ISAS:
        with using(Forced(isa)):
            same_bits(quantize_rtn(weights, format, group, codebook, importance=importance), expected)


KINDS = ["normal", "spiky", "one sign", "few values", "ties", "zeros", "sparse", "any bits"]
LARGEST = {"q8": 127 * 65504.0, "q4": 8 * 65504.0, "q4a": 65504.0, "q4nl": 127 * 65504.0}
LARGEST |= {"q5nl": 127 * 65504.0, "q6": 32 * 65504.0}


def drawn(kind: str, shape: tuple[int, int], size: float, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    if kind == "any bits":  # of every exponent
        values = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
        values = np.where(np.isfinite(values), values, 0)
        return np.clip(values, -6e4, 6e4).astype(np.float32)
    made = {
        "normal": lambda: rng.standard_normal(shape),
        "spiky": lambda: rng.standard_normal(shape) ** 7 / 1000,
        "one sign": lambda: 3 + rng.uniform(0, 1, shape),
        "few values": lambda: rng.integers(-2, 3, shape) * rng.choice([1.0, -0.0], shape),
        "ties": lambda: rng.integers(-16, 17, shape) / 2,
        "zeros": lambda: rng.choice([0.0, -0.0], shape),
        "sparse": lambda: rng.standard_normal(shape) * (rng.uniform(0, 1, shape) < 0.05),
    }[kind]()
    return (made * size).astype(np.float32)


@settings(max_examples=120)
@given(
    st.sampled_from(FORMATS_MADE),
    st.sampled_from(GROUPS),
    st.tuples(st.integers(1, 40), st.integers(1, 300)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-40, 1e-30, 1e-12, 6e-8, 1e-5, 1e-3, 1.0, 5e3]),
    st.sampled_from(KINDS),
    st.sampled_from([None, 0.0, 1.0, 5.0]),
)
def test_searches_equal_their_definition(
    format: str, group: int, shape: tuple[int, int], seed: int, size: float, kind: str, spread: float | None
) -> None:
    """spread: of what columns count, as the logarithm's; None: alike."""
    weights = drawn(kind, shape, size, seed)
    weights = np.clip(weights, -LARGEST[format] * 0.99, LARGEST[format] * 0.99)
    importance = None
    if spread is not None:
        importance = np.exp(spread * np.random.default_rng(seed).standard_normal(shape[1])).astype(np.float32)
    check(weights, format, group, importance=importance)


@pytest.mark.parametrize("size", [1e-40, 0.5])
@pytest.mark.parametrize("format", FORMATS_MADE)
def test_every_kind_of_numbers(format: str, size: float) -> None:
    """A choice of the above, small enough for emulated processors."""
    for kind in KINDS:
        check(drawn(kind, (5, 70), size, 6), format, 32)


@pytest.mark.parametrize("format", FORMATS_MADE)
def test_a_matrix_of_a_real_size(format: str) -> None:
    check(drawn("normal", (67, 1300), 0.05, 1), format, 64)


@pytest.mark.parametrize("format", FORMATS_MADE)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weights(format: str, sign: int) -> None:
    weights = drawn("normal", (5, 70), 1.0, 2)
    weights[1, 40] = sign * LARGEST[format] * 0.999
    weights[2, :] = sign * LARGEST[format]
    weights[3, 1], weights[3, 2] = LARGEST[format], -LARGEST[format]
    check(weights, format, 32)


@pytest.mark.parametrize(
    "codebook",
    [
        (5, -5, 20, -20, 1, -1, 60, -60, 127, -127, 90, -90, 40, -40, 10, -10),
        (-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7),  # two borders in a run of 16 halves
        (-1, 1) * 8,
        (-127, 127, *range(-7, 7)),
    ],
)
def test_any_codebook(codebook: tuple[int, ...]) -> None:
    importance = np.random.default_rng(5).uniform(0.01, 10, 150).astype(np.float32)
    for kind in ("normal", "ties", "one sign"):
        for counts in (None, importance):
            check(drawn(kind, (9, 150), 0.1, 3), "q4nl", 32, codebook, counts)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("format", FORMATS_MADE)
def test_what_numpy_refuses_is_refused_in_the_same_words(bad: float, format: str) -> None:
    weights = drawn("normal", (3, 70), 1.0, 0)
    weights[2, 69] = bad
    said = []
    for extension in (None, *map(Forced, ISAS)):
        with using(extension), pytest.raises(ModelFormatError) as caught:
            quantize_rtn(weights, format, 32, name="w")
        said.append(str(caught.value))
    assert len(set(said)) == 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codebook", [None, tuple(range(-8, 8))], ids=["own", "dense"])
def test_no_weight_leads_beyond_the_codebook(isa: str, codebook: tuple[int, ...] | None) -> None:
    """A file may change between the check for NaN and the search. What comes of it is nobody's; no other group's."""
    method = Search("q4nl", codebook)
    tables = (method.grid.level_of_half, method.grid.code_of_half)
    weights = drawn("normal", (5, 70), 1.0, 4)
    arguments = (32, (method.grid.low, method.grid.high), 0, method.places, *tables)
    codes, scales = EXTENSION.search_scale(weights, *arguments, isa=isa)
    weights[1, 3], weights[2, 40], weights[4, 69] = np.nan, np.inf, -np.nan
    touched = EXTENSION.search_scale(weights, *arguments, isa=isa)
    assert (touched[0] < 16).all()
    hit = np.zeros((5, 3), bool)
    hit[1, 0] = hit[2, 1] = hit[4, 2] = True
    np.testing.assert_array_equal(touched[1][~hit], scales[~hit])
    of_column = hit.repeat(32, axis=1)[:, :70]
    np.testing.assert_array_equal(touched[0][~of_column], codes[~of_column])


def moved(values: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins at an odd address, as a view of a file's bytes may."""
    room = np.zeros(values.nbytes + 2, np.uint8)
    start = 1 - room.ctypes.data % 2
    room[start : start + values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)


def test_numbers_at_odd_addresses() -> None:
    weights = drawn("normal", (5, 70), 1.0, 5)
    assert not moved(weights).flags.aligned
    for format in FORMATS_MADE:
        same_bits(quantize_rtn(moved(weights), format, 32), quantize_rtn(weights, format, 32))
    halves = weights.astype(np.float16)
    np.testing.assert_array_equal(kernels.widen_f16(moved(halves)), halves.astype(np.float32))
    spec = TensorSpec("w", "f16", weights.shape)
    np.testing.assert_array_equal(
        pack(spec, Packed(moved(halves)), kernels.tiles()), pack(spec, Packed(halves), NUMPY_TILES)
    )
    for wrong in (
        lambda: EXTENSION.search_scale(moved(weights), 32, (-8, 7), 8, [1.0]),
        lambda: EXTENSION.search_affine(moved(weights), 32, np.zeros((1, 2))),
        lambda: EXTENSION.largest(moved(weights)),
        lambda: EXTENSION.from_f16(moved(halves.view(np.uint16))),
        lambda: EXTENSION.put_columns(moved(halves), np.zeros((1, 70, 16), np.float16)),
        lambda: EXTENSION.put_columns(halves, moved(np.zeros((1, 70, 16), np.float16))),
    ):
        with pytest.raises(ValueError, match="aligned"):
            wrong()


def test_every_half() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    expected = halves.astype(np.float32)
    for isa in ISAS:
        for first in (0, 1, 7):  # the ends of arrays take another way
            found = EXTENSION.from_f16(halves.view(np.uint16)[first : first + 65530], isa=isa)
            nan = np.isnan(expected[first : first + 65530])
            assert (np.isnan(found) == nan).all()
            assert (found.view(np.uint32) == expected[first : first + 65530].view(np.uint32))[~nan].all()


@settings(max_examples=60)
@given(
    st.sampled_from(list(FORMATS)),
    st.tuples(st.integers(1, 50), st.integers(1, 200)),
    st.integers(0, 2**32 - 1),
)
def test_tiles_equal_their_definition(format: str, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    if FORMATS[format].quantized:
        spec = spec_of(format, shape, 32)
        packed = quantize_rtn(drawn("normal", shape, 1.0, seed), format, 32)
    else:
        spec = TensorSpec("w", format, shape)
        packed = dense(spec, rng.standard_normal(shape).astype(np.float32))
    np.testing.assert_array_equal(pack(spec, packed, kernels.tiles()), pack(spec, packed, NUMPY_TILES))


def test_arguments_are_checked() -> None:
    weights = np.zeros((2, 64), np.float32)
    for wrong in (
        lambda: EXTENSION.search_scale(weights, 0, (-8, 7), 8, [1.0]),
        lambda: EXTENSION.search_scale(weights, 129, (-8, 7), 8, [1.0]),
        lambda: EXTENSION.search_scale(weights[0], 32, (-8, 7), 8, [1.0]),
        lambda: EXTENSION.search_scale(weights, 32, (-8, 7), 8, [1.0], np.zeros(5), np.zeros(5, np.uint8)),
        lambda: EXTENSION.search_affine(weights, 32, np.zeros((2, 3))),
        lambda: EXTENSION.largest(weights, isa="altivec"),
        lambda: EXTENSION.put_codes(np.zeros((2, 64), np.uint8), np.zeros((1, 2, 16, 4), np.uint8), 4),
        lambda: EXTENSION.put_codes(np.zeros((17, 64), np.uint8), np.zeros((1, 8, 16, 4), np.uint8), 4),
        lambda: EXTENSION.put_columns(np.zeros((2, 9), np.float16), np.zeros((1, 8, 16), np.float16)),
        lambda: EXTENSION.put_columns(np.zeros((2, 8), np.float64), np.zeros((1, 8, 16), np.float64)),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            wrong()
    with pytest.raises(TypeError):
        EXTENSION.search_scale(weights.astype(np.float64), 32, (-8, 7), 8, [1.0])


@pytest.mark.parametrize("kind", ["normal", "spiky", "ties", "zeros", "any bits"])
@pytest.mark.parametrize("format", FORMATS_MADE)
def test_groups_of_gptq(format: str, kind: str) -> None:
    """Pushing forward and descending through a group, on any number of rows; the same but for the sign of a zero."""
    rng = np.random.default_rng(7)
    search = Search(format, CODEBOOKS.get(format))
    for width, n in ((1, 1), (5, 33), (32, 16), (128, 19)):
        block = drawn(kind, (width, n), 0.1, 8)
        scales = drawn("normal", (3, n), 0.01, 9)
        scales[:, ::5] = 0
        offsets = drawn("normal", (3, n), 0.01 if search.has_offset else 0, 10)
        gram = rng.standard_normal((width, width)).astype(np.float32)
        gram = gram @ gram.T + np.eye(width, dtype=np.float32)
        factor = np.ascontiguousarray(np.linalg.cholesky(gram).T)
        found = []
        for extension in (None, *map(Forced, ISAS)):
            with using(extension), np.errstate(all="ignore"):
                levels, errors, chosen = gptq.push(block, scales, offsets, factor, search)
                moved, slope = levels.copy(), block.copy()
                gptq.move_codes(moved, scales[0], slope, gram, search)
                found.append((levels, errors, chosen, moved, slope))
        for other in found[1:]:
            for mine, its in zip(other, found[0], strict=True):
                np.testing.assert_array_equal(mine, its)


def test_groups_of_gptq_are_checked() -> None:
    loops = _C.convert
    a, row, square = np.zeros((4, 3), np.float32), np.zeros((1, 3), np.float32), np.eye(4, dtype=np.float32)
    many = np.zeros((128, 3), np.float32)
    for arguments in (
        (a, row[:, :2].copy(), row, square),
        (a, row, row[:, :2].copy(), square),
        (a, row, row, square[:3].copy()),
        (np.zeros((129, 3), np.float32), row, row, np.eye(129, dtype=np.float32)),
        (a, many, many, square),
    ):
        with pytest.raises(ValueError):
            loops.push_group(*arguments, (-8, 7))
    with pytest.raises(ValueError):
        loops.push_group(a, row, row, square, (-8, 7), np.zeros(511, np.float32), np.zeros(512, np.uint8))
    for rest in ((a[:3].copy(), row[0], square), (a, row[0, :2].copy(), square), (a, row[0], square[:2].copy())):
        with pytest.raises(ValueError):
            loops.move_codes(a, *rest, (-8, 7))
