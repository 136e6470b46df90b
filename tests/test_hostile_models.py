"""Sound containers that hold no model that we run, folders and paths that are something else: each refused by name.

Damaged containers: test_hostile_files.py; random damage: test_hostile_random.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import BoundedFile, parse_json, read_json
from quantize.readers import open_source
from tests import make_sources as make
from tests.helpers_hostile import SMALL, WEIGHTS, refused
from tests.make_sources import ARRAY, BOOL, F32, STRING, U32, U64, GgufTensor, gguf_bytes

# --- GGUF models -----------------------------------------------------------------------------------------------------

BAD_GGUF_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"general__architecture": None}, r"general.architecture: found None"),
    "unknown architecture": ({"general__architecture": (STRING, "mamba")}, r"'mamba' is not supported; .*llama"),
    "architecture that is a number": ({"general__architecture": (U32, 3)}, r"general.architecture: found 3"),
    "no embedding length": ({"llama__embedding_length": None}, r"llama.embedding_length: missing"),
    "embedding length 0": ({"llama__embedding_length": (U32, 0)}, r"llama.embedding_length: found 0, expected"),
    "embedding length 2^62": ({"llama__embedding_length": (U64, 2**62)}, r"llama.embedding_length: found 46116860"),
    "layers as text": ({"llama__block_count": (STRING, "1")}, r"llama.block_count: found '1'"),
    "too few layers": ({"llama__block_count": (U32, 2)}, r"tensor blk.1.attn_norm.weight .* is missing"),
    "a million layers": ({"llama__block_count": (U32, 10**6)}, r"llama.block_count: found 1000000"),
    "heads that do not divide": ({"llama__attention__head_count_kv": (U32, 3)}, r"head_count_kv: found 3, .*divisor"),
    "more kv heads than heads": ({"llama__attention__head_count_kv": (U32, 4)}, r"head_count_kv: found 4"),
    "odd head": ({"llama__attention__key_length": (U32, 15)}, r"key_length: found 15, expected an even"),
    "heads per layer differ": (
        {"llama__attention__head_count_kv": (ARRAY, (U32, [1, 2]))},
        r"head_count_kv: differs between layers",
    ),
    "epsilon NaN": ({"llama__attention__layer_norm_rms_epsilon": (F32, float("nan"))}, r"epsilon: found nan"),
    "epsilon 0": ({"llama__attention__layer_norm_rms_epsilon": (F32, 0.0)}, r"epsilon: found 0.0"),
    "rope base infinite": ({"llama__rope__freq_base": (F32, float("inf"))}, r"freq_base: found inf"),
    "part of the head rotated": ({"llama__rope__dimension_count": (U32, 8)}, r"dimension_count: found 8, expected"),
    "other value length": ({"llama__attention__value_length": (U32, 32)}, r"value_length: found 32"),
    "experts": ({"llama__expert_count": (U32, 8)}, r"llama.expert_count: found 8, only 0"),
    "sliding window of text": ({"llama__attention__sliding_window": (STRING, "64")}, r"sliding_window: found '64'"),
    "sliding window NaN": ({"llama__attention__sliding_window": (F32, float("nan"))}, r"sliding_window: found nan"),
    "windows by a pattern": (
        {"llama__attention__sliding_window_pattern": (U32, 4)},
        r"sliding_window_pattern: found 4, only 0",
    ),
    "positions of images": (
        {"llama__rope__dimension_sections": (ARRAY, (U32, [8, 8]))},
        r"rope.dimension_sections: found a list of 2, only 0",
    ),
    "not causal": ({"llama__attention__causal": (BOOL, 0)}, r"attention.causal: found False, only true"),
    "capped logits": ({"llama__final_logit_softcapping": (F32, 30.0)}, r"softcapping: found 30.0, only 0"),
    "unknown rope scaling": ({"llama__rope__scaling__type": (STRING, "su")}, r"scaling.type: found 'su'"),
    "longrope without its tensors": (
        {"llama__rope__scaling__type": (STRING, "longrope")},
        r"scaling.type: longrope needs the tensors rope_factors_long.weight and rope_factors_short.weight",
    ),
    "rope factor NaN": (
        {"llama__rope__scaling__type": (STRING, "linear"), "llama__rope__scaling__factor": (F32, float("nan"))},
        r"scaling.factor: found nan",
    ),
    "rope factor for attention without yarn": (
        {"llama__rope__scaling__attn_factor": (F32, 2.0)},
        r"attn_factor: found without yarn",
    ),
    "yarn mixed by half": (
        {
            "llama__rope__scaling__type": (STRING, "yarn"),
            "llama__rope__scaling__factor": (F32, 4.0),
            "llama__rope__scaling__yarn_ext_factor": (F32, 0.5),
        },
        r"yarn_ext_factor: found 0.5, only 1",
    ),
    "clamped keys": ({"llama__attention__clamp_kqv": (F32, 8.0)}, r"clamp_kqv: found 8.0, only 0"),
    "attention scale": ({"llama__attention__scale": (F32, -0.5)}, r"attention.scale: found -0.5, expected"),
    "bos beyond the vocabulary": ({"tokenizer__ggml__bos_token_id": (U32, 9)}, r"bos_token_id: found 9, expected .* 8"),
    "eos of 2^32 - 2": ({"tokenizer__ggml__eos_token_id": (U32, 2**32 - 2)}, r"eos_token_id: found 4294967294"),
    "vocabulary of another size": (
        {"tokenizer__ggml__tokens": (ARRAY, (STRING, ["a", "b", "c"]))},
        r"token_embd.weight \(tok_embeddings\): shape \[9, 32\], expected \[3, 32\]",
    ),
    "vocabulary that is a number": ({"tokenizer__ggml__tokens": (U32, 5)}, r"tokenizer.ggml.tokens: expected a list"),
}


@pytest.mark.parametrize("defect", BAD_GGUF_MODELS)
def test_bad_gguf_model(tmp_path: Path, defect: str) -> None:
    changes, pattern = BAD_GGUF_MODELS[defect]
    refused(open_source, make.write_gguf(tmp_path / "bad.gguf", SMALL, WEIGHTS, **changes), pattern)


def test_vocabulary_of_an_unknown_kind(tmp_path: Path) -> None:
    path = make.write_gguf(tmp_path / "bad.gguf", SMALL, WEIGHTS, tokenizer__ggml__model=(STRING, "sorcery"))
    source = open_source(path)
    refused(lambda _: source.tokenizer_files(), path, r"tokenizer.ggml.model .*'sorcery'")


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        (GgufTensor("blk.0.secret.weight", (4,), 0, bytes(16)), r"'blk.0.secret.weight' does not belong to a llama"),
        (
            GgufTensor("rope_factors_long.weight", (8,), 0, bytes(32)),
            r"found the tensors rope_factors_long.w",
        ),
        (GgufTensor("blk.0.ffn_up.bias", (32,), 0, b"\1" * 128), r"blk.0.ffn_up.bias is not zero"),
        (
            GgufTensor("blk.0.ffn_up.bias", (8, 2, 2), 0, bytes(128)),
            r"ffn_up.bias. has shape \[2, 2, 8\], expected that of a matrix",
        ),
        (GgufTensor("rope_freqs.weight", (7,), 0, bytes(28)), r"rope_freqs.weight is F32 \[7\], expected F32 \[8\]"),
        (GgufTensor("rope_freqs.weight", (8,), 0, bytes(32)), r"rope_freqs.weight holds factors that are not finite"),
        (GgufTensor("blk.0.attn_q.bias", (32,), 0, bytes(128)), r"blk.0.attn_k.bias \(layers.0.bk\) is missing"),
    ],
)
def test_gguf_tensors_that_do_not_belong(tmp_path: Path, extra: GgufTensor, pattern: str) -> None:
    refused(open_source, make.write_gguf(tmp_path / "bad.gguf", SMALL, WEIGHTS, extra=[extra]), pattern)


@pytest.mark.parametrize("missing", ["norm", "tok_embeddings", "layers.0.wk", "layers.0.mlp_norm"])
def test_gguf_missing_tensor(tmp_path: Path, missing: str) -> None:
    left = {name: values for name, values in WEIGHTS.items() if name != missing}
    pattern = rf"{re.escape(make.gguf_name(missing))} \({missing}\) is missing"
    refused(open_source, make.write_gguf(tmp_path / "bad.gguf", SMALL, left), pattern)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_gguf_values_that_are_not_finite(tmp_path: Path, kind: str, bad: float) -> None:
    tensors = make.llama_tensors(SMALL, WEIGHTS, kind)
    at = next(i for i, t in enumerate(tensors) if t.name == "blk.0.attn_k.weight")
    code = {"F32": "<f", "BF16": None}.get(kind, "<e")
    number = struct.pack(code, bad) if code else struct.pack("<f", bad)[2:]
    tensors[at].data = number + tensors[at].data[len(number) :]
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes(make.llama_entries(SMALL), tensors))
    found = open_source(path).tensors["layers.0.wk"]
    refused(lambda _: found.read(), path, r"'blk.0.attn_k.weight' \(layers.0.wk\): \d+ of 512 values are not finite")
    refused(lambda _: found.read_packed(), path, r"\(layers.0.wk\): 1 of \d+ (values|scales) are not finite")


def test_yarn_together_with_factors(tmp_path: Path) -> None:
    factors = GgufTensor("rope_freqs.weight", (8,), 0, np.full(8, 2, "<f4").tobytes())
    changes: dict[str, Any] = {
        "llama__rope__scaling__type": (STRING, "yarn"),
        "llama__rope__scaling__factor": (F32, 4.0),
    }
    path = make.write_gguf(tmp_path / "bad.gguf", SMALL, WEIGHTS, extra=[factors], **changes)
    refused(open_source, path, r"yarn together with the tensor rope_freqs.weight")


def test_q4_1_minimum_that_is_not_finite(tmp_path: Path) -> None:
    tensors = make.llama_tensors(SMALL, WEIGHTS, "Q4_1")
    at = next(i for i, t in enumerate(tensors) if t.name == "blk.0.ffn_up.weight")
    tensors[at].data = tensors[at].data[:2] + struct.pack("<e", float("inf")) + tensors[at].data[4:]
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes(make.llama_entries(SMALL), tensors))
    found = open_source(path).tensors["layers.0.w_up"]
    refused(lambda _: found.read(), path, r"\(layers.0.w_up\): 32 of 1024 values are not finite")
    refused(lambda _: found.read_packed(), path, r"\(layers.0.w_up\): 1 of 32 offsets are not finite")


# --- Hugging Face folders --------------------------------------------------------------------------------------------

BAD_HF_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"architectures": ["GPT2LMHeadModel"]}, r"'GPT2LMHeadModel' is not supported; .*Llama"),
    "no architecture at all": ({"architectures": ..., "model_type": ...}, r"architecture None is not supported"),
    "two architectures": ({"architectures": ["LlamaForCausalLM", "X"]}, r"architectures: found"),
    "architectures as text": ({"architectures": "LlamaForCausalLM"}, r"architectures: found 'LlamaForCausalLM'"),
    "no hidden_size": ({"hidden_size": ...}, r"config.json: hidden_size: missing"),
    "hidden_size as text": ({"hidden_size": "32"}, r"hidden_size: found '32'"),
    "hidden_size fractional": ({"hidden_size": 32.0}, r"hidden_size: found 32.0"),
    "hidden_size true": ({"hidden_size": True}, r"hidden_size: found True"),
    "hidden_size negative": ({"hidden_size": -32}, r"hidden_size: found -32"),
    "hidden_size 2^70": ({"hidden_size": 2**70}, r"hidden_size: found 11805916"),
    "heads do not divide": ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": ...}, r"3 heads do not"),
    "kv heads do not divide": ({"num_key_value_heads": 3}, r"num_key_value_heads: found 3"),
    "odd head_dim": ({"head_dim": 7}, r"head_dim: found 7, expected an even"),
    "vocab_size 0": ({"vocab_size": 0}, r"vocab_size: found 0"),
    "epsilon negative": ({"rms_norm_eps": -1e-5}, r"rms_norm_eps: found -1e-05"),
    "theta as list": ({"rope_theta": [1]}, r"rope_theta: found \[1\]"),
    "theta of 10^400": ({"rope_theta": 10**400}, r"rope_theta: found 1000"),
    "gelu": ({"hidden_act": "gelu"}, r"hidden_act: found 'gelu', only 'silu'"),
    "mlp_bias": ({"mlp_bias": True}, r"mlp_bias: found True"),
    "flag as text": ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings: found 'yes'"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, r"bits: found None"),
    "window": ({"sliding_window": 64}, r"sliding_window: found 64, shorter than max_position_embeddings 128"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: found 0.5"),
    "rope_scaling as text": ({"rope_scaling": "linear"}, r"rope_scaling: found 'linear', expected an object"),
    "unknown rope_type": ({"rope_scaling": {"rope_type": "magic", "factor": 2}}, r"rope_type 'magic' is not supported"),
    "no rope factor": ({"rope_scaling": {"type": "linear"}}, r"rope_scaling: factor: missing"),
    "rope factor 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling: factor: found 0"),
    "rope object inside": (
        {"rope_scaling": {"type": "linear", "factor": 2, "x": {}}},
        r"rope_scaling: x: is not known with rope_type linear; found \{\}",
    ),
    "llama3 bounds swapped": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 1,
                "original_max_position_embeddings": 64,
            }
        },
        r"high_freq_factor: found 1, expected more",
    ),
    "rope told twice": (
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 4}},
        r"rope_scaling: .* and rope_parameters .* disagree",
    ),
    "rope_parameters that differ": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        r"rope_parameters: differs between full_attention and sliding_attention",
    ),
    "rope_parameters nested twice": (
        {"rope_parameters": {"full_attention": {"full_attention": {}}}},
        r"rope_parameters: differs between full_attention",
    ),
    "rope_parameters of other layers": (
        {"rope_parameters": {"main": {"rope_theta": 1e6}}},
        r"rope_parameters: found \['main'\], expected either numbers or objects for full_attention and",
    ),
    "rope_parameters nested beside numbers": (
        {"rope_parameters": {"rope_type": "default", "full_attention": {"rope_theta": 1e6}}},
        r"rope_parameters: found \['rope_type', 'full_attention'\], expected either",
    ),
    "rope_parameters without a type": (
        {"rope_parameters": {"rope_theta": 5e5, "factor": 8, "low_freq_factor": 1}},
        r"rope_parameters: found 'factor' without a rope_type",
    ),
    "rope_scaling without a type": (
        {"rope_scaling": {"factor": 8}},
        r"rope_scaling: found 'factor' without a rope_type",
    ),
    "rope_parameters as list": ({"rope_parameters": []}, r"rope_parameters: found \[\]"),
    "bos beyond the vocabulary": ({"bos_token_id": 9}, r"bos_token_id: found 9, expected an integer of 0 to 8"),
    "eos list with text": ({"eos_token_id": [2, "3"]}, r"eos_token_id: found \[2, '3'\]"),
    "eos negative": ({"eos_token_id": -2}, r"eos_token_id: found -2"),
    "more layers than tensors": ({"num_hidden_layers": 2}, r"model.layers.1.input_layernorm.weight .* is missing"),
    "wrong width": (
        {"intermediate_size": 48},
        r"gate_proj.weight \(layers.0.w_gate\): shape \[32, 32\], expected \[48, 32\]; check intermediate_size",
    ),
    "wrong heads": (
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        r"q_proj.weight \(layers.0.wq\): shape \[32, 32\], expected \[64, 32\]; check num_attention_heads, head_dim",
    ),
    "biases promised": ({"attention_bias": True}, r"q_proj.bias \(layers.0.bq\) is missing"),
    "tied, but a head of its own": ({"tie_word_embeddings": True}, r"lm_head.weight differs from"),
}


@pytest.mark.parametrize("defect", BAD_HF_CONFIGS)
def test_bad_hf_config(tmp_path: Path, defect: str) -> None:
    changes, pattern = BAD_HF_CONFIGS[defect]
    refused(open_source, make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS, **changes), pattern)


def test_a_sliding_window_where_the_family_has_none(tmp_path: Path) -> None:
    folder = make.write_hf_folder(
        tmp_path / "bad-model", SMALL, WEIGHTS, max_position_embeddings=32768, sliding_window=4096
    )
    refused(open_source, folder, r"sliding_window: found 4096, shorter than max_position_embeddings 32768")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (b"[]", r"holds a JSON list, expected an object"),
        (b"", r"not valid JSON"),
        (b'{"a": 1, "a": 2}', r"key 'a' appears twice"),
        (b'{"a": NaN}', r"holds NaN"),
        (b'{"a": "\xff"}', r"not valid UTF-8"),
        (b"[" * 50_000, r"nests deeper than 32"),
        (b'{"a":' * 50_000, r"nests deeper than 32"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"not valid JSON"),
        (b" " * ((1 << 20) + 1), r"of 1048577 bytes, at most 1048576 are allowed"),
    ],
)
def test_bad_json(tmp_path: Path, text: bytes, pattern: str) -> None:
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS)
    (folder / "config.json").write_bytes(text)
    refused(open_source, folder, rf"config\.json.*{pattern}")
    refused(read_json, folder / "config.json", pattern)


def test_json_brackets_in_strings_do_not_nest() -> None:
    assert parse_json(b'{"a": "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\\"[[["}', "x") == {"a": "[" * 36 + '"[[['}


def test_missing_and_extra_hf_tensors(tmp_path: Path) -> None:
    left = {name: values for name, values in WEIGHTS.items() if name != "layers.0.wo"}
    missing = make.write_hf_folder(tmp_path / "missing-model", SMALL, left)
    refused(open_source, missing, r"model.layers.0.self_attn.o_proj.weight \(layers.0.wo\) is missing")
    for name, pattern in (
        ("model.layers.0.mlp.extra.weight", r"'model.layers.0.mlp.extra.weight' does not belong to a LlamaForCausalLM"),
        ("model.layers.0.self_attn.q_proj.bias", r"q_proj.bias is not zero"),
        ("model.layers.0.self_attn.o_proj.bias", r"o_proj.bias is not zero"),
        ("x\x1b[2J", r"'x\\x1b\[2J' does not belong"),
    ):
        extra = {name: ("F32", [1], b"\0\0\x80\x3f")}
        refused(open_source, make.write_hf_folder(tmp_path / "extra-model", SMALL, WEIGHTS, extra=extra), pattern)


def test_hf_types_that_no_weight_may_have(tmp_path: Path) -> None:
    left = {name: values for name, values in WEIGHTS.items() if name != "norm"}
    extra = {"model.norm.weight": ("F8_E4M3", [32], bytes(32))}
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, left, extra=extra)
    refused(open_source, folder, r"'model.norm.weight' \(norm\) has type F8_E4M3, which is not supported")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_hf_values_that_are_not_finite(tmp_path: Path, dtype: str) -> None:
    bad = WEIGHTS | {"layers.0.wq": WEIGHTS["layers.0.wq"].copy(), "norm": WEIGHTS["norm"].copy()}
    bad["layers.0.wq"][3, 4:6] = (np.nan, np.inf)
    bad["norm"][0] = -np.inf
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, bad, dtype=dtype)
    tensors = open_source(folder).tensors
    refused(lambda _: tensors["layers.0.wq"].read(), folder, r"\(layers.0.wq\): 2 of 1024 values are not finite")
    refused(lambda _: tensors["norm"].read(), folder, r"'model.norm.weight' \(norm\): 1 of 32 values")
    assert np.isfinite(tensors["layers.0.wq"].read(slice(4, 32))).all()
    if dtype != "F64":
        refused(lambda _: tensors["layers.0.wq"].read_packed(), folder, r"\(layers.0.wq\): 2 of 1024 values")


def test_f64_beyond_float32_is_refused(tmp_path: Path) -> None:
    huge: dict[str, Any] = dict(WEIGHTS) | {"norm": np.full(32, 1e300)}
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, huge, dtype="F64")
    refused(lambda _: open_source(folder).tensors["norm"].read(), folder, r"\(norm\): 32 of 32 values are not finite")


def test_bad_shards(tmp_path: Path) -> None:
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS, shards=2)
    index_path, first = folder / "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    index = json.loads(index_path.read_text())
    some = next(name for name, file in index["weight_map"].items() if file == first)

    def with_map(**changes: Any) -> None:
        index_path.write_text(json.dumps({"weight_map": index["weight_map"] | changes}))

    with_map(ghost=first)
    refused(open_source, folder, rf"{first}: tensor 'ghost' is not in it")
    with_map(**{some: "model-00002-of-00002.safetensors"})
    refused(open_source, folder, rf"holds tensor '{re.escape(some)}', but .* says 'model-00002")
    index_path.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != some}}))
    refused(open_source, folder, rf"holds tensor '{re.escape(some)}', but .* does not list it")
    with_map(**{some: "\ud800.safetensors"})
    refused(open_source, folder, r"index.json: holds half of a surrogate pair")
    # for the terminal, on two lines, too long for a file system
    strange = ["\x1b[31m.safetensors", "a\n.safetensors", "\u00e4" * 122 + ".safetensors"]
    for outside in (
        "../x.safetensors",
        "/etc/x.safetensors",
        "a\\b.safetensors",
        "x.bin",
        7,
        None,
        "a\0.safetensors",
        *strange,
    ):
        with_map(**{some: outside})
        refused(open_source, folder, r"expected a .safetensors file in this folder")
    with_map(**{some: "\u00e4" * 121 + "a.safetensors"})  # 255 bytes
    refused(open_source, folder, r"a\.safetensors: is missing")
    for nothing in ({}, {"weight_map": {}}, {"weight_map": []}):
        index_path.write_text(json.dumps(nothing))
        refused(open_source, folder, r"weight_map: expected an object")
    index_path.write_text(json.dumps(index))
    (folder / first).unlink()
    refused(open_source, folder, rf"{first}: is missing; model.safetensors.index.json lists it for \d+ tensors")


def test_too_many_shards(tmp_path: Path) -> None:
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS, shards=2)
    index = {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(4097)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(open_source, folder, r"index.json: lists 4097 files, at most 4096")


@pytest.mark.parametrize("vectored", [True, False])
def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectored: bool) -> None:
    if not vectored:  # as on systems without preadv
        monkeypatch.delattr(os, "preadv")
    path = tmp_path / "shrinking"
    path.write_bytes(bytes(range(100)))
    file = BoundedFile(path, use_mmap=False)
    assert file.map(90, 10).tobytes() == bytes(range(90, 100))
    os.truncate(path, 60)
    refused(lambda _: file.map(50, 50), path, r"ends at offset 60, expected 100; the file shrank")


def test_tokenizer_file_beyond_its_cap(tmp_path: Path) -> None:
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS)
    with open(folder / "chat_template.jinja", "wb") as file:
        file.truncate(1 << 32)
    source = open_source(folder)
    refused(lambda _: source.tokenizer_files(), folder, r"chat_template.jinja of 4294967296 bytes, at most")


# --- what a path can be ----------------------------------------------------------------------------------------------


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    def made(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    refused(open_source, tmp_path / "nowhere", r"nowhere: no such file or folder")
    refused(open_source, made("empty.gguf", b""), r"is empty")
    refused(
        open_source, made("a.txt", b"hello"), r"starts with b'hell'; expected a .gguf, .safetensors, .pth or .bin file"
    )
    refused(
        open_source, made("model.pth", b"PK\3\4"), r"PyTorch checkpoint without a description; expected config.json"
    )
    refused(open_source, made("weights", b"PK\3\4"), r"PyTorch checkpoint")
    refused(open_source, made("pytorch_model.bin", b"\x80\x02"), r"PyTorch checkpoint")
    refused(open_source, made("m.gguf", b"GGML"), r"does not start with GGUF")
    refused(open_source, made("x.safetensors", b"{}"), r"config.json: is missing; .* needs a config.json")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    refused(open_source, tmp_path / "dangling", r"cannot be opened: No such file")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    refused(open_source, tmp_path / "circle", r"cannot be opened|cannot be listed")
    with pytest.raises(ModelFormatError, match="no such file or folder"):
        open_source("a\0b")


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    def made(name: str, **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file.replace("__", ".")).write_text(content)
        return folder

    refused(open_source, made("empty-one"), r"is an empty folder")
    refused(open_source, made("texts", notes__txt="x"), r"holds no config.json")
    refused(open_source, made("only-weights", model__safetensors=""), r"holds no config.json")
    refused(open_source, made("only-config", config__json=json.dumps(make.hf_config(SMALL))), r"found none")
    refused(
        open_source, made("two", a__gguf="x", b__gguf="x"), r"holds 2 .gguf files; name one of them: a.gguf, b.gguf"
    )
    ours = made("ours", config__json='{"format": "pyllama", "version": 1}', model__safetensors="")
    refused(open_source, ours, r"is already a pyllama model")
    several = make.write_hf_folder(tmp_path / "several", SMALL, WEIGHTS)
    (several / "model.safetensors").rename(several / "a.safetensors")
    (several / "b.safetensors").write_bytes(b"")
    refused(open_source, several, r"found a.safetensors, b.safetensors")


def test_things_that_are_no_files(tmp_path: Path) -> None:
    """None of these may block, and none may be read."""
    os.mkfifo(tmp_path / "fifo.gguf")
    refused(open_source, tmp_path / "fifo.gguf", r"a FIFO, expected a regular file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "folder")
    refused(open_source, tmp_path / "link.gguf", r"is an empty folder")
    refused(BoundedFile, tmp_path / "link.gguf", r"a folder, expected a regular file")
    with pytest.raises(ModelFormatError, match=r"/dev/zero: a character device"):
        open_source("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        place = os.getcwd()
        os.chdir(tmp_path)  # the address of a socket may only have some 100 characters
        try:
            server.bind("s.gguf")
        finally:
            os.chdir(place)
        refused(open_source, tmp_path / "s.gguf", r"cannot be opened|a socket")
    folder = make.write_hf_folder(tmp_path / "bad-model", SMALL, WEIGHTS)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(open_source, folder, r"config.json: a FIFO, expected a regular file")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes([], [], version=9))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with contextlib.suppress(ModelFormatError):
            open_source(path)
        with contextlib.suppress(ModelFormatError):
            open_source(tmp_path)
    assert len(os.listdir("/proc/self/fd")) <= before
