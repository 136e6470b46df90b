"""GGUF's architectures: names of tensors, which of them are fused or interleaved, and what their keys become.

What the engine makes of it is compared with transformers in tests/oracles/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from quantize.readers import Source, open_source
from tests import make_sources as make
from tests.make_sources import F32, STRING, U32, GgufTensor, Shape

SHAPE = Shape(n_kv_heads=2, biases=False)
INTERLEAVED = ("llama", "mistral3", "granite")
Weights = dict[str, NDArray[np.float32]]


def weights_of(architecture: str, shape: Shape = SHAPE) -> Weights:
    """Random weights of a model of that architecture, by canonical name."""
    out: Weights = {}
    rng = np.random.default_rng(8)
    for name, values in make.random_weights(shape).items():
        out[name] = values
        if architecture == "qwen3" and name.endswith(".wv"):
            for part in ("q_norm", "k_norm"):
                out[name[:-2] + part] = rng.integers(64, 192, shape.head_dim).astype(np.float32) / 128
    return out


def tensors_of(architecture: str, weights: Weights, shape: Shape = SHAPE) -> list[GgufTensor]:
    """The tensors as that architecture's files have them."""
    stored: dict[str, NDArray[np.float32]] = {}
    for name, values in weights.items():
        part = name.rsplit(".", 1)[-1]
        if architecture in INTERLEAVED and part in ("wq", "wk", "bq", "bk"):
            values = make.interleave(values, shape.n_heads if part[1] == "q" else shape.n_kv_heads)
        title = {"q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight"}.get(part)
        stored[name.replace("layers", "blk").replace(part, title) if title else make.gguf_name(name)] = values
    if architecture == "phi3":
        for i in range(shape.n_layers):
            qkv = [stored.pop(f"blk.{i}.attn_{one}.weight") for one in "qkv"]
            stored[f"blk.{i}.attn_qkv.weight"] = np.concatenate(qkv)
            gate, up = stored.pop(f"blk.{i}.ffn_gate.weight"), stored.pop(f"blk.{i}.ffn_up.weight")
            stored[f"blk.{i}.ffn_up.weight"] = np.concatenate([gate, up])
    return [GgufTensor(name, values.shape[::-1], 0, values.tobytes()) for name, values in stored.items()]


def write(
    path: Path, architecture: str, weights: Weights | None = None, extra: Sequence[GgufTensor] = (), **changes: Any
) -> Path:
    shape = Shape(biases=True) if architecture == "qwen2" else SHAPE
    tensors = tensors_of(architecture, weights or weights_of(architecture, shape), shape)
    path.write_bytes(make.gguf_bytes(make.llama_entries(shape, architecture, **changes), [*tensors, *extra]))
    return path


def opened(folder: Path, architecture: str, extra: Sequence[GgufTensor] = (), **changes: Any) -> Source:
    return open_source(write(folder / "m.gguf", architecture, None, extra, **changes))


@pytest.mark.parametrize("architecture", ["llama", "mistral3", "qwen2", "qwen3", "granite", "phi3"])
def test_tensors_by_our_names_in_our_order(tmp_path: Path, architecture: str) -> None:
    source = opened(tmp_path, architecture)
    weights = weights_of(architecture, Shape(biases=architecture == "qwen2"))
    assert source.tensors.keys() == weights.keys()
    for name, values in weights.items():
        assert np.array_equal(source.tensors[name].read(), values), name
    assert source.config == SHAPE.config()


def test_parts_of_fused_tensors_keep_their_grid(tmp_path: Path) -> None:
    tensors = tensors_of("phi3", weights_of("phi3"))
    for tensor in tensors:
        if len(tensor.dims) == 2:
            values = np.frombuffer(tensor.data, "<f4").reshape(tensor.dims[::-1])
            tensor.kind, tensor.data = make.TYPE_IDS["Q4_0"], make.encode_blocks(values, "Q4_0")
    path = tmp_path / "m.gguf"
    path.write_bytes(make.gguf_bytes(make.llama_entries(SHAPE, "phi3"), tensors))
    source = open_source(path)
    parts = [source.tensors[f"layers.1.{part}"] for part in ("wq", "wk", "wv")]
    assert {part.grid.format for part in parts if part.grid} == {"q4"} and all(part.exact for part in parts)
    assert sum(part.n_bytes for part in parts) == (4 + 2 + 2) * 16 * 64 // 32 * 18


