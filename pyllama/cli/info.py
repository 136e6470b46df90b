"""`pyllama info`: what a model is, from its headers alone. Weights are neither read nor mapped into the engine."""

from __future__ import annotations

import argparse
from typing import Any

from .terminal import json_text, safe


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
    """Everything there is to say, as plain JSON values."""
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
    vocabularies = [name for name in ("tokenizer.json", "tokenizer.model") if name in found.files]
    return {
        "path": str(found.path),
        "foreign": found.foreign,
        "config": config,
        "n_params": n_params,
        "n_bytes": n_bytes,
        "bits_per_weight": 8 * n_bytes / n_params,
        "formats": formats,
        "kv_cache_bytes_per_tok": 4 * config["n_layers"] * config["n_kv_heads"] * config["head_dim"],
        "tokenizer": vocabularies[0] if vocabularies else "none",
        "chat_template": found.has_chat_template,
    }


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    config = record["config"]
    heads = f"{config['n_heads']} query, {config['n_kv_heads']} key/value, {config['head_dim']} wide"
    source = config.get("source") or {}
    rows = [
        ("path", record["path"]),
        ("source", f"{source.get('name', '?')} ({source.get('kind', '?')})" if source else "unknown"),
        ("architecture", config["architecture"]),
        ("parameters", f"{record['n_params']:,}"),
        ("size", f"{record['n_bytes'] / 1e6:.1f} MB, {record['bits_per_weight']:.2f} bits per weight"),
        ("layers", str(config["n_layers"])),
        ("width", f"{config['dim']}, MLP {config['hidden_dim']}"),
        ("heads", heads),
        (
            "vocabulary",
            f"{config['vocab_size']}, head {'tied to' if config['tied_embeddings'] else 'apart from'} embeddings",
        ),
        ("context", f"{config['max_seq_len']} tokens, {record['kv_cache_bytes_per_tok'] / 1024:.1f} KiB of cache each"),
        ("tokenizer", record["tokenizer"]),
        ("chat template", "yes" if record["chat_template"] else "no"),
    ]
    lines = [" ".join(f"{name:<14} {value}".splitlines()) for name, value in rows]  # a name may hold line ends
    if record["foreign"]:
        lines.insert(1, f"{'note':<14} a foreign checkpoint; sizes are those that it will have when it is converted")
    lines += ["", f"{'format':<10} {'tensors':>8} {'parameters':>15} {'MB':>10} {'bits/weight':>12}"]
    for name, row in sorted(record["formats"].items(), key=lambda item: -item[1]["bytes"]):
        bits = 8 * row["bytes"] / row["params"]
        lines.append(f"{name:<10} {row['tensors']:>8} {row['params']:>15,} {row['bytes'] / 1e6:>10.1f} {bits:>12.2f}")
    return "\n".join(lines)
