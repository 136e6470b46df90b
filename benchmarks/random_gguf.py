"""Writes random LLaMA-shaped models as GGUF, every matrix Q4_0 (the head included), tensor by tensor.

Random codes under plausible scales: activations stay finite and no block is special, which is all that a measurement of
speed needs. The vocabulary is made up. Nothing here is meant to say anything sensible.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # weights of one Q4_0 block: an f16 scale and 16 bytes of codes
BLOCK_BYTES = 18


class Shape(NamedTuple):
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    tied: bool


SHAPES = {
    "tiny": Shape(256, 2, 4, 2, 64, 512, 1024, True),  # to try the harness, not to measure
    "1b": Shape(2048, 16, 32, 8, 64, 8192, 128256, True),
    "7b": Shape(4096, 32, 32, 32, 128, 11008, 32000, False),
    "8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, False),
}


def matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """GGUF name -> (rows, columns) of every matrix, in file order."""
    q_dim, kv_dim = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    found = {"token_embd.weight": (shape.vocab_size, shape.dim)}
    for i in range(shape.n_layers):
        found |= {
            f"blk.{i}.attn_q.weight": (q_dim, shape.dim),
            f"blk.{i}.attn_k.weight": (kv_dim, shape.dim),
            f"blk.{i}.attn_v.weight": (kv_dim, shape.dim),
            f"blk.{i}.attn_output.weight": (shape.dim, q_dim),
            f"blk.{i}.ffn_gate.weight": (shape.hidden_dim, shape.dim),
            f"blk.{i}.ffn_up.weight": (shape.hidden_dim, shape.dim),
            f"blk.{i}.ffn_down.weight": (shape.dim, shape.hidden_dim),
        }
    return found if shape.tied else found | {"output.weight": (shape.vocab_size, shape.dim)}


def norms(shape: Shape) -> list[str]:
    layers = [f"blk.{i}.{kind}_norm.weight" for i in range(shape.n_layers) for kind in ("attn", "ffn")]
    return [*layers, "output_norm.weight"]


def random_q4_0(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint8]:
    """uint8 [rows, columns / 32 * 18]: uniform codes; scales for a deviation of about 1 / sqrt(columns)."""
    blocks = np.frombuffer(rng.bytes(rows * columns // BLOCK * BLOCK_BYTES), np.uint8).reshape(-1, BLOCK_BYTES).copy()
    deviation_of_codes = 4.6  # of the integers -8 ... 7, all equally likely
    scale = rng.uniform(0.5, 1.5, len(blocks)) / (deviation_of_codes * np.sqrt(columns))
    blocks[:, :2] = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A SentencePiece vocabulary of the right size: three specials, 256 bytes, and made-up words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    words = size - len(tokens)
    tokens += [f"w{i}" for i in range(words)]
    kinds += [gguf.TokenType.NORMAL] * words
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write_random_gguf(path: Path, shape: Shape, seed: int = 0) -> None:
    """Writes the model to `path`, holding one tensor in memory at a time; `path` appears only when it is complete."""
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name(path.stem)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.hidden_dim)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    add_vocabulary(writer, shape.vocab_size)

    for name, (rows, columns) in matrices(shape).items():
        stored = columns // BLOCK * BLOCK_BYTES
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor_info(name, (rows, stored), np.dtype(np.uint8), rows * stored, raw_dtype=kind)
    for name in norms(shape):
        writer.add_tensor_info(name, (shape.dim,), np.dtype(np.float32), shape.dim * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for rows, columns in matrices(shape).values():
        writer.write_tensor_data(random_q4_0(rng, rows, columns))
    for _ in norms(shape):
        writer.write_tensor_data(rng.uniform(0.9, 1.1, shape.dim).astype(np.float32))
    writer.close()
    os.replace(partial, path)
