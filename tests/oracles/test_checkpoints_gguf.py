"""Every family as GGUF: random checkpoints of transformers, written by the gguf package, logits against transformers.

Names of tensors are those of the package's own table; which rows of q and k are interleaved, and which keys carry the
scales, is what llama.cpp's converter does. As f32 with the tolerance of test_checkpoints_hf.py; K-quants, which are
opened with other bits than the file has, by the divergence from the file's own numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks.gguf_kl import as_float
from benchmarks.random_gguf import add_vocabulary, write_random_gguf
from pyllama import LLM
from pyllama.synthetic import SHAPES
from quantize import convert
from quantize.readers import open_source

from .helpers_transformers import kl_per_token, ratio, reference_logits
from .test_checkpoints_hf import CASES as HF_CASES
from .test_checkpoints_hf import TOLERANCE, Case, random_model

VOCAB = 300  # room for the byte tokens
# GGUF has no word for dynamic scaling, nor for windows in some layers of a Qwen.
CASES = [case for case in HF_CASES if not case.old and not case.name.startswith(("dynamic", "window of some"))]


def pairs_side_by_side(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """From Hugging Face's halves of each head to neighbours."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def write_gguf(path: Path, model: PreTrainedModel) -> Path:
    """The model as a GGUF of float32."""
    config: Any = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    writer = gguf.GGUFWriter(path, architecture)
    add_config(writer, config)
    add_vocabulary(writer, VOCAB)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = weight.float().numpy()
        if architecture in ("llama", "granite") and ".q_proj." in name:
            values = pairs_side_by_side(values, config.num_attention_heads)
        if architecture in ("llama", "granite") and ".k_proj." in name:
            values = pairs_side_by_side(values, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    for name, factors in rope_factors(model).items():
        writer.add_tensor(name, np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "sliding_window", None) and config.model_type in ("mistral", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        ratio_of_contexts = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(ratio_of_contexts) / math.log(original)))


def rope_factors(model: PreTrainedModel) -> dict[str, Any]:
    """Tensors by which frequencies are divided, where the kind of scaling has some."""
    rope = model.config.rope_parameters
    if rope["rope_type"] == "longrope":
        return {"rope_factors_long.weight": rope["long_factor"], "rope_factors_short.weight": rope["short_factor"]}
    if rope["rope_type"] == "llama3":
        scaled = model.model.rotary_emb.inv_freq.double().numpy()
        plain = rope["rope_theta"] ** -(np.arange(len(scaled)) / len(scaled))
        return {"rope_freqs.weight": plain / scaled}
    return {}


@pytest.mark.parametrize("mix", ["q4_k_m"])
def test_opening_k_quants_costs_less_than_a_thousandth(tmp_path: Path, mix: str) -> None:
    """Divergence from the file's own numbers, all in float32; docs/GGUF.md has the demo model's figures."""
    write_random_gguf(tmp_path / "m.gguf", SHAPES["tiny"], mix)
    source = open_source(tmp_path / "m.gguf")
    exact = convert(tmp_path / "m.gguf", tmp_path / "exact", format="f32")
    opened = as_float(convert(tmp_path / "m.gguf", tmp_path / "opened"), tmp_path / "opened as f32")
    assert {tensor.dtype for tensor in source.tensors.values()} == {"Q4_K", "Q6_K", "F32"}
    ids = [int(i) for i in np.random.default_rng(6).integers(0, source.config["vocab_size"], 150)]
    kl = kl_per_token(our_logits(exact, ids), our_logits(opened, ids))
    print(kl.mean())
    assert 0 < kl.mean() < 1e-3


def our_logits(folder: Path, ids: list[int], n_ctx: int | None = None) -> NDArray[np.float32]:
    with LLM(folder, n_ctx=n_ctx) as llm:
        return llm.logits(ids)


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.kind}: {case.name}") for case in CASES])
def test_gguf_family(tmp_path: Path, case: Case) -> None:
    case = replace(case, changes=case.changes | {"vocab_size": VOCAB})
    model = random_model(case, seed=11)
    folder = convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "ours", format="f32")
    ids = [int(i) for i in np.random.default_rng(5).integers(0, VOCAB, 150)]
    # Which of longrope's two lists counts is decided by n_ctx here, and by the text's length there.
    n_ctx = model.config.max_position_embeddings if case.name != "longrope short" else 200
    assert ratio(our_logits(folder, ids, n_ctx), reference_logits(model, ids)) < TOLERANCE