def test_granites_scales(tmp_path: Path) -> None:
    """The engine computes y = x / residual_scale; see the fields' own comment."""
    changes = {"llama.embedding_scale": (F32, 12.0), "llama.attention.scale": (F32, 0.015625)}
    changes |= {"llama.residual_scale": (F32, 0.25), "llama.logit_scale": (F32, 8.0)}
    source = opened(tmp_path, "granite", **changes)
    expected = SHAPE.config() | {"embedding_scale": 48.0, "attention_scale": 0.015625, "norm_eps": 1.6e-4}
    assert source.config.keys() == expected.keys() and source.config["norm_eps"] == pytest.approx(1.6e-4)
    assert source.config | {"norm_eps": 1.6e-4} == expected
    assert np.array_equal(source.tensors["norm"].read(), weights_of("granite")["norm"] / 8)


def test_a_scale_of_zero_or_the_usual_one_says_nothing(tmp_path: Path) -> None:
    zero = dict.fromkeys(("llama.embedding_scale", "llama.residual_scale", "llama.logit_scale"), (F32, 0.0))
    assert opened(tmp_path, "granite", **zero).config == SHAPE.config()
    shape = Shape(head_dim=24)  # 1 / sqrt(24) is no number of float32
    path = make.write_gguf(
        tmp_path / "m.gguf", shape, make.random_weights(shape), "F32", llama__attention__scale=(F32, 24**-0.5)
    )
    assert open_source(path).config == shape.config()


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize(("window", "found"), [(0, None), (48, 48), (127, 127), (128, None), (131072, None)])
def test_sliding_windows(tmp_path: Path, architecture: str, window: int, found: int | None) -> None:
    config = opened(tmp_path, architecture, **{"llama.attention.sliding_window": (U32, window)}).config
    assert config == SHAPE.config() | ({} if found is None else {"sliding_window": found})


PAIRS = SHAPE.head_dim // 2
SHORT, LONG = [1.0 + i / 8 for i in range(PAIRS)], [2.0 * i + 1 for i in range(PAIRS)]


def factors(name: str, values: Sequence[float]) -> GgufTensor:
    return GgufTensor(f"rope_{name}.weight", (len(values),), 0, np.array(values, "<f4").tobytes())


LONG_SHORT = [factors("factors_long", LONG), factors("factors_short", SHORT)]


@pytest.mark.parametrize("kind", [None, "longrope"])
def test_phi3s_factors_for_short_and_long_contexts(tmp_path: Path, kind: str | None) -> None:
    changes: dict[str, Any] = {
        "llama.rope.scaling.original_context_length": (U32, 32),
        "llama.rope.scaling.attn_factor": (F32, 1.25),
        "llama.rope.scaling.type": None if kind is None else (STRING, kind),
    }
    assert opened(tmp_path, "phi3", LONG_SHORT, **changes).config["rope_scaling"] == {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
        "short_factor": SHORT,
        "long_factor": LONG,
    }


def test_yarn_in_the_keys_of_newer_writers(tmp_path: Path) -> None:
    changes = {
        "llama.rope.scaling.type": (STRING, "yarn"),
        "llama.rope.scaling.factor": (F32, 4.0),
        "llama.rope.scaling.original_context_length": (U32, 32),
        "llama.rope.scaling.yarn_attn_factor": (F32, 1.5),
        "llama.rope.scaling.yarn_beta_slow": (F32, 2.0),
    }
    assert opened(tmp_path, "qwen2", **changes).config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.5,
        "beta_slow": 2.0,
    }


@pytest.mark.parametrize(("own", "factor"), [(1.0, 2.0), (1.5, 3.0), (None, 2.0 * (0.1 * math.log(4.0) + 1.0))])
def test_yarns_two_factors_are_multiplied(tmp_path: Path, own: float | None, factor: float) -> None:
    changes: dict[str, Any] = {
        "llama.rope.scaling.type": (STRING, "yarn"),
        "llama.rope.scaling.factor": (F32, 4.0),
        "llama.rope.scaling.attn_factor": (F32, 2.0),
        "llama.rope.scaling.yarn_attn_factor": None if own is None else (F32, own),
    }
    assert opened(tmp_path, "llama", **changes).config["rope_scaling"]["attention_factor"] == factor


def test_finetuned_says_nothing_of_a_llama(tmp_path: Path) -> None:
    false = {"llama.rope.scaling.finetuned": (make.BOOL, False)}
    assert opened(tmp_path, "llama", **false).config == SHAPE.config()
    assert opened(tmp_path, "granite", **{"llama.rope.scaling.finetuned": (make.BOOL, True)}).config == SHAPE.config()


