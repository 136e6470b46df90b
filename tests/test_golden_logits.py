"""Logits and greedy texts against what transformers computed once, in float32 (tests/make_golden_logits.py made them).

The whole road: a checkpoint on the disk, converted to f32, opened, run. Tolerance: 1e-3 of the largest logit, for the
cache's float16 keys and values. Live comparisons on more models: tests/oracles/test_logits_transformers.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama import LLM
from pyllama.common.model_folder import read_model_folder
from pyllama.open import OpenedModel, native_weight
from quantize import convert

from . import make_golden_logits as golden
from .helpers_llm import ByteTokenizer
from .make_sources import write_gguf, write_hf_folder


def run(folder: Path, ids: Any) -> Any:
    """Logits of a folder that has no tokenizer."""
    found = read_model_folder(folder)
    weights = {name: native_weight(tensor.spec, tensor.payload()) for name, tensor in found.tensors.items()}
    with LLM._from_opened(OpenedModel(folder, found.config, weights, ByteTokenizer(), None, {}), threads=2) as llm:
        return llm.logits(ids)


@pytest.mark.parametrize("container", ["safetensors", "sharded", "gguf"])
@pytest.mark.parametrize("name", golden.SHAPES)
def test_random_llama(tmp_path: Path, name: str, container: str) -> None:
    shape = golden.SHAPES[name]
    weights = golden.scaled_weights(shape)
    if container == "gguf":
        source = write_gguf(tmp_path / "model.gguf", shape, weights, "F32")
    else:
        source = write_hf_folder(tmp_path / "hf", shape, weights, shards=3 if container == "sharded" else 1)
    with np.load(golden.RANDOM) as stored:
        assert golden.checksum(weights) == str(stored[f"{name}_sha256"]), "other weights than the golden logits' own"
        expected = stored[name]
    ours = run(convert(source, tmp_path / "ours", format="f32"), golden.token_ids(shape))
    assert ours.shape == expected.shape == (golden.N_TOK, shape.vocab_size)
    assert np.abs(ours - expected).max() <= golden.TOLERANCE * np.abs(expected).max()


# ---------------------------------------------------------------------------------------------------- the demo model

STORED: dict[str, Any] = json.loads(golden.DEMO.read_text(encoding="utf-8"))
CASES: list[dict[str, Any]] = STORED["cases"]


@pytest.fixture(scope="module")
def demo_f32(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    assert hashlib.sha256(demo_gguf.read_bytes()).hexdigest() == STORED["source"]["sha256"], "another demo model"
    with LLM(convert(demo_gguf, tmp_path_factory.mktemp("demo") / "f32", format="f32"), n_ctx=256) as llm:
        yield llm


def test_enough_is_stored() -> None:
    assert len(CASES) >= 5 and sum(len(case["greedy"]) for case in CASES) >= 120


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"][:20])
def test_demo_model(demo_f32: LLM, case: dict[str, Any]) -> None:
    ids, greedy = case["ids"], case["greedy"]
    assert demo_f32.tokenizer.encode(case["prompt"], add_special=False, parse_special=True) == ids
    reply = demo_f32.generate(ids, temperature=0.0, repetition_penalty=1.0, max_tokens=len(greedy), ignore_eos=True)
    assert list(reply.token_ids) == greedy
    logits = demo_f32.logits(ids + greedy[:-1])[len(ids) - 1 :]
    for row, step in zip(logits, case["top"], strict=True):
        tolerance = golden.TOLERANCE * step["max_abs"]
        assert int(row.argmax()) == step["ids"][0]
        assert np.abs(row[step["ids"]] - step["logits"]).max() <= tolerance
        assert abs(np.abs(row).max() - step["max_abs"]) <= tolerance
