"""What a model takes of memory, from its config and the specs of its tensors alone: on a CUDA device and on the CPU.

The device's numbers are those that csrc/cuda allocates, to the byte (tests compare them): weights in fragment order
(fragments.h, device_weights.h), pages of the cache (cache.h), buffers of steps (step_buffers.h). The CPU's weights and
pages are exact too, its buffers are not: they depend on the instruction set. What fits where is plan.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .common.formats import TILE_ROWS, TensorSpec, round_up

PAGE_TOK = 64  # tokens of a page of the cache
MAX_BATCH_TOK = 512  # of a step, unless somebody asks the engine for more

_PLACE = 256  # what shares a piece of device memory begins at multiples of this
_CHUNK_COLUMNS = 64
_CODE_LOADS = {
    "f32": 8,
    "f16": 4,
    "bf16": 4,
    "q8": 2,
    "q4": 1,
    "q4a": 1,
    "q4nl": 1,
    "q5nl": 2,
    "q6": 2,
}  # of 16 bytes a lane and chunk
_CACHE_GROUP = 32  # dimensions of a scale of the q8 cache
_PANEL_TOK = 8
_LOGIT_ROWS = 64  # of logits on the device
_MAX_HEAD_DIM = 128  # of the device's kernels

Config = Mapping[str, Any]
Tensors = Mapping[str, TensorSpec]


def unsupported_on_device(config: Config, n_ctx: int | None = None) -> str | None:
    """Why no CUDA device can run a model of this config in contexts of `n_ctx` tokens, by default of the model's own
    length; None if one can.
    """
    if config["head_dim"] > _MAX_HEAD_DIM or config["head_dim"] % 2:
        return f"head_dim {config['head_dim']}: the CUDA kernels take even ones up to {_MAX_HEAD_DIM}"
    window = None if config.get("sliding_layers") == [] else config.get("sliding_window")
    if window is not None and window < (longest := n_ctx or config["max_seq_len"]):
        return (
            f"sliding_window {window}, shorter than the context of {longest} tokens: the CUDA kernels do not know it;"
            f" with n_ctx={window} and less it changes nothing"
        )
    return None


# -------------------------------------------------------------------------------- weights on a device


def fragment_bytes(stack: Sequence[TensorSpec]) -> tuple[int, int, int]:
    """Codes, scales and rows' scales of matrices that lie below each other: rows are padded to 16, columns to 64."""
    spec = stack[0]
    tiles = -(-sum(matrix.shape[0] for matrix in stack) // TILE_ROWS)
    chunks = -(-spec.shape[1] // _CHUNK_COLUMNS)
    scale_groups = -(-chunks // 2) if spec.group == 128 else chunks if spec.group else 0
    words = (2 if spec.group == 32 else 1) * (2 if spec.offset else 1)
    return tiles * chunks * _CODE_LOADS[spec.format] * 512, tiles * scale_groups * words * 32, tiles * 64


def stacks_of(matrices: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """Neighbours that one product can take, together."""
    stacks: list[list[TensorSpec]] = []
    for matrix in matrices:
        if not stacks or _kind(stacks[-1][0]) != _kind(matrix) or matrix.input_order or stacks[-1][0].input_order:
            stacks.append([])
        stacks[-1].append(matrix)
    return stacks


def _kind(spec: TensorSpec) -> tuple[Any, ...]:
    offset = spec.offset and ("zero point" if spec.offset == "u8" else "minimum")
    return spec.shape[1], spec.format, spec.group, offset, spec.codebook


def _matrix(stack: Sequence[TensorSpec]) -> int:
    order = _placed(4 * stack[0].shape[1]) if stack[0].input_order else 0
    return sum(map(_placed, fragment_bytes(stack))) + order


def _placed(n_bytes: int) -> int:
    return round_up(n_bytes, _PLACE)


def _vector(n: int) -> int:
    return _placed(4 * n)


def _widths(config: Config) -> tuple[int, int]:
    return config["n_heads"] * config["head_dim"], config["n_kv_heads"] * config["head_dim"]


def _layer_stacks(tensors: Tensors, layer: int) -> list[list[TensorSpec]]:
    def matrices(*names: str) -> list[TensorSpec]:
        return [tensors[f"layers.{layer}.{name}"] for name in names]

    together = [matrices("wq", "wk", "wv"), matrices("w_gate", "w_up"), matrices("wo"), matrices("w_down")]
    return [stack for some in together for stack in stacks_of(some)]


def device_layer_bytes(config: Config, tensors: Tensors, layer: int) -> int:
    """A layer's weights on a device."""
    q, kv = _widths(config)
    vectors = 2 * _vector(config["dim"]) + _vector(q) + 2 * _vector(kv)
    vectors += sum(_vector(config["head_dim"]) for norm in ("q_norm", "k_norm") if f"layers.{layer}.{norm}" in tensors)
    return sum(map(_matrix, _layer_stacks(tensors, layer))) + vectors


def device_embedding_bytes(tensors: Tensors) -> int:
    """The embedding on a device."""
    return _matrix([tensors["tok_embeddings"]])


def device_head_bytes(config: Config, tensors: Tensors) -> int:
    """Norm and output matrix on a device, whether it is the embedding's or not."""
    return _matrix([_output(config, tensors)]) + _vector(config["dim"])


def _output(config: Config, tensors: Tensors) -> TensorSpec:
    return tensors["tok_embeddings" if config["tied_embeddings"] else "output"]


def device_staging_bytes(config: Config, tensors: Tensors, layers: Sequence[int], *, embedding: bool) -> int:
    """What uploading weights takes beside them, while the model is opened: room for the largest of them in the file."""
    stacks = [stack for layer in layers for stack in _layer_stacks(tensors, layer)]
    stacks += [[_output(config, tensors)], *([[tensors["tok_embeddings"]]] if embedding else [])]
    return max(sum(_placed(spec.payload_bytes) for spec in stack) for stack in stacks)


# -------------------------------------------------------------------------------- steps and the cache


def device_buffer_bytes(config: Config, tensors: Tensors, layers: Sequence[int], n_tok: int = MAX_BATCH_TOK) -> int:
    """The buffers of steps on a device that has these layers and the head."""
    dim, hidden, (q, kv) = config["dim"], config["hidden_dim"], _widths(config)
    apart = any(
        len(stacks_of([tensors[f"layers.{layer}.w_gate"], tensors[f"layers.{layer}.w_up"]])) > 1 for layer in layers
    )
    half = config["head_dim"] // 2
    floats = [n_tok * n for n in (dim, q + 2 * kv, q, q, hidden, half, half)]
    floats += [n_tok * 2 * hidden] * apart + [min(n_tok, _LOGIT_ROWS) * config["vocab_size"]]
    chunks = -(-max(dim, q, hidden) // _CHUNK_COLUMNS)
    tokens = round_up(n_tok, _PANEL_TOK)
    activations = [chunks * tokens * _CHUNK_COLUMNS * 2, chunks * tokens * 16, tokens * 4]
    draws = [_draw_room_bytes(config["vocab_size"]), 4 * n_tok]
    return sum(_placed(4 * n) for n in floats) + sum(map(_placed, activations + draws))


def _draw_room_bytes(vocab_size: int) -> int:
    """Of eight rows: weights, sums and maxima by chunks of 1024 tokens, sums and sizes of 256 steps of depth."""
    chunks = -(-vocab_size // 1024)
    return 8 * (8 * (chunks * 1024 + chunks + 2 * 256) + round_up(4 * chunks, 16))


def device_page_bytes(config: Config, kv_dtype: str) -> int:
    """Keys and values of PAGE_TOK tokens in one layer, on a device."""
    wide = round_up(config["head_dim"], _CACHE_GROUP)
    scales = 0 if kv_dtype == "f16" else wide // _CACHE_GROUP * 2
    of_token = 2 * wide if kv_dtype == "f16" else wide + scales
    return int(2 * PAGE_TOK * of_token * config["n_kv_heads"])


def cpu_page_bytes(config: Config, kv_dtype: str) -> int:
    """The same on the CPU."""
    dim: int = config["head_dim"]
    wide, groups = round_up(dim, 16), -(-dim // 32)
    of_token = 2 * dim + 2 * wide if kv_dtype == "f16" else round_up(dim, 4) + wide + 4 * groups
    return int(PAGE_TOK * of_token * config["n_kv_heads"])


def cpu_buffer_bytes(config: Config, n_tok: int = MAX_BATCH_TOK) -> int:
    """The buffers of steps on the CPU, about."""
    dim, hidden, (q, kv) = config["dim"], config["hidden_dim"], _widths(config)
    floats = dim + 2 * q + 2 * kv + 3 * hidden + config["head_dim"]
    rounded = 1.3 * (max(dim, q, hidden) + max(q, hidden) + 2 * dim)  # int8 with scales and sums, and as tiles
    return int(n_tok * (4 * (floats + dim + 2 * max(q, hidden)) + 2 * rounded))
