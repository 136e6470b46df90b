"""Builds small checkpoints for the tests, byte by byte: safetensors, Hugging Face folders, GGUF files of each type.

The writers are the tests' own and check nothing, so that they can write every defect too; valid files are opened by the
stock libraries in tests/oracles. Encoders round to nearest; exactness is a reader's affair, tested on written bytes.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# --- a model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A small architecture. Sizes are odd where a format allows it; widths are multiples of 32 for GGUF's blocks."""

    dim: int = 64
    hidden_dim: int = 96
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 45
    max_seq_len: int = 128
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = False
    biases: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> logical shape."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (self.vocab_size, self.dim)}
        for i in range(self.n_layers):
            layer: dict[str, tuple[int, ...]] = {
                "attn_norm": (self.dim,),
                "wq": (q, self.dim),
                "wk": (kv, self.dim),
                "wv": (kv, self.dim),
                "wo": (self.dim, q),
                "mlp_norm": (self.dim,),
                "w_gate": (self.hidden_dim, self.dim),
                "w_up": (self.hidden_dim, self.dim),
                "w_down": (self.dim, self.hidden_dim),
            }
            if self.biases:
                layer |= {"bq": (q,), "bk": (kv,), "bv": (kv,)}
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["norm"] = (self.dim,)
        if not self.tied:
            shapes["output"] = (self.vocab_size, self.dim)
        return shapes

    def config(self) -> dict[str, Any]:
        """The canonical config that a reader must find."""
        return {
            "format": "pyllama",
            "version": 1,
            "architecture": "llama",
            "dim": self.dim,
            "hidden_dim": self.hidden_dim,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "max_seq_len": self.max_seq_len,
            "tied_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_ids": [2],
        }


def random_weights(shape: Shape, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Canonical name -> float32 values, rows in Hugging Face's order; every value is exact in bf16 and in f16."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-127, 128, sides) / 256 if len(sides) == 2 else rng.integers(64, 192, sides) / 128).astype(
            np.float32
        )
        for name, sides in shape.tensors().items()
    }


# --- safetensors -----------------------------------------------------------------------------------------------------


def encode_dense(values: Array, dtype: str) -> bytes:
    """Little-endian bytes; bf16 by cutting, which is exact for the values of `random_weights`."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(values).astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def safetensors_bytes(header: Mapping[str, Any] | str | bytes, data: bytes = b"", claim: int | None = None) -> bytes:
    """A safetensors file; the header goes in as it is, its length can be a lie (`claim`)."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if claim is None else claim) + text + data


def safetensors_of(tensors: Mapping[str, tuple[str, Sequence[int], bytes]], **metadata: str) -> bytes:
    """A valid file from name -> (dtype, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    return safetensors_bytes(header, b"".join(raw for _, _, raw in tensors.values()))


HF_NAMES = {
    "tok_embeddings": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "output": "lm_head.weight",
    "attn_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "wo": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "w_gate": "mlp.gate_proj.weight",
    "w_up": "mlp.up_proj.weight",
    "w_down": "mlp.down_proj.weight",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of a canonical tensor."""
    if not name.startswith("layers."):
        return HF_NAMES[name]
    _, i, part = name.split(".")
    return f"model.layers.{i}.{HF_NAMES[part]}"


def hf_config(shape: Shape, **changes: Any) -> dict[str, Any]:
    """config.json as transformers writes it; a change to `...` removes the key."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_seq_len,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "attention_bias": shape.biases,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    } | changes
    return {key: value for key, value in config.items() if value is not ...}


def write_hf_folder(
    folder: Path,
    shape: Shape,
    weights: Mapping[str, Array],
    *,
    dtype: str = "F32",
    shards: int = 1,
    extra: Mapping[str, tuple[str, Sequence[int], bytes]] | None = None,
    **config: Any,
) -> Path:
    """A Hugging Face folder; `extra` adds tensors by their names there, `config` changes config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(shape, **config)))
    tensors = {hf_name(name): (dtype, values.shape, encode_dense(values, dtype)) for name, values in weights.items()}
    tensors |= dict(extra or {})
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_of(tensors, format="pt"))
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        (folder / name).write_bytes(safetensors_of(part, format="pt"))
        weight_map |= dict.fromkeys(part, name)
    size = sum(len(raw) for _, _, raw in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def small_tokenizer_json() -> bytes:
    """A tokenizer of four tokens, which knows no text but "a"."""
    model = {"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "merges": []}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor"))
    return json.dumps({"version": "1.0", **empty, "added_tokens": [], "decoder": decoder, "model": model}).encode()


