"""Logits against transformers (float32, eager attention): random small Llamas, the demo model from the same GGUF.

Tolerance: with weights that are equal, what is left is the order of float32 sums and our cache's float16 keys and
values, 2^-11 of each; 1e-3 of the largest logit holds both. Quantized weights add the rounding of activations to int8,
for which there is no such bound; there the distributions are compared. Readers are tested in test_readers_reference.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from pyllama import LLM
from pyllama.common.formats import dequantize, unpack
from pyllama.common.model_folder import read_model_folder
from quantize import convert
from quantize.compare import EVALUATION_TEXT
from quantize.readers import open_source
from tests import make_sources as make

from .helpers_transformers import (
    LLAMA3,
    Case,
    Logits,
    kl_per_token,
    load_gguf,
    random_llama,
    ratio,
    reference_logits,
    save_hf_folder,
)

TOLERANCE = 1e-3
N_DEMO_TOK, WINDOW = 2048, 512
N_TOK = 200  # more than three pages of the cache, and no multiple of one

CASES = [
    Case("multi-head", n_heads=6, n_kv_heads=6),
    Case("grouped-query"),
    Case("multi-query", n_kv_heads=1),
    Case("tied", tied=True),
    Case("odd sizes", dim=100, n_heads=5, n_kv_heads=5, head_dim=20),
    Case("odd sizes tied", dim=72, n_heads=4, n_kv_heads=2, head_dim=18, tied=True),
    Case("wide heads", dim=72, n_heads=3, n_kv_heads=1, head_dim=32),
    Case("narrow heads", dim=100, n_heads=4, n_kv_heads=2, head_dim=10),
    Case("attention bias", other={"attention_bias": True}),
    Case("llama3 rope", rope=LLAMA3 | {"rope_theta": 5e5}, head_dim=32),
    Case("linear rope", rope={"rope_type": "linear", "factor": 4.0}),
    Case("rope theta", rope={"rope_theta": 1e6}),
    Case("bfloat16", stored="bfloat16"),
    Case("float16", stored="float16", tied=True),
    Case("sharded", max_shard_size="100KB"),
    Case("sharded tied bfloat16", max_shard_size="60KB", stored="bfloat16", tied=True),
]


def random_ids(seed: int, n_tok: int = N_TOK, vocab_size: int = 131) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, n_tok)]


def our_logits(folder: Path, ids: list[int]) -> Logits:
    with LLM(folder) as llm:
        return llm.logits(ids)


# ---------------------------------------------------------------------------------------------------- random Llamas


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_random_llama(tmp_path: Path, case: Case) -> None:
    model = random_llama(case, seed=CASES.index(case))
    source = save_hf_folder(model, case, tmp_path / "hf")
    assert (len(list(source.glob("*.safetensors"))) > 1) == case.name.startswith("sharded")
    ids = random_ids(CASES.index(case))
    expected = reference_logits(model, ids)
    found = ratio(our_logits(convert(source, tmp_path / "ours", format="f32"), ids), expected)
    print(f"{case.name}: max|Δ| / max|logit| = {found:.1e}")
    assert found <= TOLERANCE


def test_reference_tells_models_apart() -> None:
    """The comparison has teeth: each architecture above gives logits of its own on the same tokens."""
    ids = random_ids(0)
    plain = reference_logits(random_llama(Case("plain")), ids)
    for change in ({"rope_theta": 1e6}, {"rope_type": "linear", "factor": 4.0}, LLAMA3):
        assert ratio(reference_logits(random_llama(Case("other", rope=change)), ids), plain) > 100 * TOLERANCE


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_folder_opened_directly(tmp_path: Path, stored: str) -> None:
    """Without a conversion of the user's own: LLM converts into its cache."""
    case = Case("direct", stored=stored)
    model = random_llama(case, seed=99)
    ids = random_ids(99)
    with LLM(save_hf_folder(model, case, tmp_path), format="f32") as llm:
        assert ratio(llm.logits(ids), reference_logits(model, ids)) <= TOLERANCE


@pytest.mark.parametrize(("format", "stored"), [("f16", "float16"), ("bf16", "bfloat16")])
def test_half_weights_are_kept(tmp_path: Path, format: str, stored: str) -> None:
    """Stored halves repacked as halves: the kernels compute with their exact values, so the same tolerance holds."""
    case = Case(format, stored=stored)
    model = random_llama(case, seed=7)
    source = save_hf_folder(model, case, tmp_path / "hf")
    ids = random_ids(7)
    ours = our_logits(convert(source, tmp_path / "ours", format=format), ids)
    assert ratio(ours, reference_logits(model, ids)) <= TOLERANCE


