"""Whole models on the CUDA kernels against transformers (float32, eager attention): random small Llamas.

On the emulated device unless PYLLAMA_CUDA_TESTS says otherwise (tests/cuda/conftest.py); there a few tokens have to do.
A product's input has 11 bits on the device, so the tolerance is wider than the CPU's in test_logits_transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama import _C
from pyllama.open import open_model
from quantize import convert
from tests.cuda.conftest import ON_DEVICE

from .helpers_transformers import (
    LLAMA3,
    Case,
    Logits,
    kl_per_token,
    random_llama,
    ratio,
    reference_logits,
    save_hf_folder,
)

TOLERANCE = 2.0**-8  # of the largest logit; 2^-10 was seen
N_PROMPT, N_MORE = (192, 8) if ON_DEVICE else (20, 4)

CASES = [
    Case("grouped-query"),
    Case("multi-query tied", n_kv_heads=1, tied=True),
    Case("odd sizes", dim=100, n_heads=5, n_kv_heads=5, head_dim=20),
    Case("attention bias", other={"attention_bias": True}),
    Case("llama3 rope", rope=LLAMA3 | {"rope_theta": 5e5}, head_dim=32),
    Case("bfloat16", stored="bfloat16"),
    Case("float16", stored="float16", tied=True),
]


def cuda_logits(folder: Path, ids: list[int], library: Path, monkeypatch: pytest.MonkeyPatch) -> Logits:
    """Of a prompt at once, then of single tokens, the last of which are replayed."""
    monkeypatch.setenv("PYLLAMA_CUDA_LIBRARY", str(library))
    opened = open_model(folder)
    model: Any = _C.Model(opened.native_config(len(ids)), opened.weights, device="cuda", max_batch_tok=N_PROMPT)
    assert model.backend.startswith("cuda")
    sequence = model.sequence()
    parts = [ids[:N_PROMPT], *([token] for token in ids[N_PROMPT:])]
    return np.concatenate([model.step([(sequence, part, None, "all")])[0].logits for part in parts])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_random_llama(tmp_path: Path, case: Case, cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama(case, seed=CASES.index(case))
    source = save_hf_folder(model, case, tmp_path / "hf")
    format = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[case.stored]
    folder = convert(source, tmp_path / "ours", format=format)
    ids = [int(token) for token in np.random.default_rng(CASES.index(case)).integers(0, 131, N_PROMPT + N_MORE)]
    expected = reference_logits(model, ids)
    found = cuda_logits(folder, ids, cuda_library, monkeypatch)
    divergence = kl_per_token(expected, found).mean()
    agree = (expected.argmax(-1) == found.argmax(-1)).mean()
    print(f"{case.name}: max|Δ| / max|logit| = {ratio(found, expected):.1e}, KL {divergence:.1e}, top-1 {agree:.1%}")
    assert ratio(found, expected) <= TOLERANCE
    assert divergence <= 0.003 and agree >= (0.97 if ON_DEVICE else 0.9)
