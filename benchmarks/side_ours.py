"""pyllama's side of a comparison: the engine through its extension, one call per step, as `LLM` makes them.

Every step samples greedily inside the call, as in use; which token comes next is fixed beforehand, so that both sides
read the same. `compare.py` asks through workers.py; nothing here knows the other side.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import resident_bytes
from benchmarks.rows import Work, tokens_for

BATCH = 512
MAX_CONTEXT = 8192  # pages are taken when they are needed
_PROBE_S = 0.5
_SETTLE_S = 20.0  # enough for any model: its file lies as conversion, or some openings, leave it
_AT_ONCE_S = 0.0005  # the clock comes back within one to three milliseconds


class UnavailableError(Exception):
    """This build does not have what a row needs."""


class Ours:
    """A model folder in this process."""

    settings = ("default",)

    def __init__(self, path: str, threads: int, kv_dtype: str = "f16") -> None:
        from pyllama import _C
        from pyllama.open import load_folder

        self._native: Any = _C
        self._opened: Any = _without_tokenizer(Path(path), load_folder)
        options: dict[str, Any] = {"threads": threads, "max_batch_tok": BATCH}
        if kv_dtype != "f16":
            options["kv_dtype"] = kv_dtype
        try:
            self._model = _C.Model(self._opened.native_config(MAX_CONTEXT), self._opened.weights, **options)
        except TypeError as error:
            raise UnavailableError(f"this build has no cache of type {kv_dtype}") from error
        self._kv_dtype = kv_dtype
        self._sampler = _C.Sampler(temperature=0.0)
        self._vocab_size = int(self._opened.config["vocab_size"])
        self._held: tuple[tuple[int, int], list[Any]] = ((0, 0), [])  # (depth, parallel) and sequences that deep

    def info(self) -> dict[str, Any]:
        """What the run is made of, with the bytes and multiply-adds that it cannot do without."""
        config, weights = self._opened.config, self._opened.weights
        head = weights.get("output") or weights["tok_embeddings"]
        layers = {name: w for name, w in weights.items() if name.startswith("layers.")}
        numbers_per_tok = 2 * int(config["n_layers"]) * int(config["n_kv_heads"]) * int(config["head_dim"])
        bytes_per_32 = {"f16": 64, "q8": 34}[self._kv_dtype]  # q8: 32 codes and an f16 scale
        build = self._native.build_info()
        return {
            "engine": "pyllama",
            "version": build.get("version"),
            "build": build,
            "isa": self._model.isa,
            "threads": self._model.threads,
            "kv_dtype": self._kv_dtype,
            "weight_bytes": sum(w.nbytes for w in layers.values()) + head.nbytes,
            "cache_bytes_per_tok": numbers_per_tok * bytes_per_32 // 32,
            "layer_macs": sum(int(np.prod(w.shape)) for w in layers.values() if len(w.shape) == 2),
            "head_macs": int(np.prod(head.shape)),
            "n_layers": int(config["n_layers"]),
        }

    def time(self, setting: str, work: Work) -> float:
        """Seconds of the work."""
        timed: dict[str, Callable[[Work], float]] = {
            "decode": self._decode,
            "prefill": self._prefill,
            "step": self._step,
            "matmuls": self._matmuls,
            "python": self._python,
            "python-stream": self._python,
            "python-warm": self._python,
        }
        return timed[work.kind](work)

    def _decode(self, work: Work) -> float:
        sequences = self._sequences(work)
        rows = [np.array([t], np.int32) for t in tokens_for(self._vocab_size, work.n)]
        steps = [[(s, row, self._sampler, "none") for s in sequences] for row in rows]
        step = self._model.step
        start = time.perf_counter()
        for items in steps:
            step(items)
        return time.perf_counter() - start

    def _prefill(self, work: Work) -> float:
        (sequence,) = self._sequences(work)
        tokens = tokens_for(self._vocab_size, work.n)
        start = time.perf_counter()
        self._feed(sequence, tokens, self._sampler)
        return time.perf_counter() - start

    def _step(self, work: Work) -> float:
        (sequence,) = self._sequences(work)
        item = (sequence, np.array(tokens_for(self._vocab_size, work.n), np.int32), None, "all")
        seconds = 0.0
        for _ in range(work.repeat):
            sequence.truncate(work.depth)
            start = time.perf_counter()
            self._model.step([item])
            seconds += time.perf_counter() - start
        return seconds / work.repeat

    def _matmuls(self, work: Work) -> float:
        """Of a prompt's seconds those that inside the layers' products."""
        self._model.profile(True)
        try:
            self._prefill(work)
        finally:
            found = self._model.profile(False)
        return float(found["products"])

    def _python(self, work: Work) -> float:
        """Seconds outside of the engine for each token: the median between two calls, times their number."""
        from pyllama import LLM
        from pyllama.scheduler import Scheduler

        llm = LLM(self._opened.path, threads=self._model.threads)
        stopwatch = _Stopwatch(llm._model, replay=work.kind == "python-warm")
        llm._scheduler = Scheduler(stopwatch)
        prompt, options = tokens_for(self._vocab_size, 8), {"max_tokens": work.n, "temperature": 0, "ignore_eos": True}
        if work.kind == "python-stream":
            n_tok = sum(1 for _ in llm.stream(prompt, **options))
        else:
            n_tok = len(llm.generate(prompt, **options).token_ids)
        llm.close()
        gaps = stopwatch.gaps()
        return statistics.median(gaps) * len(gaps) / (n_tok - 1)

    def _sequences(self, work: Work) -> list[Any]:
        """Sequences of `depth` tokens; the last ones again if they fit."""
        wanted = (work.depth, work.parallel)
        if self._held[0] != wanted:
            for sequence in self._held[1]:
                sequence.close()
            made = [self._model.sequence() for _ in range(work.parallel)]
            for sequence in made:
                self._feed(sequence, tokens_for(self._vocab_size, work.depth), None)
            self._held = (wanted, made)
        for sequence in self._held[1]:
            sequence.truncate(work.depth)
        return self._held[1]

    def _feed(self, sequence: Any, tokens: list[int], sampler: Any) -> None:
        for at in range(0, len(tokens), BATCH):
            last = at + BATCH >= len(tokens)
            part = np.array(tokens[at : at + BATCH], np.int32)
            self._model.step([(sequence, part, sampler if last else None, "none")])

    def logits(self, setting: str, tokens: list[int]) -> list[float]:
        """The logits after the last of at most BATCH tokens."""
        sequence = self._model.sequence()
        result: Any
        (result,) = self._model.step([(sequence, np.array(tokens, np.int32), None, "last")])
        sequence.close()
        return [float(x) for x in result.logits[0]]

    def probe(self, what: str) -> float:
        """1e9 bytes or operations per second that the machine reaches now."""
        if what == "read":
            return float(self._native.read_bandwidth(self._model.threads, _PROBE_S))
        if what == "weights":  # the same, of the model's own memory
            return float(self._native.read_bandwidth(self._model.threads, _PROBE_S, self._opened.step_weights))
        if (
            what == "int8 own"
        ):  # tiles where they are used, and before the clock, which fell under the work, has come back
            return float(self._native.int8_peak(self._model.threads, _AT_ONCE_S, self._model.isa))
        isa = "avx512vnni" if self._model.isa == "amx" else self._model.isa  # the goals mean the vector units' peak
        return float(self._native.int8_peak(self._model.threads, _PROBE_S, isa))


def _without_tokenizer(path: Path, load_folder: Callable[..., Any]) -> Any:
    """Opens a folder even if it has no tokenizer, which a random one lacks."""
    from pyllama.common.model_folder import read_model_folder
    from pyllama.open import OpenedModel, native_weight, settle

    if any(path.glob("tokenizer*")):
        return load_folder(path, settle_s=_SETTLE_S)
    folder = read_model_folder(path)
    weights = {name: native_weight(tensor.spec, tensor.payload()) for name, tensor in folder.tensors.items()}
    settle(folder, _SETTLE_S)
    return OpenedModel(path, folder.config, weights, None, None, {})


class _Stopwatch:
    """A model that notes when its calls begin and end.

    `replay`: a call that is like the one before gives what that gave, without running the model: what is between the
    calls then runs from warm caches, which the weights would otherwise have swept.
    """

    def __init__(self, model: Any, replay: bool) -> None:
        self._model = model
        self._replay = replay
        self._last: Any = None
        self._like: Any = None  # what it was asked for: number of tokens, further steps
        self._begun: list[float] = []
        self._ended: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def step(self, items: Any, n_more: int) -> Any:
        self._begun.append(time.perf_counter())
        results = self._last
        if not self._replay or self._like != (len(items[0][1]), n_more):
            results = self._last = self._model.step(items, n_more)
            self._like = (len(items[0][1]), n_more)
        self._ended.append(time.perf_counter())
        return results

    def gaps(self) -> list[float]:
        return [begun - ended for begun, ended in zip(self._begun[1:], self._ended[:-1], strict=True)]


def start(path: str, threads: int) -> dict[str, float]:
    """From `LLM()` to the first token, imports done: seconds, and bytes resident beyond the mapped file."""
    for name in ("chat_template", "tokenizer", "tokenizer.hf", "tokenizer.spm"):
        importlib.import_module(f"pyllama.{name}")
    from pyllama import LLM, SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0)
    before = resident_bytes()
    began = time.perf_counter()
    llm = LLM(path, threads=threads)
    llm.generate([1], params)
    seconds = time.perf_counter() - began
    after = resident_bytes()
    return {"seconds": seconds, "extra_bytes": after["anonymous"], "before_bytes": before["anonymous"]}
