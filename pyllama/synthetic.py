"""Random models of known shapes, made in memory straight in the tile layout: for benchmarks and tests without a file.

Codes are random bits, scales are of the size that keeps activations near 1; no float weights are ever made, so a 7B
model takes seconds. The text such a model writes means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .common.formats import CODEBOOKS, FORMATS, TILE_ROWS, TensorSpec, aligned_zeros, from_float32
from .common.model_folder import expected_tensors, is_optional
from .open import OpenedModel, native_weight


class Shape(NamedTuple):
    """Sizes of a Llama-like model."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    tied: bool


SHAPES = {
    "tiny": Shape(256, 2, 4, 2, 64, 512, 1024, True),  # for trying things, not for measuring
    "135m": Shape(576, 30, 9, 3, 64, 1536, 49152, True),
    "1b": Shape(2048, 16, 32, 8, 64, 8192, 128256, True),
    "7b": Shape(4096, 32, 32, 32, 128, 11008, 32000, False),
    "8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, False),
}
_BLOCK_BYTES = 1 << 22  # random bytes are made in blocks that stay in the cache


def synthetic_config(shape: str, max_seq_len: int = 8192) -> dict[str, Any]:
    """The canonical config of a named shape. Raises ValueError for an unknown one."""
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r}: expected one of {' '.join(SHAPES)}")
    sizes = SHAPES[shape]._asdict()
    tied = sizes.pop("tied")
    return {
        "format": "pyllama",
        "version": 1,
        "architecture": "llama",
        **sizes,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_seq_len": max_seq_len,
        "tied_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_ids": [],
    }


def synthetic_specs(config: Mapping[str, Any], format: str, group: int = 32) -> list[TensorSpec]:
    """The tensors of a model of this config: every matrix in `format`, vectors in f32, no biases."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r}: expected one of {' '.join(FORMATS)}")
    info = FORMATS[format]
    numbers: dict[str, Any] = {
        "group": group if info.quantized else 0,
        "offset": "f16" if info.has_offset else "",
        "codebook": CODEBOOKS.get(format, ()),
    }
    return [
        TensorSpec(name, "f32", shape) if len(shape) == 1 else TensorSpec(name, format, shape, **numbers)
        for name, shape in expected_tensors(config).items()
        if not is_optional(name)
    ]


def synthetic_weights(config: Mapping[str, Any], format: str, group: int = 32, seed: int = 0) -> dict[str, Any]:
    """Random `_C.Weight`s by name. Same seed, same weights."""
    rng = np.random.Generator(np.random.SFC64(seed))
    return {
        spec.name: native_weight(spec, random_payload(spec, rng)) for spec in synthetic_specs(config, format, group)
    }


def synthetic_model(
    shape: str, format: str = "q4", group: int = 32, seed: int = 0, max_seq_len: int = 8192
) -> OpenedModel:
    """A random model of a named shape, without a tokenizer."""
    config = synthetic_config(shape, max_seq_len)
    weights = synthetic_weights(config, format, group, seed)
    return OpenedModel(Path(f"synthetic-{shape}-{format}"), config, weights, None, None, {})


def random_payload(spec: TensorSpec, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A 64-byte aligned payload: uint8 [spec.payload_bytes]. Vectors are ones."""
    payload = aligned_zeros(spec.payload_bytes)
    sections = {s.name: payload[s.start : s.start + s.nbytes].view(s.dtype).reshape(s.shape) for s in spec.sections}
    if spec.input_order:
        sections["input_order"][:] = rng.permutation(spec.shape[1])
    codes = sections["codes"]
    if spec.is_vector:
        codes[:] = 1
        return payload
    n_in = spec.shape[1]
    if not spec.info.quantized:
        _fill_dense(codes, spec, rng, 1 / math.sqrt(n_in))
    else:
        _fill_bytes(codes.view(np.uint8).reshape(-1), rng)
        if spec.format == "q8":
            np.maximum(codes, -127, out=codes)
        scale = _code_scale(spec) / math.sqrt(n_in)
        sections["scales"][:] = from_float32(rng.uniform(0.8, 1.2, sections["scales"].shape) * scale, spec.scale)
        if spec.offset:
            sections["offsets"][:] = from_float32(np.full(sections["offsets"].shape, -7.5 * scale), spec.offset)
    used = spec.shape[0] % TILE_ROWS
    if used:
        for name in ("codes", "scales", "offsets"):
            if name in sections:
                row_axis = 2 if name == "codes" and spec.info.quantized else sections[name].ndim - 1
                np.moveaxis(sections[name], row_axis, 0)[used:, -1] = 0
    return payload


def _code_scale(spec: TensorSpec) -> float:
    """1 / standard deviation of the value that a random code stands for."""
    if spec.info.has_codebook:
        return 1 / float(np.std(spec.codebook))
    return 1 / float(np.std(np.arange(2**spec.info.code_bits)))


def _fill_bytes(out: NDArray[np.uint8], rng: np.random.Generator) -> None:
    for start in range(0, len(out), _BLOCK_BYTES):
        part = out[start : start + _BLOCK_BYTES]
        part[:] = rng.integers(0, 2**64, -(-len(part) // 8), dtype=np.uint64).view(np.uint8)[: len(part)]


def _fill_dense(out: NDArray[Any], spec: TensorSpec, rng: np.random.Generator, scale: float) -> None:
    for tile in out:
        tile[:] = from_float32(rng.standard_normal(tile.shape, dtype=np.float32) * np.float32(scale), spec.format)
