"""`pyllama bench`: tokens per second in prompts and in decoding, of a model or of a random one of known shape.

Tests and JSON fields are llama-bench's, so that results stand side by side. Beside tokens per second stand the bytes
that were read and the operations that were done per second, as far as the work cannot do without them, and their shares
of what the machine reached in the same run: of its read bandwidth and of its int8 peak. `--profile`
adds where the time of the steps goes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .options import UsageError, add_kv_dtype, add_placement, integer, positive
from .terminal import json_text, safe

if TYPE_CHECKING:
    from ..placement import Placement

_PROBE_S = 0.4  # seconds of each measurement of the machine
_N_CTX = 8192


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench", help="measure tokens per second", description="Measure tokens per second. Lists are comma-separated."
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help='folder, .gguf file or "demo" (default)')
    parser.add_argument(
        "-p", "--n-prompt", type=counts, default=[512], metavar="N", help="prompt tokens; 0 for no test"
    )
    parser.add_argument(
        "-n", "--n-gen", type=counts, default=[128], metavar="N", help="tokens to decode; 0 for no test"
    )
    parser.add_argument("-d", "--n-depth", type=counts, default=[0], metavar="N", help="tokens in the cache before")
    parser.add_argument("-r", "--repetitions", type=positive, default=5, metavar="N")
    parser.add_argument(
        "-t", "--threads", type=counts, default=[0], metavar="N", help="0: one per physical core allowed"
    )
    parser.add_argument("-b", "--batch-size", type=positive, default=512, metavar="N", help="prompt tokens per step")
    parser.add_argument("--parallel", type=positive, default=1, metavar="N", help="decode N sequences at once")
    add_kv_dtype(parser)
    add_placement(parser)
    parser.add_argument(
        "--profile", action="store_true", help="also tell where the time of a step goes, by one more run"
    )
    parser.add_argument("--predict", action="store_true", help="also tell what `pyllama plan` would have predicted")
    parser.add_argument("--synthetic", metavar="SHAPE", help="a random model: 135m, 1b, 7b, 8b or tiny")
    parser.add_argument("--format", metavar="FORMAT", help="with --synthetic: the weights' format (default q4)")
    parser.add_argument("--group-size", type=int, metavar="N", help="with --synthetic: 32 (default), 64 or 128")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    parser.add_argument("--json", action="store_const", const="json", dest="output", help="the same as -o json")
    parser.set_defaults(run=run)


def counts(text: str) -> list[int]:
    """Comma-separated integers, 0 or more."""
    return [integer(part, 0) for part in text.split(",")]


@dataclass(frozen=True)
class Test:
    """One row: a prompt of `n_prompt` tokens or the decoding of `n_gen`, after `n_depth` tokens."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def n_tok(self) -> int:
        """Tokens that the context must hold."""
        return self.n_depth + max(self.n_prompt, self.n_gen)

    def n_sequences(self, parallel: int) -> int:
        """A prompt is read alone."""
        return parallel if self.n_gen else 1

    @property
    def name(self) -> str:
        """llama-bench's name of it."""
        work = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{work} @ d{self.n_depth}" if self.n_depth else work


def run(arguments: argparse.Namespace) -> int:
    tests = [Test(n, 0, d) for d in arguments.n_depth for n in arguments.n_prompt if n]
    tests += [Test(0, n, d) for d in arguments.n_depth for n in arguments.n_gen if n]
    if not tests:
        raise UsageError("nothing to measure: both -p and -n are 0")
    opened, label = _open(arguments)
    longest = int(opened.config["max_seq_len"])
    for test in tests:  # before any of them takes its time
        if test.n_tok > longest:
            raise ValueError(f"{test.name} needs a context of {test.n_tok} tokens, the model has {longest}")
    records = []
    placement = _placement(opened, tests, arguments)
    for threads in arguments.threads:
        bench = Bench(opened, label, threads, arguments.batch_size, arguments.parallel, arguments.kv_dtype, placement)
        for test in tests:
            print(f"{test.name}: {arguments.repetitions} runs …", file=sys.stderr, flush=True)
            record = bench.measure(test, arguments.repetitions, arguments.profile)
            if arguments.predict and placement.gpu_layers == 0 and arguments.parallel == 1:
                record["predicted_ts"] = _predicted(opened, test, threads, arguments)
            records.append(record)
        del bench  # a device may not hold the next one beside it
    print(json_text(records, indent=2) if arguments.output == "json" else safe(markdown(records)))
    return 0


