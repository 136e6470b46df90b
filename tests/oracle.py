"""The float64 numpy LLaMA that everything is checked against: written from the papers, a whole sequence at a time.

No cache, no batching, no tricks. It deliberately shares nothing with the engine except the canonical names of the
tensors. Two options make it comparable within rounding errors: `kv_dtype` rounds keys and values as a cache would, and
tensors named in `quantized` see activations rounded to int8 per 32 columns, as the kernels for quantized weights do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[np.float64]


def rmsnorm(x: Array, weight: Array, eps: float) -> Array:
    """arXiv 1910.07467, equation 4, with eps under the root. x: [..., dim]."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x: Array, positions: Array, inv_freq: Array, factor: float) -> Array:
    """arXiv 2104.09864, equation 13, with pairs (i, i + head_dim/2). x: [n_tok, heads, head_dim]."""
    angle = positions[:, None, None] * inv_freq
    cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def softmax(x: Array) -> Array:
    """Along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q: Array, k: Array, v: Array, scale: float, window: int | None = None) -> Array:
    """Causal attention, groups of query heads sharing a key/value head (arXiv 2305.13245).

    q: [n_tok, n_heads, head_dim]; k, v: [n_tok, n_kv_heads, head_dim]. Returns [n_tok, n_heads * head_dim].
    Each token sees itself and the window - 1 tokens before it (arXiv 2310.06825, section 2), or all before it.
    """
    n_tok, n_heads, _ = q.shape
    share = n_heads // k.shape[1]
    k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
    back = np.subtract.outer(np.arange(n_tok), np.arange(n_tok))  # [query, key]: how far the key lies behind
    seen = (back >= 0) & (back < (window or n_tok))
    scores = np.where(seen, np.einsum("qhd,khd->hqk", q, k) * scale, -np.inf)
    return np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(n_tok, -1)


def silu(x: Array) -> Array:
    """x * sigmoid(x), without overflow."""
    return x * np.exp(-np.logaddexp(0.0, -x))


def round_activations(x: Array, digits: int = 1) -> Array:
    """int8 in -127…127 with one scale of 22 bits per 32 columns, as float64. x: [n_tok, K]. A second digit rounds the
    rest.
    """
    if digits > 1:
        first = round_activations(x)
        return first + round_activations(x - first, digits - 1)
    n_tok, width = x.shape
    padded = np.zeros((n_tok, -(-width // 32) * 32))
    padded[:, :width] = x
    groups = padded.reshape(n_tok, -1, 32)
    mantissa, exponent = np.frexp(np.abs(groups).max(axis=-1, keepdims=True) / 127)
    scale = np.ldexp(np.ceil(mantissa * 2**22), exponent - 22)
    codes = np.rint(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
    return (codes * scale).reshape(n_tok, -1)[:, :width]


class Llama:
    """A LLaMA over dense float64 weights {canonical name: array [N, K] or [N]}; `config` as for pyllama._C.Model."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, NDArray[Any]],
        *,
        kv_dtype: DTypeLike | None = None,
        quantized: Collection[str] = (),
        input_order: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.config = config
        self.weights = {name: np.asarray(w, dtype=np.float64) for name, w in weights.items()}
        self.kv_dtype = kv_dtype
        self.quantized = quantized
        self.input_order = input_order or {}
        self.inv_freq = np.asarray(config["rope_inv_freq"], dtype=np.float64)

    def logits(self, tokens: Any) -> Array:
        """[n_tok, vocab_size] for the tokens of one sequence from position 0. Source: arXiv 2302.13971."""
        x = self.weights["tok_embeddings"][np.asarray(tokens)] * (self.config.get("embedding_scale") or 1.0)
        for layer in range(self.config["n_layers"]):
            x = x + self._attention(x, layer)
            x = x + self._mlp(x, f"layers.{layer}.")
        head = "tok_embeddings" if self.config["tied_embeddings"] else "output"
        return self._linear(self._norm(x, "norm"), head, digits=2)

    def _norm(self, x: Array, name: str) -> Array:
        return rmsnorm(x, self.weights[name], self.config["norm_eps"])

    def _linear(self, x: Array, name: str, bias: str = "", digits: int = 1) -> Array:
        """x · Wᵀ + b. Act-order weights are given in plain column order; only the rounding sees the stored order."""
        if name in self.quantized:
            order = self.input_order.get(name, np.arange(x.shape[1]))
            x, stored = np.empty_like(x), x[:, order]
            x[:, order] = round_activations(stored, digits)
        y = x @ self.weights[name].T
        return y + self.weights[bias] if bias in self.weights else y

    def _attention(self, x: Array, layer: int) -> Array:
        config, positions, prefix = self.config, np.arange(len(x), dtype=np.float64), f"layers.{layer}."
        x = self._norm(x, prefix + "attn_norm")
        q, k, v = (
            self._linear(x, prefix + "w" + which, prefix + "b" + which).reshape(len(x), -1, config["head_dim"])
            for which in "qkv"
        )
        if prefix + "q_norm" in self.weights:  # arXiv 2505.09388, section 2
            q, k = self._norm(q, prefix + "q_norm"), self._norm(k, prefix + "k_norm")
        q, k = (rope(each, positions, self.inv_freq, config["rope_attention_factor"]) for each in (q, k))
        if self.kv_dtype is not None:
            k, v = (each.astype(self.kv_dtype).astype(np.float64) for each in (k, v))
        layers, scale = config.get("sliding_layers"), config.get("attention_scale") or config["head_dim"] ** -0.5
        window = config.get("sliding_window") if layers is None or layer in layers else None
        return self._linear(attention(q, k, v, scale, window), prefix + "wo")

    def _mlp(self, x: Array, prefix: str) -> Array:
        """arXiv 2002.05202, equation 6 (SwiGLU), without biases."""
        x = self._norm(x, prefix + "mlp_norm")
        gated = silu(self._linear(x, prefix + "w_gate")) * self._linear(x, prefix + "w_up")
        return self._linear(gated, prefix + "w_down")
