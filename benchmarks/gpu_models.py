"""Speed of whole models on a CUDA device, one table and JSON: a part of `make gpu-check`.

Random models of known shapes; all layers have the weights of the first, on the device each its own copy, so that one is
made in seconds and takes the memory and the time of a real one. Decoding is greedy, of one sequence and of eight that
begin alike: their tokens must be those of the one. Figures are medians of some rounds. Kernels alone: gpu.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import DeviceError
from pyllama.common.formats import TILE_ROWS, TensorSpec
from pyllama.native import load_native
from pyllama.open import OpenedModel, native_weight
from pyllama.synthetic import SHAPES, random_payload, synthetic_config, synthetic_specs

CASES = (
    ("8b", "q4", 64), ("1b", "q4", 64), ("8b", "q8", 64), ("8b", "f16", 0), ("7b", "q4", 64), ("8b", "q4nl", 64),
    ("8b", "q4", 32), ("1b", "q8", 64), ("1b", "f16", 0), ("1b", "q4nl", 64), ("7b", "q8", 64), ("7b", "f16", 0),
    ("7b", "q4nl", 64),
)  # fmt: skip
GOALS = {"8b q4-64": 600, "8b q4-32": 600, "8b q8-64": 330, "8b f16": 180, "1b q4-64": 2600}  # tok/s on an H100
BATCH = 8
STEPS_AT_ONCE = 32  # passes of one call


@dataclass
class Result:
    """`decode`, `decode_batch`: tokens a second in all; `tokens`: a digest of what was decoded."""

    name: str
    seconds_to_open: float = 0.0
    decode: list[float] = field(default_factory=list)
    decode_batch: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    step_bytes: int = 0
    prompt_flops: int = 0  # for a token, attention left out
    tokens: str = ""
    shares: dict[str, float] = field(default_factory=dict)
    error: str = ""


def name_of(case: tuple[str, str, int]) -> str:
    shape, format, group = case
    return f"{shape} {format}" + (f"-{group}" if group else "")


# ---------------------------------------------------------------------------------------------------- the model


def quick_model(case: tuple[str, str, int], max_seq_len: int) -> OpenedModel:
    """A random model whose layers share their weights."""
    shape, format, group = case
    config = synthetic_config(shape, max_seq_len)
    rng = np.random.Generator(np.random.SFC64(0))
    weights: dict[str, Any] = {}
    for spec in synthetic_specs(config, format, group or 32):
        first = spec.name
        if spec.name.startswith("layers."):
            first = "layers.0." + spec.name.split(".", 2)[2]
        weights[spec.name] = weights.get(first) or native_weight(spec, quick_payload(spec, rng))
    return OpenedModel(Path(f"random-{name_of(case)}"), config, weights, None, None, {})


def quick_payload(spec: TensorSpec, rng: np.random.Generator) -> NDArray[np.uint8]:
    """random_payload, but for f16 matrices random bits with one exponent: normal numbers would take minutes."""
    if spec.format != "f16" or spec.is_vector or spec.shape[0] % TILE_ROWS or spec.shape[1] % 32:
        return random_payload(spec, rng)
    n = spec.payload_bytes // 8
    raw = np.empty(n + 8, np.uint64)
    start = -raw.ctypes.data % 64 // 8
    words = raw[start : start + n]
    # ±2^e to ±2^(e + 1), of which the root mean square is 1.53 · 2^e; that of a product's rows is to be about 1.
    exponent = round(float(np.log2(1 / (1.53 * np.sqrt(spec.shape[1]))))) + 15
    for first in range(0, n, 1 << 19):
        part = words[first : first + (1 << 19)]
        part[:] = rng.integers(0, 2**64, len(part), dtype=np.uint64)
        part &= np.uint64(0x83FF83FF83FF83FF)
        part |= np.uint64(exponent << 10) * np.uint64(0x0001000100010001)
    return words.view(np.uint8)


# ---------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Sizes:
    decode: int = 128
    prompt: int = 2048
    rounds: int = 5


def measure(case: tuple[str, str, int], device: str, sizes: Sizes) -> Result:
    """Never raises what the device or a kernel may do wrong: it is the result's error."""
    result = Result(name_of(case))
    try:
        fill(result, case, device, sizes)
    except (DeviceError, MemoryError, ValueError, RuntimeError) as error:
        result.error = f"{type(error).__name__}: {error}"
    return result


def fill(result: Result, case: tuple[str, str, int], device: str, sizes: Sizes) -> None:
    native = load_native()
    n_ctx = max(sizes.prompt, 64 + sizes.decode) + STEPS_AT_ONCE
    opened = quick_model(case, n_ctx)
    start = time.perf_counter()
    rows = max(BATCH, sizes.prompt)
    model = native.Model(opened.native_config(n_ctx), opened.weights, device=device, max_batch_tok=rows)
    result.seconds_to_open = time.perf_counter() - start
    result.step_bytes = opened.step_bytes
    matrices = [w for name, w in opened.weights.items() if name.startswith("layers.") and len(w.shape) == 2]
    result.prompt_flops = sum(2 * w.shape[0] * w.shape[1] for w in matrices)

    alone, tokens = decoding(native, model, 1, sizes)
    result.decode = alone
    result.tokens = hashlib.sha256(np.array(tokens[0], np.int32).tobytes()).hexdigest()[:8]
    result.decode_batch, together = decoding(native, model, BATCH, sizes)
    if any(row != tokens[0] for row in together):
        raise RuntimeError(f"of {BATCH} sequences that begin alike some do not get the tokens of one alone")
    prompt = prompt_of(opened.config, sizes.prompt)
    for _ in range(sizes.rounds + 1):
        sequence = model.sequence()
        start = time.perf_counter()
        model.step([(sequence, prompt, native.Sampler(temperature=0.0), "none")])
        result.prefill.append(len(prompt) / (time.perf_counter() - start))
        sequence.close()
    del result.prefill[0]
    model.profile(True)
    decoding(native, model, 1, Sizes(sizes.decode, sizes.prompt, 1))
    seconds = model.profile(False)
    result.shares = {work: s / sum(seconds.values()) for work, s in seconds.items()}