def _placement(opened: Any, tests: list[Test], arguments: argparse.Namespace) -> Placement:
    """With room for the test that takes most, and for the largest step."""
    from ..placement import Placement
    from ..sizes import PAGE_TOK

    most = max(tests, key=lambda test: -(-test.n_tok // PAGE_TOK) * test.n_sequences(arguments.parallel))
    return Placement(
        opened,
        most.n_tok,
        arguments.kv_dtype,
        arguments.device,
        arguments.gpu_layers,
        n_seqs=most.n_sequences(arguments.parallel),
        max_batch_tok=_step_rows(arguments.batch_size, arguments.parallel),
    )


def _step_rows(n_batch: int, parallel: int) -> int:
    """Of the largest step."""
    return max(n_batch, parallel)


def _predicted(opened: Any, test: Test, threads: int, arguments: argparse.Namespace) -> float:
    """Tokens per second of the test as speeds.py predicts them from a layer and the memory."""
    from ..speeds import predict

    found = predict(
        opened.config,
        opened.specs,
        n_prompt=test.n_prompt or 1,
        n_depth=test.n_depth if test.n_prompt else 0,
        kv_dtype=arguments.kv_dtype,
        threads=threads,
        n_batch=arguments.batch_size,
    )
    return found.prompt_tok_per_s if test.n_prompt else found.decode_tok_per_s(test.n_depth + test.n_gen // 2)


def _open(arguments: argparse.Namespace) -> tuple[Any, str]:
    from ..common.formats import FORMATS
    from ..open import open_model
    from ..synthetic import SHAPES, synthetic_model

    if arguments.synthetic is None:
        if arguments.format or arguments.group_size is not None:
            raise UsageError("--format and --group-size go with --synthetic; a model file has its own")
        opened = open_model(arguments.model or "demo")
        return opened, (opened.config.get("source") or {}).get("name") or opened.path.name
    if arguments.model is not None:
        raise UsageError("name a MODEL or give --synthetic, not both")
    format = arguments.format or "q4"
    if arguments.synthetic not in SHAPES or format not in FORMATS:
        raise UsageError(f"--synthetic takes {' '.join(SHAPES)}, --format {' '.join(FORMATS)}")
    group = 32 if arguments.group_size is None else arguments.group_size
    if group not in (32, 64, 128):
        raise UsageError(f"--group-size {group}: expected 32, 64 or 128")
    if not FORMATS[format].quantized and arguments.group_size is not None:
        raise UsageError(f"--group-size goes with quantized formats, {format} has no groups")
    print(f"making a random {arguments.synthetic} model in {format} …", file=sys.stderr, flush=True)
    opened = synthetic_model(arguments.synthetic, format, group, max_seq_len=_N_CTX)
    return opened, f"{arguments.synthetic} {format}" + (f" g{group}" if FORMATS[format].quantized else "")


class Bench:
    """A model and a number of threads, ready to run tests."""

    def __init__(
        self,
        opened: Any,
        label: str,
        threads: int,
        n_batch: int,
        parallel: int,
        kv_dtype: str,
        placement: Placement,
    ) -> None:
        from ..native import load_native

        self._native = load_native()
        self._config = opened.config
        self._weights = opened.weights
        self._step_bytes = opened.step_bytes
        self._label = label
        self._parallel = parallel
        config = opened.native_config(int(opened.config["max_seq_len"]))
        rows = _step_rows(n_batch, parallel)
        options: dict[str, Any] = {"threads": threads, "max_batch_tok": rows, "kv_dtype": kv_dtype}
        self._model = self._native.Model(config, opened.weights, **options, **placement.options)
        self._placement = placement
        self._n_batch = n_batch
        self._kv_dtype = kv_dtype
        self._sampler = self._native.Sampler(temperature=0.0)
        self._floors = self._measure_floors()

    def _measure_floors(self) -> dict[str, float]:
        """What the machine reaches; of a model that is on two devices neither's numbers say much."""
        if self._placement.gpu_layers == 0:
            threads = self._model.threads
            return {
                "read_gb_per_s": float(self._native.read_bandwidth(threads, _PROBE_S)),
                "int8_gop_per_s": float(self._native.int8_peak(threads, _PROBE_S, self._model.isa)),
            }
        found = self._placement.read_bandwidth() if self._placement.device_share == 1 else None
        return {} if found is None else {"read_gb_per_s": found}

    def measure(self, test: Test, repetitions: int, profile: bool = False) -> dict[str, Any]:
        """One record, after one run to warm up. The test must fit in the context."""
        with self._sequences(test) as sequences:
            samples = [self._run(sequences, test) for _ in range(repetitions + 1)][1:]
            time_shares = {"time_shares": self._time_shares(sequences, test)} if profile else {}
        mean = statistics.fmean(samples)
        record = {
            "model": self._label,
            "backend": self._placement.backend,
            "device": self._placement.device,
            "n_gpu_layers": self._placement.gpu_layers,
            "isa": self._model.isa,
            "n_threads": self._model.threads,
            "n_batch": self._n_batch,
            "kv_dtype": self._kv_dtype,
            "n_parallel": self._parallel,
            "n_prompt": test.n_prompt,
            "n_gen": test.n_gen,
            "n_depth": test.n_depth,
            "test": test.name,
            "avg_ts": mean,
            "stddev_ts": statistics.stdev(samples) if len(samples) > 1 else 0.0,
            "samples_ts": samples,
            "model_size": sum(weight.nbytes for weight in self._weights.values()),
            "model_n_params": sum(_count(weight.shape) for weight in self._weights.values()),
        }
        return record | self._floors | self._rates(test, mean) | time_shares

    @contextmanager
    def _sequences(self, test: Test) -> Iterator[list[Any]]:
        """With what lies before the test in the cache: that is computed once."""
        sequences = [self._model.sequence() for _ in range(test.n_sequences(self._parallel))]
        try:
            for sequence in sequences:
                self._feed(sequence, test.n_depth, sample=False)
            yield sequences
        finally:
            for sequence in sequences:
                sequence.close()

    def _run(self, sequences: list[Any], test: Test) -> float:
        """Tokens per second of one run."""
        start = time.perf_counter()
        n_tok = self._prompt(sequences[0], test) if test.n_prompt else self._decode(sequences, test)
        seconds = time.perf_counter() - start
        for sequence in sequences:
            sequence.truncate(test.n_depth)
        return n_tok / seconds

    def _time_shares(self, sequences: list[Any], test: Test) -> dict[str, float]:
        """What part of the steps' time a run spends on what: "products" of the layers, "attention", "head", "rest"."""
        self._model.profile(True)
        try:
            self._run(sequences, test)
        finally:
            seconds = self._model.profile(False)
        return {work: s / sum(seconds.values()) for work, s in seconds.items()}

    def _prompt(self, sequence: Any, test: Test) -> int:
        self._feed(sequence, test.n_prompt, sample=True)
        return test.n_prompt

    def _decode(self, sequences: list[Any], test: Test) -> int:
        tokens = [1 + i for i in range(len(sequences))]
        for _ in range(test.n_gen):
            items = [(s, [token], self._sampler, "none") for s, token in zip(sequences, tokens, strict=True)]
            tokens = [result.token for result in self._model.step(items)]
        return test.n_gen * len(sequences)

    def _feed(self, sequence: Any, n_tok: int, *, sample: bool) -> None:
        vocab_size = self._config["vocab_size"]
        for start in range(0, n_tok, self._n_batch):
            end = min(start + self._n_batch, n_tok)
            tokens = [(7919 * i + 1) % vocab_size for i in range(start, end)]
            sampler = self._sampler if sample and end == n_tok else None
            self._model.step([(sequence, tokens, sampler, "none")])

    def _rates(self, test: Test, tok_per_s: float) -> dict[str, float]:
        """Bytes and operations per second that the test cannot do without, and their shares of the machine's best."""
        n = test.n_prompt or test.n_gen
        runs_per_s = tok_per_s / (n * test.n_sequences(self._parallel))
        n_steps = -(-n // self._n_batch) if test.n_prompt else n
        # Attention of a step reads what was cached before it, and its own tokens.
        cached = sum(test.n_depth + n * (step + 1) / n_steps for step in range(n_steps))
        cache_bytes = test.n_sequences(self._parallel) * cached * self._model.page_bytes / self._model.PAGE_TOK
        n_bytes = n_steps * self._step_bytes + cache_bytes
        found = {"gb_per_s": runs_per_s * n_bytes / 1e9}
        if "read_gb_per_s" in self._floors:
            found["bandwidth_share"] = found["gb_per_s"] / self._floors["read_gb_per_s"]
        int8 = all(weight.format.startswith("q") for weight in self._layer_matrices())
        if int8 and "int8_gop_per_s" in self._floors:
            found["gop_per_s"] = tok_per_s * self._ops_per_tok() / 1e9
            found["peak_share"] = found["gop_per_s"] / self._floors["int8_gop_per_s"]
        return found

    def _ops_per_tok(self) -> int:
        """Multiplications and additions in the layers' matrices; the head runs once per prompt and is left out."""
        return 2 * sum(_count(weight.shape) for weight in self._layer_matrices())

    def _layer_matrices(self) -> list[Any]:
        return [w for name, w in self._weights.items() if name.startswith("layers.") and len(w.shape) == 2]


def _count(shape: Sequence[int]) -> int:
    n = 1
    for side in shape:
        n *= side
    return n


def _runs_on(record: dict[str, Any]) -> str:
    """The instruction set, or the device, or both with the number of layers there."""
    isa, device, n = str(record["isa"]), str(record["device"]), record["n_gpu_layers"]
    return {"CPU": isa, "CUDA": device}.get(record["backend"], f"{isa} + {device} ({n} layers)")


def markdown(records: list[dict[str, Any]]) -> str:
    """The records as a table."""
    parts = list(records[0].get("time_shares", ()))
    lines = [
        "| model | size | params | threads | isa | test | tok/s | GB/s | GOP/s |" + "".join(f" {p} |" for p in parts),
        "|---|---:|---:|---:|---|---|---:|---:|---:|" + "---:|" * len(parts),
    ]
    for r in records:
        speed = f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}"
        test = r["test"] if r["kv_dtype"] == "f16" else f"{r['test']}, {r['kv_dtype']} cache"
        size, params = f"{r['model_size'] / 2**20:.1f} MiB", f"{r['model_n_params'] / 1e6:.1f} M"
        read = f"{r['gb_per_s']:.1f}"
        if "bandwidth_share" in r:
            read += f", {100 * r['bandwidth_share']:.0f} % of {r['read_gb_per_s']:.0f}"
        done = "–"
        if "predicted_ts" in r:
            speed += f", predicted {r['predicted_ts']:.2f}"
        if "gop_per_s" in r:
            done = f"{r['gop_per_s']:.0f}, {100 * r['peak_share']:.0f} % of {r['int8_gop_per_s']:.0f} ({r['isa']})"
        cells = [" ".join(r["model"].split()), size, params, r["n_threads"], _runs_on(r), test, speed, read, done]
        cells += [f"{100 * r['time_shares'][part]:.0f} %" for part in parts]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
