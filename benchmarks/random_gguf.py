"""Writes random LLaMA-shaped models as GGUF, tensor by tensor: every matrix Q4_0 or Q8_0, or mixed as Q4_K_M mixes.

Random codes under plausible scales: activations stay finite and no block is special, which is all that a measurement of
speed needs. A pool of random blocks is laid end to end (a prime number of them, so that rows do not repeat), which
writes gigabytes as fast as the disk takes them. The vocabulary is made up. Nothing here means anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from pyllama.synthetic import Shape

POOL_BLOCKS = 65_537
MIXES = {
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
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


def kind_of(mix: str, name: str, shape: Shape) -> Kind:
    """The block type of a matrix. Q4_K_M: six bits for the head and, in some layers, for v and `ffn_down`."""
    if mix != "q4_k_m":
        return {"q4_0": Kind.Q4_0, "q8_0": Kind.Q8_0}[mix]
    if name == ("token_embd.weight" if shape.tied else "output.weight"):
        return Kind.Q6_K
    if name.endswith(("attn_v.weight", "ffn_down.weight")) and _gets_more_bits(int(name.split(".")[1]), shape.n_layers):
        return Kind.Q6_K
    return Kind.Q4_K


def _gets_more_bits(layer: int, n_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


# -------------------------------------------------------------------------------- blocks


def _put_f16(blocks: NDArray[np.uint8], at: int, values: NDArray[np.float64]) -> None:
    blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


# Each writes its scales over random bytes; `scale` is the wanted deviation of the weights, block by block.
# The divisors are the deviations of what the other random bytes of a block stand for.
def _q4_0(blocks: NDArray[np.uint8], scale: NDArray[np.float64]) -> None:
    _put_f16(blocks, 0, scale / 4.6)  # -8 … 7


def _q8_0(blocks: NDArray[np.uint8], scale: NDArray[np.float64]) -> None:
    blocks[:, 2:][blocks[:, 2:] == 0x80] = 0  # a quantizer writes no -128
    _put_f16(blocks, 0, scale / 73.3)  # -127 … 127


def _q4_k(blocks: NDArray[np.uint8], scale: NDArray[np.float64]) -> None:
    _put_f16(blocks, 0, scale / 258)  # d: six-bit scale times 0 … 15
    _put_f16(blocks, 2, 7.5 * scale / 258)  # dmin: six-bit minimum; 7.5 centres the weights


def _q6_k(blocks: NDArray[np.uint8], scale: NDArray[np.float64]) -> None:
    _put_f16(blocks, 208, scale / 1365)  # signed eight-bit scale times -32 … 31


_FILL: dict[Kind, Callable[[NDArray[np.uint8], NDArray[np.float64]], None]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q8_0: _q8_0,
    Kind.Q4_K: _q4_k,
    Kind.Q6_K: _q6_k,
}


class BlockPool:
    """Random blocks of each type for matrices of so many columns, made when first asked for."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._made: dict[tuple[Kind, int], NDArray[np.uint8]] = {}

    def matrix(self, kind: Kind, rows: int, columns: int) -> NDArray[np.uint8]:
        """uint8 [rows, bytes of a row]; weights have a deviation of about 1 / sqrt(columns)."""
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if columns % per_block:
            raise ValueError(f"{columns} columns are no multiple of {kind.name}'s {per_block}")
        pool = self._made.get((kind, columns))
        if pool is None:
            pool = np.frombuffer(self._rng.bytes(POOL_BLOCKS * block_bytes), np.uint8).reshape(-1, block_bytes).copy()
            _FILL[kind](pool, self._rng.uniform(0.5, 1.5, POOL_BLOCKS) / np.sqrt(columns))
            self._made[kind, columns] = pool
        rolled = np.roll(pool, int(self._rng.integers(POOL_BLOCKS)), axis=0)
        return np.resize(rolled, (rows, columns // per_block * block_bytes))


# -------------------------------------------------------------------------------- the file


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


def add_config(writer: gguf.GGUFWriter, shape: Shape, mix: str) -> None:
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
    writer.add_file_type(MIXES[mix])


def write_random_gguf(path: Path, shape: Shape, mix: str = "q4_0", seed: int = 0) -> None:
    """Writes the model to `path`, holding one tensor in memory at a time; `path` appears only when it is complete."""
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name(path.stem)
    add_config(writer, shape, mix)
    add_vocabulary(writer, shape.vocab_size)
    kinds = {name: kind_of(mix, name, shape) for name in matrices(shape)}
    for name, (rows, columns) in matrices(shape).items():
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kinds[name]]
        stored = columns // per_block * block_bytes
        writer.add_tensor_info(name, (rows, stored), np.dtype(np.uint8), rows * stored, raw_dtype=kinds[name])
    for name in norms(shape):
        writer.add_tensor_info(name, (shape.dim,), np.dtype(np.float32), shape.dim * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    pool = BlockPool(rng)
    for name, (rows, columns) in matrices(shape).items():
        writer.write_tensor_data(pool.matrix(kinds[name], rows, columns))
    for _ in norms(shape):
        writer.write_tensor_data(rng.uniform(0.9, 1.1, shape.dim).astype(np.float32))
    writer.close()
    os.replace(partial, path)