# --- GGUF ------------------------------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
TYPE_IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11}
TYPE_IDS |= {"Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "Q8_K": 15, "IQ4_NL": 20, "IQ4_XS": 23, "F64": 28, "BF16": 30}
# Of each block type: weights, bytes, and where the block's own numbers (f16, but one f32) lie.
BLOCKS = {
    "Q4_0": (32, 18, (0,)),
    "Q4_1": (32, 20, (0, 2)),
    "Q5_0": (32, 22, (0,)),
    "Q5_1": (32, 24, (0, 2)),
    "Q8_0": (32, 34, (0,)),
    "Q2_K": (256, 84, (80, 82)),
    "Q3_K": (256, 110, (108,)),
    "Q4_K": (256, 144, (0, 2)),
    "Q5_K": (256, 176, (0, 2)),
    "Q6_K": (256, 210, (208,)),
    "Q8_K": (256, 292, (0,)),
    "IQ4_NL": (32, 18, (0,)),
    "IQ4_XS": (256, 136, (0,)),
}


def gguf_string(text: str | bytes, claim: int | None = None) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if claim is None else claim) + raw


def gguf_value(kind: int, value: Any, order: str = "<") -> bytes:
    """A metadata value without its type; an array is (element type, list)."""
    if kind == STRING:
        return gguf_string(value)
    if kind == ARRAY:
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(gguf_value(element, v, order) for v in values)
    return struct.pack(order + _CODES[kind], value)


def gguf_entry(key: str | bytes, kind: int, value: Any) -> bytes:
    return gguf_string(key) + struct.pack("<I", kind) + gguf_value(kind, value)


@dataclass
class GgufTensor:
    """A row of the tensor table and its bytes; `offset` None means right behind the one before."""

    name: str | bytes
    dims: tuple[int, ...]  # as in the file: fastest first
    kind: int
    data: bytes
    offset: int | None = None


def gguf_bytes(
    entries: Sequence[bytes],
    tensors: Sequence[GgufTensor],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    n_tensors: int | None = None,
    n_entries: int | None = None,
) -> bytes:
    """A GGUF file; `alignment` is used, not written: an entry general.alignment says it. Counts can be lies."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(entries) if n_entries is None else n_entries)
    table, data = b"", b""
    for tensor in tensors:
        data += bytes(-len(data) % alignment)
        offset = len(data) if tensor.offset is None else tensor.offset
        table += gguf_string(tensor.name) + struct.pack("<I", len(tensor.dims))
        table += struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims) + struct.pack("<IQ", tensor.kind, offset)
        data += tensor.data
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + table
    return head + bytes(-len(head) % alignment) + data


GGUF_NAMES = {
    "tok_embeddings": "token_embd.weight",
    "norm": "output_norm.weight",
    "output": "output.weight",
    "attn_norm": "attn_norm.weight",
    "wq": "attn_q.weight",
    "wk": "attn_k.weight",
    "wv": "attn_v.weight",
    "bq": "attn_q.bias",
    "bk": "attn_k.bias",
    "bv": "attn_v.bias",
    "wo": "attn_output.weight",
    "mlp_norm": "ffn_norm.weight",
    "w_gate": "ffn_gate.weight",
    "w_up": "ffn_up.weight",
    "w_down": "ffn_down.weight",
}


def gguf_name(name: str) -> str:
    """GGUF's name of a canonical tensor."""
    if not name.startswith("layers."):
        return GGUF_NAMES[name]
    _, i, part = name.split(".")
    return f"blk.{i}.{GGUF_NAMES[part]}"


