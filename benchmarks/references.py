"""The demo model's function with weights that lie on no grid, to measure quantizers on.

    python -m benchmarks.references P|R OUT.gguf [--seed 0]

The one real model at hand comes in 4 bits, so quantizing it again would measure how well a grid meets that grid. These
compute what it computes with other numbers, exactly but for rounding:

    P  channels of the residual stream, of the MLP and within heads permuted, and scaled by log-normal factors that the
       neighbouring matrix takes back: groups hold other weights together, and columns differ in size as they do in
       models that were never quantized
    R  the residual stream turned into 768 dimensions by random orthonormal columns, norms folded into the matrices
       behind them, three heads and the columns behind them zero: K-quants with blocks of 256 apply, weights are nearly
       Gaussian, and there are no outliers

Each is written as a GGUF of f16, which is then the reference of everybody. Needs `gguf`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from pyllama.demo import demo_source
from quantize.readers import open_source

Floats = NDArray[np.float32]
Weights = dict[str, Floats]

SIGMA = 0.25  # of the logarithm of P's factors
WIDE, WIDE_HEADS, WIDE_KV_HEADS = 768, 12, 4


def demo_weights() -> tuple[dict[str, Any], Weights]:
    """The demo's config and its tensors, canonical names, rows in Hugging Face's order."""
    source = open_source(demo_source())
    return source.config, {name: tensor.read() for name, tensor in source.tensors.items()}


def permuted(config: dict[str, Any], weights: Weights, seed: int, sigma: float = SIGMA) -> Weights:
    """P. Rotary pairs share a factor, which q loses and k gains; they cannot be permuted."""
    rng = np.random.default_rng(seed)
    dim, width = config["dim"], config["head_dim"]
    n_kv, per_kv = config["n_kv_heads"], config["n_heads"] // config["n_kv_heads"]
    order = rng.permutation(dim)

    def factors(n: int) -> Floats:
        return np.exp(sigma * rng.standard_normal(n)).astype(np.float32)

    out = {"tok_embeddings": weights["tok_embeddings"][:, order], "norm": weights["norm"][order]}
    if "output" in weights:
        out["output"] = weights["output"][:, order]
    for layer in range(config["n_layers"]):
        w = {part: weights[f"layers.{layer}.{part}"].copy() for part in _PARTS}
        for norm, readers in (("attn_norm", ("wq", "wk", "wv")), ("mlp_norm", ("w_gate", "w_up"))):
            scale = factors(dim)
            w[norm] = w[norm][order] * scale
            for part in readers:
                w[part] = w[part][:, order] / scale
        channels, scale = rng.permutation(config["hidden_dim"]), factors(config["hidden_dim"])
        w["w_gate"], w["w_up"] = w["w_gate"][channels], w["w_up"][channels] * scale[:, None]
        w["w_down"] = w["w_down"][order][:, channels] / scale
        w["wo"] = w["wo"][order]
        q = w["wq"].reshape(n_kv, per_kv, 2, width // 2, dim)
        k, v = w["wk"].reshape(n_kv, 2, width // 2, dim), w["wv"].reshape(n_kv, width, dim)
        o = w["wo"].reshape(dim, n_kv, per_kv, width)
        for head in range(n_kv):
            channels, scale, pairs = rng.permutation(width), factors(width), factors(width // 2)
            v[head] = v[head][channels] * scale[:, None]
            o[:, head] = o[:, head][:, :, channels] / scale
            q[head], k[head] = q[head] / pairs[:, None], k[head] * pairs[:, None]
        out |= {f"layers.{layer}.{part}": np.ascontiguousarray(values, np.float32) for part, values in w.items()}
    return out


def widened(config: dict[str, Any], weights: Weights, seed: int) -> tuple[dict[str, Any], Weights]:
    """R: x becomes turn·x, whose mean square is smaller by dim / WIDE; the matrices behind a norm make up for that."""
    rng = np.random.default_rng(seed)
    dim, width = config["dim"], config["head_dim"]
    turn = np.linalg.qr(rng.standard_normal((WIDE, dim)))[0]  # [WIDE, dim], orthonormal columns
    ones = np.ones(WIDE, np.float32)

    def behind(norm: Floats, matrix: Floats) -> Floats:
        folded: Floats = (((dim / WIDE) ** 0.5 * matrix.astype(np.float64) * norm) @ turn.T).astype(np.float32)
        return folded

    def with_rows(matrix: Floats, n: int) -> Floats:
        return np.concatenate([matrix, np.zeros((n - len(matrix), matrix.shape[1]), np.float32)])

    head = weights.get("output", weights["tok_embeddings"])
    out = {
        "tok_embeddings": (weights["tok_embeddings"].astype(np.float64) @ turn.T).astype(np.float32),
        "output": behind(weights["norm"], head),
        "norm": ones,
    }
    for layer in range(config["n_layers"]):
        w = {part: weights[f"layers.{layer}.{part}"] for part in _PARTS}
        attention = {part: behind(w["attn_norm"], w[part]) for part in ("wq", "wk", "wv")}
        made = {
            "attn_norm": ones,
            "mlp_norm": ones,
            "wq": with_rows(attention["wq"], WIDE_HEADS * width),
            "wk": with_rows(attention["wk"], WIDE_KV_HEADS * width),
            "wv": with_rows(attention["wv"], WIDE_KV_HEADS * width),
            "wo": with_rows((turn @ w["wo"]).astype(np.float32).T, WIDE_HEADS * width).T,
            "w_gate": behind(w["mlp_norm"], w["w_gate"]),
            "w_up": behind(w["mlp_norm"], w["w_up"]),
            "w_down": (turn @ w["w_down"]).astype(np.float32),
        }
        out |= {f"layers.{layer}.{part}": np.ascontiguousarray(values) for part, values in made.items()}
    wide = {"dim": WIDE, "n_heads": WIDE_HEADS, "n_kv_heads": WIDE_KV_HEADS, "tied_embeddings": False}
    return {**config, **wide, "norm_eps": config["norm_eps"] * dim / WIDE}, out


_PARTS = ("attn_norm", "wq", "wk", "wv", "wo", "mlp_norm", "w_gate", "w_up", "w_down")


def off_grid(values: Floats) -> bool:
    """Whether groups of 32 hold more different values than 16 levels could give."""
    groups = values[: min(len(values), 64), :32]
    return all(len(np.unique(group)) > 16 for group in groups[np.abs(groups).max(axis=1) > 0])


def write_reference(kind: str, path: Path, seed: int = 0) -> None:
    """Writes a reference as a GGUF of f16 with the demo's vocabulary. Raises ValueError for an unknown kind."""
    config, weights = demo_weights()
    if kind == "P":
        weights = permuted(config, weights, seed)
    elif kind == "R":
        config, weights = widened(config, weights, seed)
    else:
        raise ValueError(f"reference {kind!r}, expected P or R")
    assert all(off_grid(values) for values in weights.values() if values.ndim == 2)
    write_gguf(path, config, weights)


