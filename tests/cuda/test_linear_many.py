"""y = x W^T for more than 8 tokens on the emulated device, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.conftest import Emulated
from tests.cuda.helpers_fragments import CASES, case_name, random_weight
from tests.cuda.helpers_linear import activations, check_product, product


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_all_formats(emulated: Emulated, case: dict[str, object]) -> None:
    weight = random_weight((33, 200), seed=3, **case)
    x = activations(19, 200, seed=1)
    check_product([weight], x, product(emulated, [weight], x))


def test_bias_and_residual(emulated: Emulated) -> None:
    weight = random_weight((37, 96), seed=6, format="q4", group=32)
    x = activations(18, 96, seed=5)
    bias = np.random.default_rng(6).standard_normal(37).astype(np.float32)
    residual = np.random.default_rng(7).standard_normal((18, 37)).astype(np.float32)
    plain = product(emulated, [weight], x)
    assert (product(emulated, [weight], x, bias=bias, residual=residual) == (plain + bias) + residual).all()
