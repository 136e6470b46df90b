"""Small random models for the tests, twice: as packed `pyllama._C.Weight`s and as the dense numbers these stand for.

The numbers come from the format table's own `dequantize`, so an engine and an oracle that agree on a model agree on the
format's meaning too. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama import _C
from pyllama.common.formats import FORMATS, Packed, TensorSpec, aligned_zeros, dense, dequantize, pack
from pyllama.common.rope import inv_freq

from .oracle import Llama

CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
CODEBOOK32 = tuple(8 * step - 127 + step**2 % 7 for step in range(32))  # no steps alike, no symmetry


@dataclass(frozen=True)
class Shape:
    """A model's architecture; the sizes are odd on purpose: no multiple of 16 rows, 32 columns or 64 columns."""

    dim: int = 96
    hidden_dim: int = 176
    n_layers: int = 2
    n_heads: int = 6
    n_kv_heads: int = 3
    head_dim: int = 16
    vocab_size: int = 131
    max_seq_len: int = 512
    tied: bool = False
    biases: bool = False
    norm_eps: float = 1e-5
    head_norms: bool = False  # of q and k
    extras: tuple[tuple[str, Any], ...] = ()  # keys of the config that a model may lack

    def config(self) -> dict[str, Any]:
        """What pyllama._C.Model takes."""
        rope = {"head_dim": self.head_dim, "rope_theta": 10000.0, "rope_scaling": None, "max_seq_len": self.max_seq_len}
        frequencies, factor = inv_freq(rope)
        return {
            "dim": self.dim,
            "hidden_dim": self.hidden_dim,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_seq_len": self.max_seq_len,
            "norm_eps": self.norm_eps,
            "rope_inv_freq": frequencies,
            "rope_attention_factor": factor,
            "tied_embeddings": self.tied,
            **dict(self.extras),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical names and logical shapes."""
        q_dim, kv_dim = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "tok_embeddings": (self.vocab_size, self.dim),
            "norm": (self.dim,),
        }
        if not self.tied:
            shapes["output"] = (self.vocab_size, self.dim)
        for layer in range(self.n_layers):
            of_layer: dict[str, tuple[int, ...]] = {
                "attn_norm": (self.dim,),
                "wq": (q_dim, self.dim),
                "wk": (kv_dim, self.dim),
                "wv": (kv_dim, self.dim),
                "wo": (self.dim, q_dim),
                "mlp_norm": (self.dim,),
                "w_gate": (self.hidden_dim, self.dim),
                "w_up": (self.hidden_dim, self.dim),
                "w_down": (self.dim, self.hidden_dim),
            }
            if self.biases:
                of_layer |= {"bq": (q_dim,), "bk": (kv_dim,), "bv": (kv_dim,)}
            if self.head_norms:
                of_layer |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
            shapes |= {f"layers.{layer}.{name}": shape for name, shape in of_layer.items()}
        return shapes


@dataclass(frozen=True)
class Kind:
    """How the matrices are stored: the fields of a TensorSpec that are not the name or the shape."""

    format: str
    group: int = 0
    scale: str = "f16"
    offset: str = ""
    input_order: bool = False

    def __str__(self) -> str:
        parts = [self.format, str(self.group or ""), self.offset and f"{self.scale}-{self.offset}"]
        return "-".join([part for part in parts if part] + ["order"] * self.input_order)

    def spec(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        """A vector is f32 whatever the kind."""
        if len(shape) == 1:
            return TensorSpec(name, "f32", shape)
        row = FORMATS[self.format]
        codebook = (CODEBOOK if row.code_bits == 4 else CODEBOOK32) if row.has_codebook else ()
        return TensorSpec(name, self.format, shape, self.group, self.scale, self.offset, codebook, self.input_order)


DENSE = [Kind("f32"), Kind("f16"), Kind("bf16")]
QUANTIZED = [
    *(Kind(name, group) for name in ("q8", "q4", "q4nl", "q5nl", "q6") for group in (32, 64, 128)),
    Kind("q4a", 32, "f16", "f16"),
    Kind("q4a", 64, "bf16", "bf16"),
    Kind("q4a", 128, "f16", "u8"),
    Kind("q4a", 32, "bf16", "u8"),
    Kind("q4a", 64, "f16", "f16", input_order=True),
]


def random_packed(spec: TensorSpec, rng: np.random.Generator) -> Packed:
    """Random numbers in a tensor's own grid, of a size that keeps activations near 1."""
    if spec.is_vector:
        return dense(spec, rng.uniform(-1.5, 1.5, spec.shape).astype(np.float32))
    n, k = spec.shape
    if not spec.info.quantized:
        return dense(spec, (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32))
    bits = spec.info.code_bits
    codes = rng.integers(-128, 128, (n, k)).astype(np.int8) if bits == 8 else rng.integers(0, 2**bits, (n, k), np.uint8)
    spread = 75.0 if spec.codebook else 0.3 * 2**bits  # of the codes, about
    sizes = rng.uniform(0.5, 1.5, (n, spec.n_groups)) * rng.choice([-1.0, 1.0], (n, spec.n_groups))
    scales = _stored(sizes / (spread * np.sqrt(k)), spec.scale)
    offsets = None
    if spec.offset == "u8":
        offsets = rng.integers(0, 16, scales.shape, np.uint8)
    elif spec.offset:
        offsets = _stored(rng.standard_normal(scales.shape) / np.sqrt(k), spec.offset)
    order = rng.permutation(k).astype(np.int32) if spec.input_order else None
    return Packed(codes, scales, offsets, order)


def _stored(values: NDArray[Any], number: str) -> NDArray[Any]:
    return dense(TensorSpec("numbers", number, values.shape), values.astype(np.float32)).codes


def aligned(payload: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy that starts at a multiple of 64, as a mapped payload does."""
    room = aligned_zeros(payload.size)
    room[:] = payload
    return room


def native_weight(spec: TensorSpec, packed: Packed) -> Any:
    """The tensor as the engine takes it."""
    return _C.Weight(**spec.arguments, data=aligned(pack(spec, packed)))


@dataclass
class SmallModel:
    """One random model: what the engine takes (`config`, `weights`) and what the oracle takes (`values`)."""

    shape: Shape
    kind: Kind
    config: dict[str, Any]
    weights: dict[str, Any] = field(default_factory=dict)
    values: dict[str, NDArray[Any]] = field(default_factory=dict)
    orders: dict[str, NDArray[Any]] = field(default_factory=dict)

    def model(self, **options: Any) -> Any:
        """A pyllama._C.Model; two threads unless said otherwise."""
        return _C.Model(self.config, self.weights, **({"threads": 2} | options))

    def oracle(self) -> Llama:
        """With f16 keys and values, and int8 activations where the kernels use them."""
        quantized = [name for name, weight in self.weights.items() if FORMATS[weight.format].quantized]
        return Llama(self.config, self.values, kv_dtype=np.float16, quantized=quantized, input_order=self.orders)


def small_model(
    shape: Shape | None = None, kind: Kind | None = None, seed: int = 0, kinds: Mapping[str, Kind] | None = None
) -> SmallModel:
    """A random model. `kinds`: those of matrices that are not of `kind`, by their names in a layer ("wq"). Raises
    nothing of its own.
    """
    shape, kind, kinds = shape or Shape(), kind or Kind("f32"), kinds or {}
    made = SmallModel(shape, kind, shape.config())
    rng = np.random.default_rng(seed)
    for name, sides in shape.tensors().items():
        own = kinds.get(name.rpartition(".")[2], kind)
        # An embedding with act-order has no meaning: its rows are looked up, not multiplied.
        ordered = own.input_order and name != "tok_embeddings"
        spec = replace(own, input_order=ordered).spec(name, sides)
        packed = random_packed(spec, rng)
        made.weights[name] = native_weight(spec, packed)
        made.values[name] = dequantize(spec, packed)
        if packed.input_order is not None:
            made.orders[name] = packed.input_order
    return made


def random_tokens(model: SmallModel, n: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, model.shape.vocab_size, n, dtype=np.int32)


def all_logits(model: Any, tokens: Any, chunks: list[int] | None = None) -> NDArray[np.float32]:
    """[n_tok, vocab] of one new sequence, fed in chunks of these sizes."""
    sequence, rows, start = model.sequence(), [], 0
    for size in chunks or [len(tokens)]:
        rows.append(model.step([(sequence, tokens[start : start + size], None, "all")])[0].logits)
        start += size
    assert start == len(tokens) == sequence.n_past
    return np.concatenate(rows)
