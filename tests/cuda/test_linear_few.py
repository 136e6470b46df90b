"""y = x W^T for 1 to 8 tokens on the emulated device, against float64: all formats, odd shapes, every number of tokens,
all thread orders. And its promises: a token's bits depend on its input alone, no activation is too large, NaN arrives.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.conftest import Emulated, EmulationError
from tests.cuda.helpers_fragments import CASES, Stored, case_name, random_weight
from tests.cuda.helpers_linear import activations, check_product, product

RNG = np.random.default_rng


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize(("shape", "n_tokens"), [((17, 100), 3), ((33, 1056), 8)])
def test_all_formats(emulated: Emulated, case: dict[str, object], shape: tuple[int, int], n_tokens: int) -> None:
    weight = random_weight(shape, seed=n_tokens, **case)
    x = activations(n_tokens, shape[1], seed=1)
    check_product([weight], x, product(emulated, [weight], x))


@pytest.mark.parametrize("columns", [1, 31, 64, 65, 513, 2048, 2080, 4096 + 64])
@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=case_name)
def test_all_lengths_of_rounds(emulated: Emulated, case: dict[str, object], columns: int) -> None:
    """Fewer chunks than warps, whole rounds of all slots, rounds that end early, several tiles to a block."""
    weight = random_weight((49, columns), seed=columns, **case)
    x = activations(2, columns, seed=2)
    check_product([weight], x, product(emulated, [weight], x, multiprocessors=1))


@pytest.mark.parametrize("case", [CASES[1], CASES[8], CASES[9], CASES[-1]], ids=case_name)
def test_all_thread_orders(emulated: Emulated, case: dict[str, object]) -> None:
    weight = random_weight((50, 640), seed=4, **case)
    x = activations(5, 640, seed=3)
    y = emulated.in_all_orders(lambda: product(emulated, [weight], x, multiprocessors=1))
    check_product([weight], x, y)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[8], CASES[9], CASES[-2]], ids=case_name)
def test_a_token_alone_has_the_same_bits(emulated: Emulated, case: dict[str, object]) -> None:
    """Whatever the other tokens, however many, on whatever number of multiprocessors, in whatever place."""
    weight = random_weight((40, 704), seed=5, **case)
    x = activations(8, 704, seed=4)
    together = product(emulated, [weight], x)
    for n in range(1, 8):
        assert (product(emulated, [weight], x[:n], multiprocessors=n) == together[:n]).all()
    assert (product(emulated, [weight], x[::-1]) == together[::-1]).all()
    for token in range(8):
        assert (product(emulated, [weight], x[token : token + 1]) == together[token]).all()


def test_bias_and_residual(emulated: Emulated) -> None:
    weight = random_weight((37, 96), seed=6, format="q4", group=32)
    x = activations(3, 96, seed=5)
    bias = RNG(6).standard_normal(37).astype(np.float32)
    residual = RNG(7).standard_normal((3, 37)).astype(np.float32)
    plain = product(emulated, [weight], x)
    assert (product(emulated, [weight], x, bias=bias) == plain + bias).all()
    assert (product(emulated, [weight], x, residual=residual) == plain + residual).all()
    assert (product(emulated, [weight], x, bias=bias, residual=residual) == (plain + bias) + residual).all()


def test_input_order(emulated: Emulated) -> None:
    weight = random_weight((20, 200), seed=7, format="q4a", group=64, offset="u8", input_order=True)
    x = activations(4, 200, seed=6)
    check_product([weight], x, product(emulated, [weight], x))


@pytest.mark.parametrize("case", [CASES[3], CASES[9], CASES[-2]], ids=case_name)
def test_matrices_side_by_side_with_pairs_of_rope(emulated: Emulated, case: dict[str, object]) -> None:
    """wq, wk, wv as one product: with rows i and i + head_dim / 2 eight apart, each row is the same bits as before."""
    weights = [random_weight((n, 130), seed=n, **case) for n in (64, 32, 32)]
    if weights[0].spec.codebook:
        weights = [Stored(weights[0].spec, weights[0].packed)] * 2
    x = activations(2, 130, seed=8)
    rows = sum(w.spec.shape[0] for w in weights)
    place = np.arange(rows)
    head_dim = 32
    i = place % 16 % 8 + place % head_dim // 16 * 8  # of half a head
    row_map = (place // head_dim * head_dim + i + place % 16 // 8 * (head_dim // 2)).astype(np.int32)
    assert sorted(row_map) == list(range(rows)) and row_map[8] == 16
    plain = product(emulated, weights, x)
    check_product(weights, x, plain)
    assert (product(emulated, weights, x, row_map=row_map) == plain[:, row_map]).all()


@pytest.mark.parametrize("case", [CASES[0], CASES[8], CASES[-1]], ids=case_name)
def test_right_after_the_upload(emulated: Emulated, case: dict[str, object]) -> None:
    """A product is started early and reads weights before it waits: the kernel in front must not have written them."""
    weight = random_weight((20, 130), seed=13, **case)
    x = activations(2, 130, seed=11)
    assert (product(emulated, [weight], x, upload_last=True) == product(emulated, [weight], x)).all()


@pytest.mark.parametrize("case", [CASES[0], CASES[10], CASES[-3]], ids=case_name)
def test_swiglu(emulated: Emulated, case: dict[str, object]) -> None:
    gate, up = (random_weight((24, 160), seed=s, **case) for s in (8, 9))
    x = activations(4, 160, seed=9) / 100
    tile, r = np.divmod(np.arange(48), 16)
    row_map = np.where(r < 8, 8 * tile + r, 24 + 8 * tile + r - 8).astype(np.int32)
    apart = np.concatenate([product(emulated, [w], x) for w in (gate, up)], axis=1)
    g, u = np.split(apart.astype(np.float64), 2, axis=1)
    with np.errstate(over="ignore"):
        expected = g / (1 + np.exp(-g)) * u
    found = product(emulated, [gate, up], x, row_map=row_map, swiglu=True)
    np.testing.assert_allclose(found, expected, rtol=2.0**-20, atol=1e-30)
    by_itself = np.zeros_like(found)
    emulated.call("swiglu_rows", np.array([4, 48, 48], np.int32), apart, by_itself)
    assert (found == by_itself).all()  # vector.cu's, to the bit: both are in float


@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[9], CASES[-3]], ids=case_name)
def test_infinity_and_nan_arrive(emulated: Emulated, case: dict[str, object]) -> None:
    """In every row of their token, and in no other token."""
    weight = random_weight((32, 192), seed=10, **case)
    x = activations(3, 192, seed=10)
    clean = product(emulated, [weight], x)
    for bad in (np.nan, np.inf, -np.inf):
        dirty = x.copy()
        dirty[1, 100] = bad
        y = product(emulated, [weight], dirty)
        assert not np.isfinite(y[1]).any()
        assert (y[[0, 2]] == clean[[0, 2]]).all()


@pytest.mark.parametrize("largest", [1e5, 3e38, 1e-30, 1e-38, 0.0])
def test_activations_of_any_size(emulated: Emulated, largest: float) -> None:
    weight = random_weight((16, 128), seed=11, format="q4a", group=32, offset="f16")
    weight = weight.with_scales(weight.scales_float64() * 1e-3, weight.offsets_float64() * 1e-3)
    x = np.ones((1, 128), np.float32)
    x[0, 64:] = RNG(0).standard_normal(64)
    x = (x / np.abs(x).max() * largest).astype(np.float32)
    y = product(emulated, [weight], x)
    assert np.isfinite(y).all()
    if largest >= 1e-30:
        check_product([weight], x, y)
    else:  # below 2^-100 of the scale, halves are subnormal: no more than half a step of 2^-24 each
        expected = x.astype(np.float64) @ sum(weight.parts()).T
        assert (np.abs(y - expected) <= 128 * 2.0**-25 * 2.0**-100 * 4).all()


def test_wrong_numbers_of_tokens(emulated: Emulated) -> None:
    weight = random_weight((16, 64), seed=12, format="q8", group=32)
    with pytest.raises(EmulationError, match="9 tokens for the product of few; expected 1 to 8"):
        product(emulated, [weight], np.zeros((9, 64), np.float32), few=True)
    with pytest.raises(EmulationError, match="0 multiprocessors"):
        product(emulated, [weight], np.zeros((1, 64), np.float32), multiprocessors=0)