def interleave(values: Array, heads: int) -> Array:
    """Rows from Hugging Face's order (first halves, then second halves) to GGUF's (pairs side by side)."""
    out = np.empty_like(values)
    head_dim = len(values) // heads
    for head in range(heads):
        for j in range(head_dim // 2):
            first = head * head_dim
            out[first + 2 * j] = values[first + j]
            out[first + 2 * j + 1] = values[first + head_dim // 2 + j]
    return out


def llama_entries(shape: Shape, architecture: str = "llama", **changes: tuple[int, Any]) -> list[bytes]:
    """Metadata of a llama with a SentencePiece vocabulary; `changes`: key, dots as __, to (type, value) or None.

    `architecture` stands for "llama" in all keys, also in those of `changes`.
    """
    n = shape.vocab_size
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    tokens = [text for text, _ in special] + [f"▁w{i}" for i in range(len(special), n)]
    kinds = [kind for _, kind in special] + [1] * (n - len(special))
    entries: dict[str, tuple[int, Any] | None] = {
        "general.architecture": (STRING, architecture),
        "general.name": (STRING, "small"),
        "llama.block_count": (U32, shape.n_layers),
        "llama.context_length": (U32, shape.max_seq_len),
        "llama.embedding_length": (U32, shape.dim),
        "llama.feed_forward_length": (U32, shape.hidden_dim),
        "llama.attention.head_count": (U32, shape.n_heads),
        "llama.attention.head_count_kv": (U32, shape.n_kv_heads),
        "llama.attention.key_length": (U32, shape.head_dim),
        "llama.attention.value_length": (U32, shape.head_dim),
        "llama.attention.layer_norm_rms_epsilon": (F32, shape.norm_eps),
        "llama.rope.freq_base": (F32, shape.rope_theta),
        "llama.rope.dimension_count": (U32, shape.head_dim),
        "llama.vocab_size": (U32, n),
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.scores": (ARRAY, (F32, [-float(i) for i in range(n)])),
        "tokenizer.ggml.token_type": (ARRAY, (I32, kinds)),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.add_bos_token": (BOOL, 1),
    }
    entries |= {key.replace("__", "."): value for key, value in changes.items()}
    named = {re.sub(r"^llama\.", f"{architecture}.", key): entry for key, entry in entries.items()}
    return [gguf_entry(key, *entry) for key, entry in named.items() if entry is not None]


def llama_tensors(
    shape: Shape, weights: Mapping[str, Array], kind_of: Callable[[str], str] | str = "Q4_0"
) -> list[GgufTensor]:
    """The tensors of a model; `kind_of` gives a matrix's type by canonical name, vectors are F32."""
    out = []
    for name, values in weights.items():
        part = name.rsplit(".", 1)[-1]
        if part in ("wq", "bq", "wk", "bk"):
            values = interleave(values, shape.n_heads if part[1] == "q" else shape.n_kv_heads)
        kind = "F32" if values.ndim == 1 else kind_of if isinstance(kind_of, str) else kind_of(name)
        out.append(GgufTensor(gguf_name(name), values.shape[::-1], TYPE_IDS[kind], encode_blocks(values, kind)))
    return out


def write_gguf(
    path: Path,
    shape: Shape,
    weights: Mapping[str, Array],
    kind_of: Callable[[str], str] | str = "Q4_0",
    *,
    extra: Sequence[GgufTensor] = (),
    **changes: Any,
) -> Path:
    """A GGUF model; `extra` adds tensors, `changes` metadata as in `llama_entries`."""
    tensors = [*llama_tensors(shape, weights, kind_of), *extra]
    path.write_bytes(gguf_bytes(llama_entries(shape, **changes), tensors))
    return path


def encode_blocks(values: Array, kind: str) -> bytes:
    """Rounds float32 [N, K] to the blocks of a GGUF type; for the types without an encoder here, blocks are made up
    from the values: equal rows give equal bytes, which is all that a reader's test needs."""
    if kind not in BLOCKS:
        return encode_dense(values, kind)
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, BLOCKS[kind][0])
    encoder = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q6_K": _q6_k}.get(kind)
    return encoder(blocks) if encoder else b"".join(_made_up(row.tobytes(), kind) for row in blocks)


def _made_up(seed: bytes, kind: str) -> bytes:
    rng = np.random.default_rng(zlib.crc32(seed))
    raw = bytearray(rng.bytes(BLOCKS[kind][1]))
    for at in BLOCKS[kind][2]:
        struct.pack_into("<f" if kind == "Q8_K" else "<e", raw, at, rng.uniform(-1, 1) / 64)
    return bytes(raw)


def _codes(x: Array, scale: Array, low: int, high: int) -> Array:
    with np.errstate(all="ignore"):
        return np.clip(np.nan_to_num(np.rint(x / scale)), low, high)


def _half(values: Array) -> Array:
    return values.astype("<f2")


def _nibble_bytes(codes: Array) -> Array:
    c = codes.astype(np.uint8)
    return c[:, :16] | c[:, 16:] << 4


def _joined(*columns: Array) -> bytes:
    return np.concatenate([np.ascontiguousarray(c).view(np.uint8) for c in columns], axis=1).tobytes()


def _q4_0(x: Array) -> bytes:
    peak = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    d = _half(peak / -8)
    return _joined(d, _nibble_bytes(_codes(x, d.astype(np.float32), -8, 7) + 8))


def _q4_1(x: Array) -> bytes:
    low = x.min(1, keepdims=True)
    d, m = _half((x.max(1, keepdims=True) - low) / 15), _half(low)
    return _joined(d, m, _nibble_bytes(_codes(x - m.astype(np.float32), d.astype(np.float32), 0, 15)))


def _q8_0(x: Array) -> bytes:
    d = _half(np.abs(x).max(1, keepdims=True) / 127)
    return _joined(d, _codes(x, d.astype(np.float32), -127, 127).astype(np.int8))


def _q6_k(x: Array) -> bytes:
    """Plain: every run of 16 weights takes the largest scale that fits it, of the block's 127 steps."""
    runs = x.reshape(-1, 16, 16)
    peaks = np.abs(runs).max(2)
    d = _half(peaks.max(1, keepdims=True) / 31 / 127)
    step = d.astype(np.float32)
    scales = _codes(peaks / 31, step, 1, 127)
    codes = (_codes(runs, (step * scales)[:, :, None], -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.stack(
        [codes[:, :, 0] & 15 | (codes[:, :, 2] & 15) << 4, codes[:, :, 1] & 15 | (codes[:, :, 3] & 15) << 4], 2
    )
    high = sum((codes[:, :, run] >> 4) << (2 * run) for run in range(4))
    n = len(x)
    return _joined(low.reshape(n, 128), np.asarray(high, np.uint8).reshape(n, 64), scales.astype(np.int8), d)