# ---------------------------------------------------------------------------------------------------- quantized weights


def set_weights_of(folder: Path, model: LlamaForCausalLM) -> None:
    """Puts the numbers that our folder's codes stand for into transformers' model."""
    state = model.state_dict()
    for name, tensor in read_model_folder(folder).tensors.items():
        values = dequantize(tensor.spec, unpack(tensor.spec, tensor.payload()))
        state[make.hf_name(name)].copy_(torch.from_numpy(values))


@pytest.mark.parametrize("format", ["q8", "q4", "q4a", "q4nl"])
def test_quantized_random_llama(tmp_path: Path, format: str) -> None:
    """Equal weights on both sides: what differs is that we round activations to int8 with a scale per 32 columns.

    Of 32 normal numbers the largest is about 2.3 σ, so the rounding's rms is 2.3 / 127 / √12 = 0.5 % of theirs
    and so is the error that one product adds to its output. About 7 products follow one another in each of the 3
    layers: √22 · 0.5 % = 2.5 % if nothing amplifies. The weights' own rounding to 4 bits is far beyond.
    """
    model = random_llama(Case(format), seed=11)
    source = save_hf_folder(model, Case(format), tmp_path / "hf")
    folder = convert(source, tmp_path / "ours", format=format)
    ids = random_ids(11)
    original = reference_logits(model, ids)
    set_weights_of(folder, model)
    expected = reference_logits(model, ids)
    ours = our_logits(folder, ids)
    error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    of_weights = np.linalg.norm(original - expected) / np.linalg.norm(original)
    print(f"{format}: rms error {error:.2%} of the logits', the weights' rounding alone {of_weights:.2%}")
    assert error <= 0.025
    if format != "q8":
        assert of_weights > 5 * error


# ---------------------------------------------------------------------------------------------------- the demo model


@pytest.fixture(scope="module")
def demo_reference(demo_gguf: Path) -> LlamaForCausalLM:
    """transformers' import of the demo's GGUF; that its weights are ours bit for bit is checked first.

    Ours: the reader's float32, rows of q and k put into Hugging Face's order. Both sides compute with these numbers.
    """
    model = load_gguf(demo_gguf)
    state = model.state_dict()
    source = open_source(demo_gguf)
    assert source.config["tied_embeddings"] and len(source.tensors) == len(list(model.parameters()))
    for name, tensor in source.tensors.items():
        theirs = state[make.hf_name(name)].numpy()
        assert np.array_equal(tensor.read().view(np.uint32), theirs.view(np.uint32)), name
    return model


def english_ids(folder: Path) -> list[int]:
    text = EVALUATION_TEXT.read_text(encoding="utf-8")
    with LLM(folder) as llm:
        ids = llm.tokenizer.encode(text)
    assert len(ids) >= N_DEMO_TOK
    return ids[:N_DEMO_TOK]


def windows(ids: list[int]) -> list[list[int]]:
    """Each read from an empty context, as perplexity tools do it."""
    return [ids[first : first + WINDOW] for first in range(0, len(ids), WINDOW)]


def test_demo_model_without_loss(demo_model: Path, demo_reference: LlamaForCausalLM) -> None:
    """The weights of the file as they are; int8 activations and the float16 cache are all the difference."""
    divergence: list[NDArray[np.float64]] = []
    agree: list[NDArray[np.bool_]] = []
    with LLM(demo_model) as llm:
        assert llm.config["quantization"]["method"] == "repack"
        for window in windows(english_ids(demo_model)):
            expected, ours = reference_logits(demo_reference, window), llm.logits(window)
            divergence.append(kl_per_token(expected, ours))
            agree.append(expected.argmax(-1) == ours.argmax(-1))
    kl, top1 = np.concatenate(divergence), np.concatenate(agree)
    assert len(kl) == N_DEMO_TOK
    figures = f"mean KL {kl.mean():.5f} nats, 99 % below {np.quantile(kl, 0.99):.4f}, top-1 {top1.mean():.2%}"
    print(f"demo, {N_DEMO_TOK} tokens: {figures}")
    assert kl.mean() <= 0.003
    assert top1.mean() >= 0.97


def test_demo_model_as_f32(demo_gguf: Path, demo_reference: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = convert(demo_gguf, tmp_path / "f32", format="f32")
    with LLM(folder) as llm:
        for window in windows(english_ids(folder)):
            found = ratio(llm.logits(window), reference_logits(demo_reference, window))
            print(f"demo as f32, {len(window)} tokens: max|Δ| / max|logit| = {found:.1e}")
            assert found <= TOLERANCE
