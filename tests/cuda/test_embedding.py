"""csrc/cuda/embedding.cu on the emulated device: rows out of fragment order are the numbers that the format defines."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.conftest import Emulated
from tests.cuda.helpers_fragments import CASES, UPLOADED_CASES, Stored, case_name, describe, random_weight

SHAPE = (53, 352)  # the last tile has 5 rows, the last chunk 32 columns, the last group of 128 has 96


def embed(emulated: Emulated, w: Stored, tokens: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    numbers, payload = describe([w])
    x = np.zeros((len(tokens), w.spec.shape[1]), np.float32)
    ids, unused = tokens.astype(np.int32), np.zeros(1, np.int32)
    some = unused if order is None else order
    emulated.call("embed_tokens", numbers, payload, payload.size, ids, len(ids), some, int(order is not None), x)
    return x


@pytest.mark.parametrize("case", CASES + UPLOADED_CASES, ids=case_name)
def test_rows(emulated: Emulated, case: dict[str, object]) -> None:
    w = random_weight(SHAPE, 7, **case)  # type: ignore[arg-type]
    tokens = np.array([52, 0, 7, 8, 15, 16, 28, 31, 45, 52])
    x = emulated.in_all_orders(lambda: embed(emulated, w, tokens))
    value, minimum = w.parts()
    exact = (value + minimum)[tokens]
    # Scales and minima in bf16 are off by 2^-40 of the row's largest at most. One rounding; of f32, which
    # is the sum of two halves, a second one.
    largest = np.abs(np.concatenate([value, minimum], axis=1)).max(-1)[tokens, None]
    assert (np.abs(x - exact) <= 2.0**-23 * np.abs(exact) + 2.0**-31 * largest).all()
    if case["format"] in ("f16", "bf16"):
        assert (x == exact.astype(np.float32)).all()


def test_columns_in_another_order(emulated: Emulated) -> None:
    w = random_weight(SHAPE, 8, format="q4a", group=32, input_order=True)
    order = w.packed.input_order
    assert order is not None
    x = embed(emulated, w, np.array([3, 50]), order)
    exact = np.add(*w.parts())[[3, 50]]
    assert (np.abs(x[:, order] - exact) <= 2.0**-24 * np.abs(exact)).all()


@pytest.mark.many_blocks
def test_more_tokens_than_a_grid_is_high(emulated: Emulated) -> None:
    w = random_weight((16, 3), 11, format="f16")
    tokens = np.arange(65_537) % 16
    assert (embed(emulated, w, tokens) == w.parts()[0][tokens]).all()


def test_tokens_that_are_no_rows(emulated: Emulated) -> None:
    w = random_weight(SHAPE, 10, format="q4", group=64)
    x = embed(emulated, w, np.array([-1, 53, 2**31 - 1, 52]))
    assert np.isnan(x[:3]).all() and np.isfinite(x[3]).all()
