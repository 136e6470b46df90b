"""`pyllama info`: what a model is and what running it takes, from its headers alone, whatever the source.

Weights are neither read nor mapped into the engine, and nothing is converted. Counting bytes is sizes.py's work.
"""

from __future__ import annotations

import argparse
from typing import Any

from .terminal import json_text, safe

_SHORT_CTX = 4096


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="what a model is", description="Show what a model is.")
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help='folder, .gguf file or "demo"')
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    record = describe(arguments.model)
    print(json_text(record) if arguments.json else safe(text(record)))
    return 0


def describe(model: str) -> dict[str, Any]:
    """Everything there is to say, as plain JSON values. `stored` is the source's, the other sizes are our format's."""
    from ..open import describe_model

    found = describe_model(model)
    config = found.config
    formats: dict[str, dict[str, int]] = {}
    for spec in found.specs:
        name = f"{spec.format} g{spec.group}" if spec.group else spec.format
        row = formats.setdefault(name, {"tensors": 0, "params": 0, "bytes": 0})
        row["tensors"] += 1
        row["params"] += spec.n_weights
        row["bytes"] += spec.payload_bytes
    n_params = sum(row["params"] for row in formats.values())
    n_bytes = sum(row["bytes"] for row in formats.values())
    contexts = sorted({min(_SHORT_CTX, config["max_seq_len"]), config["max_seq_len"]})
    return {
        "path": str(found.path),
        "foreign": found.foreign,
        "architecture": found.architecture,
        "features": _features(config, found.specs),
        "config": config,
        "n_params": n_params,
        "n_bytes": n_bytes,
        "bits_per_weight": 8 * n_bytes / n_params,
        "formats": formats,
        "stored": {
            name: {"tensors": tensors, "params": params, "bytes": size}
            for name, (tensors, params, size) in found.stored.items()
        },
        "stored_bytes": sum(size for *_, size in found.stored.values()),
        "conversion": found.conversion,
        "kv_cache_bytes_per_tok": 4 * config["n_layers"] * config["n_kv_heads"] * config["head_dim"],
        "memory": [_memory(config, n_bytes, n_ctx) for n_ctx in contexts],
        "tokenizer": found.vocabulary["file"] if found.vocabulary else "none",
        "vocabulary": found.vocabulary,
        "chat_template": found.has_chat_template,
    }


def _memory(config: dict[str, Any], n_bytes: int, n_ctx: int) -> dict[str, int]:
    """What running it on the CPU takes with a context of `n_ctx` tokens in an f16 cache."""
    from ..sizes import PAGE_TOK, cpu_buffer_bytes, cpu_page_bytes

    cache = -(-n_ctx // PAGE_TOK) * config["n_layers"] * cpu_page_bytes(config, "f16")
    buffers = cpu_buffer_bytes(config)
    return {"n_ctx": n_ctx, "weights": n_bytes, "cache": cache, "buffers": buffers, "total": n_bytes + cache + buffers}


def _features(config: dict[str, Any], specs: Any) -> list[str]:
    """What the model has beyond a plain Llama."""
    parts = {spec.name.rsplit(".", 1)[-1] for spec in specs}
    features = []
    if config.get("sliding_window"):
        layers = config.get("sliding_layers")
        where = "" if layers is None else f" in {len(layers)} of {config['n_layers']} layers"
        features.append(f"a window of {config['sliding_window']} tokens{where}")
    if config.get("rope_scaling"):
        features.append(f"RoPE scaling {config['rope_scaling'].get('rope_type', 'default')}")
    if "bq" in parts:
        features.append("biases of query, key and value")
    if "q_norm" in parts:
        features.append("norms of query and key")
    if "embedding_scale" in config or "attention_scale" in config:
        features.append("scales of its own")
    return features


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    config, vocabulary = record["config"], record["vocabulary"]
    heads = f"{config['n_heads']} query, {config['n_kv_heads']} key/value, {config['head_dim']} wide"
    source = config.get("source") or {}
    about = f"{vocabulary['kind']}, {vocabulary['n_tokens']} tokens, {vocabulary['file']}" if vocabulary else "none"
    stored = f", {record['stored_bytes'] / 1e6:.1f} MB as it is" if record["foreign"] else ""
    rows = [
        ("path", record["path"]),
        ("source", _origin(source) if source else "unknown"),
        ("architecture", "; ".join([record["architecture"], *record["features"]])),
        ("parameters", f"{record['n_params']:,}"),
        ("size", f"{record['n_bytes'] / 1e6:.1f} MB, {record['bits_per_weight']:.2f} bits per weight{stored}"),
        ("layers", str(config["n_layers"])),
        ("width", f"{config['dim']}, MLP {config['hidden_dim']}"),
        ("heads", heads),
        (
            "vocabulary",
            f"{config['vocab_size']}, head {'tied to' if config['tied_embeddings'] else 'apart from'} embeddings",
        ),
        ("context", f"{config['max_seq_len']} tokens, {record['kv_cache_bytes_per_tok'] / 1024:.1f} KiB of cache each"),
        ("tokenizer", about),
        ("chat template", "yes" if record["chat_template"] else "no"),
    ]
    chosen = config.get("quantization") or {}
    if chosen.get("target"):
        kl = f"predicted {chosen.get('predicted_kl', '?')}, measured {chosen.get('measured_kl', '?')}"
        rows.append(("formats chosen", f"for {chosen['target']}; KL divergence {kl}"))
    rows += [("memory", _needs(row)) for row in record["memory"]]
    if record["conversion"]:
        rows.append(("conversion", f"{record['conversion']} (when it is opened first, or by quantize)"))
    lines = [" ".join(f"{name:<14} {value}".splitlines()) for name, value in rows]  # a name may hold line ends
    if record["foreign"]:
        lines.insert(1, f"{'note':<14} a foreign checkpoint; sizes are those that it will have when it is converted")
        lines += _table("stored as", record["stored"])
    return "\n".join(lines + _table("format", record["formats"]))


def _origin(source: dict[str, Any]) -> str:
    """What a model was made from. Whatever stands there: config.json may be anybody's."""
    adapters = source.get("lora")
    names = [
        f"{adapter.get('name', '?')} times {adapter.get('scale', '?')}"
        for adapter in (adapters if isinstance(adapters, list) else [])
        if isinstance(adapter, dict)
    ]
    merged = f", with the adapter{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else ""
    return f"{source.get('name', '?')} ({source.get('kind', '?')}){merged}"


def _needs(row: dict[str, int]) -> str:
    weights, cache, buffers, total = (row[key] / 2**20 for key in ("weights", "cache", "buffers", "total"))
    parts = f"weights {weights:.0f}, cache {cache:.0f}, buffers {buffers:.0f}"
    return f"{total:.0f} MiB with a context of {row['n_ctx']} tokens ({parts})"


def _table(title: str, rows: dict[str, dict[str, int]]) -> list[str]:
    total = sum(row["params"] for row in rows.values())
    lines = ["", f"{title:<10} {'tensors':>8} {'parameters':>15} {'share':>7} {'MB':>10} {'bits/weight':>12}"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["bytes"]):
        bits, share = 8 * row["bytes"] / row["params"], f"{100 * row['params'] / total:.1f} %"
        lines.append(
            f"{name:<10} {row['tensors']:>8} {row['params']:>15,} {share:>7} {row['bytes'] / 1e6:>10.1f} {bits:>12.2f}"
        )
    return lines
