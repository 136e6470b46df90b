"""How fast a model will read a prompt and decode on this CPU, before it is there: for `pyllama plan` and `bench`.

A rehearsal: some layers of the model's own shapes and formats, with random weights, as many as no cache holds, read a
prompt and decode here. A model's layers are alike, so that their time is known; the head reads its bytes at the speed
that decoding found. A small model is rehearsed whole. Devices other than the CPU are not predicted; what a model really
reaches is in `pyllama bench`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import sizes
from .common.formats import TensorSpec
from .native import load_native
from .open import OpenedModel, native_weight
from .synthetic import random_payload

N_PROMPT = 512
REHEARSED_BYTES = 256 << 20  # of weights; beyond the caches of most machines
_RUNS = 3
_PROBE_S = 0.3
_DECODED = 12  # tokens of a run
_SMALL_VOCAB = 256  # of a rehearsal without the model's head


@dataclass(frozen=True)
class Speeds:
    """Predicted for one sequence. prompt_tok_per_s: of a prompt of `n_prompt` tokens after `n_depth` others.

    token_s: seconds to decode a token of a short text. cache_bytes_per_tok: what attention reads for each token before,
    at decode_gb_per_s, as decoding read weights. rehearsed: how many layers
    these figures come from.
    """

    threads: int
    isa: str
    n_prompt: int
    n_depth: int
    rehearsed: int
    prompt_tok_per_s: float
    token_s: float
    decode_gb_per_s: float
    cache_bytes_per_tok: int

    def decode_tok_per_s(self, n_depth: int) -> float:
        """Tokens per second of decoding after `n_depth` tokens."""
        return 1 / (self.token_s + n_depth * self.cache_bytes_per_tok / (self.decode_gb_per_s * 1e9))


def predict(
    config: Mapping[str, Any],
    specs: Iterable[TensorSpec],
    *,
    n_prompt: int = N_PROMPT,
    n_depth: int = 0,
    kv_dtype: str = "f16",
    threads: int = 0,
    n_batch: int = 512,
) -> Speeds:
    """Rehearses for about two seconds; takes memory for REHEARSED_BYTES of weights, or for one layer.

    n_batch: tokens per step of a prompt. Prompt and depth together must fit the model's context.
    """
    tensors = {spec.name: spec for spec in specs}
    n_layers = int(config["n_layers"])
    part, part_specs = _part(config, tensors)
    n_ctx = min(max(n_depth + n_prompt, _DECODED + 1), int(config["max_seq_len"]))
    rng = np.random.Generator(np.random.SFC64(0))
    weights = {spec.name: native_weight(spec, random_payload(spec, rng)) for spec in part_specs}
    opened = OpenedModel(Path("rehearsal"), part, weights, None, None, {})
    model = load_native().Model(
        opened.native_config(n_ctx), weights, threads=threads, kv_dtype=kv_dtype, max_batch_tok=n_batch
    )
    prompt_s = _time(model, n_depth, lambda sequence: _feed(model, sequence, n_prompt))
    n_decoded = min(_DECODED, n_ctx)
    token_s = _time(model, 0, lambda sequence: _decode(model, sequence, n_decoded)) / n_decoded
    speed = opened.step_bytes / token_s
    if part["n_layers"] < n_layers:
        # A part of the rehearsed layers may lie in caches, which the whole model will not.
        bandwidth = float(load_native().read_bandwidth(model.threads, _PROBE_S)) * 1e9
        token_s, speed = token_s * max(1.0, speed / bandwidth), min(speed, bandwidth)
        head_s = tensors.get("output", tensors["tok_embeddings"]).payload_bytes / speed
        prompt_s = prompt_s * n_layers / part["n_layers"] + head_s
        token_s = token_s * n_layers / part["n_layers"] + head_s
    return Speeds(
        threads=model.threads,
        isa=model.isa,
        n_prompt=n_prompt,
        n_depth=n_depth,
        rehearsed=part["n_layers"],
        prompt_tok_per_s=n_prompt / prompt_s,
        token_s=token_s,
        decode_gb_per_s=speed / 1e9,
        cache_bytes_per_tok=n_layers * sizes.cpu_page_bytes(config, kv_dtype) // sizes.PAGE_TOK,
    )


def _part(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> tuple[dict[str, Any], list[TensorSpec]]:
    """Config and tensors of what is rehearsed: all of a small model, else layers from all over it and no head."""
    n_layers = int(config["n_layers"])
    if sum(spec.payload_bytes for spec in tensors.values()) <= REHEARSED_BYTES:
        return dict(config), list(tensors.values())
    layer_bytes = sum(spec.payload_bytes for name, spec in tensors.items() if name.startswith("layers.")) // n_layers
    n = max(1, min(n_layers - 1, REHEARSED_BYTES // layer_bytes))
    specs = [
        TensorSpec("tok_embeddings", "f16", (_SMALL_VOCAB, int(config["dim"]))),
        TensorSpec("norm", "f32", (int(config["dim"]),)),
    ]
    for i in range(n):
        prefix = f"layers.{i * n_layers // n}."
        specs += [
            replace(spec, name=f"layers.{i}.{name[len(prefix) :]}")
            for name, spec in tensors.items()
            if name.startswith(prefix)
        ]
    return {**config, "n_layers": n, "vocab_size": _SMALL_VOCAB, "tied_embeddings": True}, specs


def _time(model: Any, n_depth: int, work: Callable[[Any], None]) -> float:
    """Seconds of `work` on a sequence of `n_depth` tokens; the median of a few runs, after one to warm up."""
    sequence = model.sequence()
    try:
        _feed(model, sequence, n_depth)
        seconds = []
        for _ in range(_RUNS + 1):
            start = time.perf_counter()
            work(sequence)
            seconds.append(time.perf_counter() - start)
            sequence.truncate(n_depth)
        return statistics.median(seconds[1:])
    finally:
        sequence.close()


def _feed(model: Any, sequence: Any, n_tok: int) -> None:
    for first in range(0, n_tok, model.max_batch_tok):
        model.step([(sequence, [0] * min(model.max_batch_tok, n_tok - first), None, "none")])


def _decode(model: Any, sequence: Any, n_tok: int) -> None:
    sampler = load_native().Sampler(temperature=0.0)
    for _ in range(n_tok):
        model.step([(sequence, [0], sampler, "none")])