@pytest.mark.parametrize("none", [(U32, 0xFFFFFFFF), (make.I32, -1)])
def test_token_ids_that_mean_none(tmp_path: Path, none: tuple[int, int]) -> None:
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom")]
    config = opened(tmp_path, "llama", **dict.fromkeys(names, none)).config
    assert (config["bos_token_id"], config["eos_token_ids"]) == (None, [])


def test_control_tokens_that_end_a_turn(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<|end|>", "<|im_end|>", *(f"w{i}" for i in range(SHAPE.vocab_size - 5))]
    changes: dict[str, Any] = {"tokenizer.ggml.tokens": (make.ARRAY, (STRING, tokens))}
    types = [2, 3, 3, 3, 1, *[1] * (SHAPE.vocab_size - 5)]  # the second one only looks like a control token
    changes["tokenizer.ggml.token_type"] = (make.ARRAY, (make.I32, types))
    assert opened(tmp_path, "phi3", **changes).config["eos_token_ids"] == [2, 3]


@pytest.mark.parametrize(
    ("architecture", "extra", "changes", "message"),
    [
        ("qwen2", [], {"llama.block_count": (U32, 3)}, r"tensor blk\.2\.attn_norm\.weight .* is missing"),
        ("qwen2", [factors("oops", SHORT)], {}, r"'rope_oops\.weight' does not belong to a qwen2 model"),
        (
            "phi3",
            LONG_SHORT[:1],
            {},
            r"found the tensors rope_factors_long\.weight, expected rope",
        ),
        ("phi3", [*LONG_SHORT, factors("freqs", SHORT)], {}, r"found the tensors .* and rope_freqs\.weight, expected"),
        ("phi3", LONG_SHORT, {"llama.rope.scaling.type": (STRING, "yarn")}, r"found 'yarn', factor 1, which together"),
        ("phi3", LONG_SHORT, {"llama.rope.scaling.factor": (F32, 2.0)}, r"factor 2, which together with rope_factors"),
        (
            "phi3",
            [factors("factors_long", LONG[1:]), LONG_SHORT[1]],
            {},
            r"rope_factors_long\.weight is F32 \[7\], expected F32 \[8\]",
        ),
        (
            "phi3",
            [factors("factors_long", [math.nan] * PAIRS), LONG_SHORT[1]],
            {},
            r"rope_factors_long\.weight holds factors that are not finite",
        ),
        (
            "phi3",
            [],
            {"llama.feed_forward_length": (U32, 64)},
            r"ffn_up\.weight \(layers\.0\.w_gate, w_up\): shape \[192",
        ),
        ("phi3", [], {"llama.rope.dimension_count": (U32, 12)}, r"phi3\.rope\.dimension_count: found 12, expected"),
        ("granite", [], {"llama.residual_scale": (F32, math.nan)}, r"granite\.residual_scale: found nan"),
        ("granite", [], {"llama.logit_scale": (F32, -8.0)}, r"granite\.logit_scale: found -8\.0"),
        (
            "granite",
            [],
            {"llama.rope.scaling.finetuned": (make.BOOL, False)},
            r"granite\.rope\.scaling\.finetuned: found False, which means no rotary positions",
        ),
        ("granite", [], {"llama.expert_count": (U32, 4)}, r"granite\.expert_count: found 4, only 0"),
        ("mistral3", [], {"llama.attention.temperature_scale": (F32, 0.1)}, r"temperature_scale: found 0\.1, only 0"),
        ("clip", [], {}, r"'clip' is not supported: it is the image part of another model"),
        ("qwen3", [], {"llama.attention.key_length": (U32, 32)}, r"qwen3\.attention\.value_length: found 16"),
        ("smollm3", [], {}, r"'smollm3' is not supported: some of its layers .*; this version knows llama,"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, architecture: str, extra: list[GgufTensor], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFormatError, match=message):
        opened(tmp_path, architecture, extra, **changes)


@pytest.mark.parametrize("missing", ["q_norm", "k_norm"])
def test_head_norms_are_both_there(tmp_path: Path, missing: str) -> None:
    left = {name: values for name, values in weights_of("qwen3").items() if name != f"layers.1.{missing}"}
    with pytest.raises(ModelFormatError, match=rf"blk\.1\.attn_{missing}\.weight \(layers\.1\.{missing}\) is missing"):
        open_source(write(tmp_path / "m.gguf", "qwen3", left))