def write_gguf(path: Path, config: dict[str, Any], weights: Weights) -> None:
    """A model of the demo's family and vocabulary, matrices in f16."""
    stock = gguf.GGUFReader(demo_source())
    writer = gguf.GGUFWriter(path, "llama")
    changed: dict[str, Any] = {
        "llama.embedding_length": config["dim"],
        "llama.attention.head_count": config["n_heads"],
        "llama.attention.head_count_kv": config["n_kv_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["norm_eps"],
    }
    for key, entry in stock.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind = entry.types[0]
            sub = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, changed.get(key, entry.contents()), kind, sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, values in weights.items():
        stored = values
        if name.endswith((".wq", ".wk")):  # rotary pairs side by side
            halves = values.reshape(-1, 2, config["head_dim"] // 2, values.shape[1])
            stored = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(stored, np.float16 if values.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor."""
    layer, _, part = name.removeprefix("layers.").partition(".")
    return f"blk.{layer}.{_IN_BLOCK[part]}.weight" if part else f"{_OUTSIDE[name]}.weight"


_OUTSIDE = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_IN_BLOCK = {
    "attn_norm": "attn_norm",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "mlp_norm": "ffn_norm",
    "w_gate": "ffn_gate",
    "w_up": "ffn_up",
    "w_down": "ffn_down",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.references", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("P", "R"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_reference(options.kind, options.out, options.seed)


if __name__ == "__main__":
    main()
