"""Speed of the CUDA kernels on a device, one table and JSON: a part of `make gpu-check`.

Measures the memory's bandwidth, what a launch costs, the products of decoding (GB/s, share of the bandwidth) for the
shapes of real models, attention, and products and attention of prompts (TFLOP/s). Weights are random, made in device
memory by the entries of tests/cuda/timing_entries.cpp, which time replayed graphs by events; every launch of a round
reads another copy, together several times the second-level cache. A figure is the median of the rounds, its spread the
distance between the lower and upper quarter in percent of it. Whole models: gpu_models.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyllama.common.errors import DeviceError
from pyllama.common.formats import FORMATS
from pyllama.native import load_native
from pyllama.synthetic import SHAPES, Shape
from tests.cuda.entries import Entries, EntryError

# Format, columns of a scale.
KINDS = (("q4", 64), ("q4", 32), ("q4nl", 64), ("q8", 64), ("f16", 0))
MODELS = ("1b", "8b", "7b")
PROMPT_TOK = 2048
CACHE_COPIES = 4  # what a round reads, in second-level caches
F16 = 1  # Number::f16 of csrc/formats.h
FORMAT_NUMBERS = {name: number for number, name in enumerate(FORMATS)}
PARTS = ("qkv", "o", "gate/up", "down", "head")


@dataclass(frozen=True)
class Matrix:
    part: str
    rows: int
    columns: int
    times: int  # in a model

    @property
    def swiglu(self) -> bool:
        return self.part == "gate/up"


def matrices(shape: Shape) -> list[Matrix]:
    """The products of one step, stacked as the backend stacks them."""
    q_dim, kv_dim = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    layers = shape.n_layers
    return [
        Matrix("qkv", q_dim + 2 * kv_dim, shape.dim, layers),
        Matrix("o", shape.dim, q_dim, layers),
        Matrix("gate/up", 2 * shape.hidden_dim, shape.dim, layers),
        Matrix("down", shape.dim, shape.hidden_dim, layers),
        Matrix("head", shape.vocab_size, shape.dim, 1),
    ]


@dataclass
class Clock:
    """The entries, and the records of what they measured."""

    entries: Entries
    l2_bytes: int
    stop_at: float  # time.monotonic(); nothing is begun after
    rounds: int = 15
    least_launches: int = 16
    records: list[dict[str, Any]] = field(default_factory=list)
    n_left_out: int = 0

    def measure(self, name: str, run: Callable[[np.ndarray], float], **about: object) -> dict[str, Any] | None:
        """One record: run(seconds) fills the rounds' seconds and returns bytes that were read by one launch."""
        if time.monotonic() > self.stop_at:
            self.n_left_out += 1
            return None
        seconds = np.full(self.rounds, np.nan)
        record: dict[str, Any] = {"name": name, **about}
        self.records.append(record)
        try:
            n_bytes = run(seconds)
        except EntryError as error:
            record["error"] = str(error)
            return record
        low, median, high = (float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75))
        record |= {"seconds": median, "spread": (high - low) / median if median > 0 else 0.0, "bytes": n_bytes}
        record["gb_per_s"] = n_bytes / median / 1e9 if median > 0 else 0.0
        return record

    def copies(self, n_bytes: float) -> int:
        """How many of this size are together several times the cache."""
        return min(64, max(2, -(-CACHE_COPIES * self.l2_bytes // max(1, int(n_bytes)))))

    def launches(self, copies: int) -> int:
        """Whole turns over the copies."""
        return copies * max(1, -(-self.least_launches // copies))

    def linear(self, model: str, m: Matrix, kind: tuple[str, int], n_tok: int, early: bool) -> dict[str, Any] | None:
        format, group = kind
        bits = FORMATS[format].code_bits + (16 / group if group else 0)
        copies = self.copies(m.rows * m.columns * bits / 8)
        what = [FORMAT_NUMBERS[format], F16 if group else 0, 0, m.rows, m.columns, group, n_tok, m.swiglu, copies]
        what += [self.launches(copies) if n_tok <= 8 else 4, self.rounds]
        about = {"model": model, "part": m.part, "format": kind_name(kind), "n_tok": n_tok, "early": early}
        name = f"linear {model} {m.part} {kind_name(kind)} {n_tok}"
        record = self.measure(name, lambda s: self._call("time_linear", what, s, early), **about)
        if record and "seconds" in record:
            record["tflops"] = 2 * m.rows * m.columns * n_tok / record["seconds"] / 1e12
        return record

    def attend(self, model: str, q8: bool, n_spans: int, span_tok: int, keys: int) -> dict[str, Any] | None:
        shape = SHAPES[model]
        size = 2 * n_spans * keys * shape.n_kv_heads * shape.head_dim * (1 if q8 else 2)
        layers = self.copies(size)
        what = [q8, shape.n_kv_heads, shape.head_dim, shape.n_heads, n_spans, span_tok, keys, layers]
        what += [self.launches(layers) if span_tok <= 8 else 4, self.rounds]
        about = {"model": model, "cache": "q8" if q8 else "f16", "n_spans": n_spans, "n_tok": span_tok, "keys": keys}
        name = f"attend {model} {about['cache']} {n_spans}x{span_tok} {keys}"
        record = self.measure(name, lambda s: self._call("time_attend", what, s, True), **about)
        if record and "seconds" in record:
            seen = n_spans * span_tok * (keys - (span_tok - 1) / 2)
            record["tflops"] = 4 * shape.n_heads * shape.head_dim * seen / record["seconds"] / 1e12
        return record

    def simple(self, name: str, entry: str, what: list[int], n_bytes: float = 0.0, early: bool = True) -> Any:
        def run(seconds: np.ndarray) -> float:
            self.entries.call("allow_early", int(early))
            self.entries.call(entry, np.array([*what, self.rounds], np.int64), seconds)
            return n_bytes

        return self.measure(name, run)

    def _call(self, entry: str, what: list[Any], seconds: np.ndarray, early: bool) -> float:
        n_bytes = np.zeros(1, np.int64)
        self.entries.call("allow_early", int(early))
        try:
            self.entries.call(entry, np.array(what, np.int64), n_bytes, seconds)
        finally:
            self.entries.call("allow_early", 1)
        return float(n_bytes[0])


def kind_name(kind: tuple[str, int]) -> str:
    return f"{kind[0]}-{kind[1]}" if kind[1] else kind[0]


# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Work:
    """What is measured; tests take less."""

    models: tuple[str, ...] = MODELS
    kinds: tuple[tuple[str, int], ...] = KINDS
    batches: tuple[int, ...] = (1, 8)
    prompt_tok: int = PROMPT_TOK
    depths: tuple[int, ...] = (1024, 8192)
    stream_bytes: int = 4 << 30


class Report:
    """Measures section after section and tells each as soon as it is there."""

    def __init__(self, clock: Clock, work: Work, library: str, tell: Callable[[str], None] = print) -> None:
        self.clock, self.work, self.library, self.tell = clock, work, library, tell
        self.stream_gb_per_s = 0.0

    def run(self) -> None:
        for section in (self.memory, self.launch_costs, self.decoding, self.attention, self.prompts, self.early_starts):
            section()
        if self.clock.n_left_out:
            self.tell(f"out of time: {self.clock.n_left_out} measurements were left out")

    def memory(self) -> None:
        native, n_bytes = load_native().cuda, self.work.stream_bytes

        def read(seconds: np.ndarray) -> float:
            for i in range(len(seconds)):
                seconds[i] = n_bytes / (native.read_bandwidth(self.library, 0, n_bytes, 1) * 1e9)
            return n_bytes

        stream = self.clock.measure("read only", read)
        copy = self.clock.simple("copy", "time_copy", [n_bytes // 2], n_bytes)
        self.stream_gb_per_s = value(stream, "gb_per_s")
        rates = f"read {figure(stream, 'gb_per_s')}, copy (read and written) {figure(copy, 'gb_per_s')}"
        self.tell(f"memory, GB/s: {rates}")

    def launch_costs(self) -> None:
        texts = []
        for replayed, early in ((0, 0), (1, 0), (1, 1)):
            name = ("graph" if replayed else "direct") + (", early starts" if early else "")
            record = self.clock.simple(f"launch {name}", "time_nothing", [replayed, early, 256])
            texts.append(f"{name} {figure(record, 'seconds', 1e6)}")
        self.tell(f"an empty kernel after another, µs: {'; '.join(texts)}")
        for model in self.work.models:
            dim = SHAPES[model].dim
            record = self.clock.simple(f"norm {model}", "time_norm", [dim, 1, 64])
            self.tell(f"norm and rounding of {dim} columns, µs: {figure(record, 'seconds', 1e6)}")

    def decoding(self) -> None:
        parts = "".join(f"{part:>9}" for part in PARTS)
        self.tell("decoding: % of the read bandwidth for each product; ms of a step's products; tok/s of them alone")
        self.tell(f"{'model':<5}{'format':<8}{'tok':>4}{parts}{'ms':>9}{'tok/s':>8}")
        for model in self.work.models:
            for kind in self.work.kinds:
                for n_tok in self.work.batches:
                    self.tell(self.step(model, kind, n_tok, early=True))

    def step(self, model: str, kind: tuple[str, int], n_tok: int, early: bool) -> str:
        found = [(m, self.clock.linear(model, m, kind, n_tok, early)) for m in matrices(SHAPES[model])]
        shares = "".join(f"{self.share(record):>9}" for _, record in found)
        seconds = sum(m.times * value(record, "seconds") for m, record in found)
        whole = all(record and record.get("seconds") for _, record in found)
        self.clock.records.append(
            {"name": f"products {model} {kind_name(kind)} {n_tok}", "early": early, "seconds": seconds, "whole": whole}
        )
        total = f"{seconds * 1e3:>9.3f}{n_tok / seconds:>8.0f}" if whole else f"{'-':>9}{'-':>8}"
        return f"{model:<5}{kind_name(kind):<8}{n_tok:>4}{shares}{total}"

    def share(self, record: dict[str, Any] | None) -> str:
        if not record or "seconds" not in record:
            return "failed" if record else "-"
        record["share"] = record["gb_per_s"] / self.stream_gb_per_s if self.stream_gb_per_s else 0.0
        return f"{record['share']:.1%}"

    def attention(self) -> None:
        self.tell("attention of decoding: µs, GB/s of keys and values, % of the read bandwidth")
        for model in self.work.models:
            for q8 in (False, True):
                texts = []
                for keys in self.work.depths:
                    for n_spans in self.work.batches:
                        record = self.clock.attend(model, q8, n_spans, 1, keys)
                        rate = f"{figure(record, 'seconds', 1e6)} {self.share(record)}"
                        texts.append(f"{n_spans}x{keys}: {rate}")
                self.tell(f"{model:<5}{'q8' if q8 else 'f16':<4} {'; '.join(texts)}")

    def prompts(self) -> None:
        n_tok = self.work.prompt_tok
        self.tell(f"prompts of {n_tok} tokens, TFLOP/s: each product, all, attention (causal: half of the square)")
        for model in self.work.models:
            attend = self.clock.attend(model, False, 1, n_tok, n_tok)
            for kind in self.work.kinds:
                found = [(m, self.clock.linear(model, m, kind, n_tok, True)) for m in matrices(SHAPES[model])[:-1]]
                texts = [f"{m.part} {figure(record, 'tflops')}" for m, record in found]
                seconds = sum(m.times * value(record, "seconds") for m, record in found)
                flops = sum(2 * n_tok * m.rows * m.columns * m.times for m, record in found if value(record, "seconds"))
                texts.append(f"all {flops / seconds / 1e12:.0f}" if seconds else "all -")
                self.tell(f"{model:<5}{kind_name(kind):<8} {', '.join(texts)}, attention {figure(attend, 'tflops')}")

    def early_starts(self) -> None:
        self.tell("the same decoding without early starts")
        for model in self.work.models:
            self.tell(self.step(model, self.work.kinds[0], self.work.batches[0], early=False))


def value(record: dict[str, Any] | None, key: str) -> float:
    return float(record.get(key, 0.0)) if record else 0.0


def figure(record: dict[str, Any] | None, key: str, factor: float = 1.0) -> str:
    """ "123.4 ±1%", "failed" or "-" (not measured)."""
    if not record:
        return "-"
    if "seconds" not in record:
        return "failed"
    number = value(record, key) * factor
    digits = 0 if number >= 1000 else 1 if number >= 10 else 2
    spread = record["spread"]
    return f"{number:.{digits}f}" + (f" ±{spread:.0%}" if spread >= 0.03 else "")


def errors(records: Iterable[dict[str, Any]]) -> list[str]:
    return [f"{record['name']}: {record['error']}" for record in records if "error" in record]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the CUDA kernels on a device.")
    parser.add_argument("--entries", type=Path, required=True, help="library made by tests/cuda/compiling.py")
    parser.add_argument("--library", help="libpyllama_cuda.so (default: the one in the package)")
    parser.add_argument("--json", type=Path, help="where the records go")
    parser.add_argument("--seconds", type=float, default=150, help="begin nothing after this (default 150)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    arguments = parser.parse_args(argv)
    native = load_native().cuda
    try:
        library = arguments.library or native.library_path()
        device = native.devices(library)[0]
    except DeviceError as error:
        print(f"benchmarks.gpu: {error}")
        return 2
    clock = Clock(Entries(arguments.entries), device["l2_bytes"], time.monotonic() + arguments.seconds)
    try:
        Report(clock, Work(models=tuple(arguments.models)), library).run()
    finally:
        if arguments.json:
            arguments.json.write_text(json.dumps({"device": device, "records": clock.records}, indent=1))
    failed = errors(clock.records)
    for text in failed[:5]:
        print(f"failed: {text[:300]}")
    if len(failed) > 5:
        print(f"and {len(failed) - 5} more failures")
    return 1 if failed or clock.n_left_out else 0


if __name__ == "__main__":
    sys.exit(main())