def prompt_of(config: dict[str, Any], n_tok: int) -> NDArray[np.int32]:
    return np.random.default_rng(1).integers(0, config["vocab_size"], n_tok).astype(np.int32)


def decoding(native: Any, model: Any, batch: int, sizes: Sizes) -> tuple[list[float], list[list[int]]]:
    """Tokens a second of each round, and what each sequence was given in the last. A first round is not counted: it
    loads kernels and records graphs."""
    rates = []
    for round in range(sizes.rounds + 1):
        sampler = native.Sampler(temperature=0.0)
        first = model.sequence()
        last = [model.step([(first, np.arange(1, 9, dtype=np.int32), sampler, "none")])[0].token] * batch
        sequences = [first, *(first.fork(8) for _ in range(batch - 1))]
        given: list[list[int]] = [[] for _ in sequences]
        start = time.perf_counter()
        while len(given[0]) < sizes.decode:
            items = [(s, [token], sampler, "none") for s, token in zip(sequences, last, strict=True)]
            n_more = min(STEPS_AT_ONCE, sizes.decode - len(given[0])) - 1
            for row, r in zip(given, model.step(items, n_more), strict=True):
                row += [s.token for s in r.samples]
            last = [row[-1] for row in given]
        seconds = time.perf_counter() - start
        if round:
            rates.append(batch * len(given[0]) / seconds)
        for s in sequences:
            s.close()
    return rates, given


# ---------------------------------------------------------------------------------------------------- the table


def line(result: Result, stream: float, goals: bool) -> str:
    if result.error:
        return f"{result.name:<9} failed: {result.error[:300]}"
    one, many, prompt = (statistics.median(x) for x in (result.decode, result.decode_batch, result.prefill))
    share = one * result.step_bytes / stream / 1e9 if stream else 0.0
    goal = GOALS.get(result.name) if goals else None
    mark = f" (goal {goal}: {'met' if one >= goal else 'MISSED'})" if goal else ""
    spread = (max(result.decode) - min(result.decode)) / one
    works = ", ".join(f"{work} {s:.0%}" for work, s in result.shares.items())
    parts = [
        f"{result.name:<9}{one:>8.1f} ±{spread:.0%} {share:>6.1%}{mark}",
        f"x{BATCH} {many:.0f} ({many / one:.2f}x)",
        f"prompt {prompt:.0f} = {prompt * result.prompt_flops / 1e12:.0f} TFLOP/s",
        works,
        f"open {result.seconds_to_open:.1f} s",
        result.tokens,
    ]
    return "; ".join(parts)


def parse_case(text: str) -> tuple[str, str, int]:
    """ "8b/q4-64" or "1b/f16"."""
    shape, _, kind = text.partition("/")
    format, _, group = kind.partition("-")
    if shape not in SHAPES or not format or (group and not group.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected SHAPE/FORMAT or SHAPE/FORMAT-GROUP, such as 8b/q4-64")
    return shape, format, int(group or 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure whole models on a CUDA device.")
    parser.add_argument("--cases", nargs="+", type=parse_case, default=CASES, metavar="SHAPE/FORMAT-GROUP")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--decode", type=int, default=128, help="tokens of a round (default 128)")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens (default 2048)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150, help="begin no model after this (default 150)")
    parser.add_argument("--json", type=Path, help="where the samples go")
    parser.add_argument("--title", default="", help="a word about this run, for the table")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    native = load_native().cuda
    try:
        library = native.library_path()
        device = native.devices(library)[0]
        stream = native.read_bandwidth(library, 0, 1 << 30 if not native.build(library)["emulated"] else 1 << 12)
    except DeviceError as error:
        print(f"benchmarks.gpu_models: {error}")
        return 2
    print(
        f"models{arguments.title and ', ' + arguments.title}: tok/s, share of {stream:.0f} GB/s; time of a step; tokens"
    )
    results = []
    for i, case in enumerate(arguments.cases):
        if time.monotonic() > end:
            print(f"out of time: {len(arguments.cases) - i} models were left out")
            break
        results.append(measure(case, arguments.device, Sizes(arguments.decode, arguments.prompt, arguments.rounds)))
        print(line(results[-1], stream, "H100" in device["name"]), flush=True)
        if arguments.json:
            records = {"device": device, "gb_per_s": stream, "models": [asdict(r) for r in results]}
            arguments.json.write_text(json.dumps(records, indent=1))
    return 1 if len(results) < len(arguments.cases) or any(r.error for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
