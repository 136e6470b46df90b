"""y = x W^T for more than 8 tokens on the emulated device, against float64: all formats, odd shapes, all shapes of a
block, all thread orders. And its promises: a token's bits depend on its input alone, NaN stays with its token.

On one multiprocessor more than 32 tokens go to large blocks (128 rows × 64 tokens; f16 from 65 on: 128 × 128), on many
to smaller ones (64 × 32); up to 16 tokens go to the smallest.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.conftest import Emulated, EmulationError
from tests.cuda.helpers_fragments import CASES, case_name, random_weight
from tests.cuda.helpers_linear import activations, check_product, product

RNG = np.random.default_rng
LARGE_BLOCKS, SMALL_BLOCKS = 1, 1000  # multiprocessors


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize(
    ("shape", "n_tokens", "processors"),
    [((33, 200), 9, 1), ((70, 130), 33, LARGE_BLOCKS), ((17, 100), 19, SMALL_BLOCKS)],
    ids=["smallest", "large", "small"],
)
def test_all_formats(
    emulated: Emulated, case: dict[str, object], shape: tuple[int, int], n_tokens: int, processors: int
) -> None:
    weight = random_weight(shape, seed=n_tokens, **case)
    x = activations(n_tokens, shape[1], seed=1)
    check_product([weight], x, product(emulated, [weight], x, multiprocessors=processors))


@pytest.mark.parametrize("columns", [1, 31, 64, 65, 513, 640])
@pytest.mark.parametrize("n_tokens", [10, 33])
def test_all_numbers_of_stages(emulated: Emulated, n_tokens: int, columns: int) -> None:
    """Fewer chunks than stages, rounds of all stages, steps that end early."""
    for case in (CASES[0], CASES[9]):
        weight = random_weight((16, columns), seed=columns, **case)
        x = activations(n_tokens, columns, seed=2)
        for processors in (LARGE_BLOCKS, SMALL_BLOCKS):
            check_product([weight], x, product(emulated, [weight], x, multiprocessors=processors))


@pytest.mark.parametrize("n_tokens", [9, 16, 17, 32, 64, 65, 130, 200])
@pytest.mark.parametrize("rows", [1, 16, 129])
def test_all_numbers_of_blocks(emulated: Emulated, n_tokens: int, rows: int) -> None:
    weight = random_weight((rows, 64), seed=rows, format="q4", group=64)
    x = activations(n_tokens, 64, seed=n_tokens)
    check_product([weight], x, product(emulated, [weight], x))


@pytest.mark.parametrize("case", [CASES[1], CASES[8], CASES[9], CASES[-3]], ids=case_name)
@pytest.mark.parametrize(("n_tokens", "processors"), [(13, 1), (35, LARGE_BLOCKS), (35, SMALL_BLOCKS)])
def test_all_thread_orders(emulated: Emulated, case: dict[str, object], n_tokens: int, processors: int) -> None:
    """Enough chunks that every stage is written again."""
    weight = random_weight((40, 64 * (20 if n_tokens < 16 else 7)), seed=4, **case)
    x = activations(n_tokens, weight.spec.shape[1], seed=3)
    y = emulated.in_all_orders(lambda: product(emulated, [weight], x, multiprocessors=processors))
    check_product([weight], x, y)


@pytest.mark.parametrize("n_tokens", [65, 130])
def test_the_largest_blocks(emulated: Emulated, n_tokens: int) -> None:
    weight = random_weight((30, 250), seed=14, format="bf16")
    x = activations(n_tokens, 250, seed=12)
    y = emulated.in_all_orders(lambda: product(emulated, [weight], x, multiprocessors=LARGE_BLOCKS))
    check_product([weight], x, y)
    assert (product(emulated, [weight], x, multiprocessors=SMALL_BLOCKS) == y).all()


@pytest.mark.parametrize("case", [*CASES[:9:4], CASES[9], CASES[10], *CASES[-3:]], ids=case_name)
def test_a_token_has_the_same_bits(emulated: Emulated, case: dict[str, object]) -> None:
    """Whatever the other tokens, however many, in blocks of whatever shape, in whatever place."""
    weight = random_weight((40, 330), seed=5, **case)
    x = activations(70, 330, seed=4)
    together = product(emulated, [weight], x, multiprocessors=LARGE_BLOCKS)
    assert (product(emulated, [weight], x, multiprocessors=SMALL_BLOCKS) == together).all()
    for n in (9, 16, 17, 33):
        assert (product(emulated, [weight], x[:n], multiprocessors=1) == together[:n]).all()
        assert (product(emulated, [weight], x[-n:], multiprocessors=1) == together[-n:]).all()
    mixed = RNG(1).permutation(70)
    assert (product(emulated, [weight], x[mixed], multiprocessors=1) == together[mixed]).all()


@pytest.mark.parametrize("n_tokens", [11, 70])
def test_bias_and_residual(emulated: Emulated, n_tokens: int) -> None:
    weight = random_weight((37, 96), seed=6, format="q4", group=32)
    x = activations(n_tokens, 96, seed=5)
    bias = RNG(6).standard_normal(37).astype(np.float32)
    residual = RNG(7).standard_normal((n_tokens, 37)).astype(np.float32)
    plain = product(emulated, [weight], x)
    assert (product(emulated, [weight], x, bias=bias) == plain + bias).all()
    assert (product(emulated, [weight], x, residual=residual) == plain + residual).all()
    assert (product(emulated, [weight], x, bias=bias, residual=residual) == (plain + bias) + residual).all()


def test_input_order(emulated: Emulated) -> None:
    weight = random_weight((20, 200), seed=7, format="q4a", group=64, offset="u8", input_order=True)
    x = activations(18, 200, seed=6)
    check_product([weight], x, product(emulated, [weight], x))


@pytest.mark.parametrize("case", [CASES[0], CASES[10], CASES[-1]], ids=case_name)
@pytest.mark.parametrize(("n_tokens", "processors"), [(12, 1), (34, LARGE_BLOCKS), (20, SMALL_BLOCKS)])
def test_swiglu(emulated: Emulated, case: dict[str, object], n_tokens: int, processors: int) -> None:
    gate, up = (random_weight((24, 160), seed=s, **case) for s in (8, 9))
    x = activations(n_tokens, 160, seed=9) / 100
    tile, r = np.divmod(np.arange(48), 16)
    row_map = np.where(r < 8, 8 * tile + r, 24 + 8 * tile + r - 8).astype(np.int32)
    apart = np.concatenate([product(emulated, [w], x, multiprocessors=processors) for w in (gate, up)], axis=1)
    found = product(emulated, [gate, up], x, row_map=row_map, swiglu=True, multiprocessors=processors)
    by_itself = np.zeros_like(found)
    emulated.call("swiglu_rows", np.array([n_tokens, 48, 48], np.int32), apart, by_itself)
    assert (found == by_itself).all()  # vector.cu's, which is tested against float64


@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[9], CASES[-3]], ids=case_name)
@pytest.mark.parametrize("n_tokens", [9, 33])
def test_infinity_and_nan_arrive(emulated: Emulated, case: dict[str, object], n_tokens: int) -> None:
    """In every row of their token, and in no other token."""
    weight = random_weight((32, 192), seed=10, **case)
    x = activations(n_tokens, 192, seed=10)
    clean = product(emulated, [weight], x)
    for bad in (np.nan, np.inf, -np.inf):
        dirty = x.copy()
        dirty[5, 100] = bad
        y = product(emulated, [weight], dirty)
        assert not np.isfinite(y[5]).any()
        others = np.delete(np.arange(n_tokens), 5)
        assert (y[others] == clean[others]).all()


@pytest.mark.parametrize("case", [CASES[0], CASES[8], CASES[-1]], ids=case_name)
def test_right_after_the_upload(emulated: Emulated, case: dict[str, object]) -> None:
    """A product is started early and reads weights before it waits: the kernel in front must not have written them."""
    weight = random_weight((20, 130), seed=13, **case)
    x = activations(12, 130, seed=11)
    assert (product(emulated, [weight], x, upload_last=True) == product(emulated, [weight], x)).all()


def test_no_multiprocessors(emulated: Emulated) -> None:
    weight = random_weight((16, 64), seed=12, format="q8", group=32)
    with pytest.raises(EmulationError, match="0 multiprocessors"):
        product(emulated, [weight], np.zeros((9, 64), np.float32), multiprocessors=0)
