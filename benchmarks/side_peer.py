"""llama.cpp's side of a comparison: through the C functions of llama-cpp-python, whose Python is not in what is timed.

Settings of a context are tried here (flash attention); settings of a process (repacked weights, mapped files, huge
pages, pinned threads) are VARIANTS, each a process of its own, which compare.py chooses from.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.machine import resident_bytes
from benchmarks.rows import Work, tokens_for

BATCH = 512
_STEP_CTX = 1024  # contexts are made a multiple of this long, so that works of like depth share one

# Name -> (fields of llama_model_params, environment). The first is the library's default. Threads that wait by spinning
# (OMP_WAIT_POLICY=active) are not among them: they would go on while our side is timed.
VARIANTS: dict[str, tuple[dict[str, bool], dict[str, str]]] = {
    "repacked": ({}, {}),
    "repacked, huge pages": ({}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    "repacked, pinned": ({}, {"OMP_PROC_BIND": "true"}),
    "as in the file": ({"use_extra_bufts": False}, {}),
    "as in the file, read": ({"use_extra_bufts": False, "use_mmap": False}, {}),
}


class LlamaCpp:
    """A GGUF in this process."""

    settings = ("flash attention", "no flash attention")

    def __init__(self, path: str, threads: int, variant: str) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        for field, value in VARIANTS[variant][0].items():
            setattr(parameters, field, value)
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not open {path}")
        self._threads = threads
        self._vocab_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))
        self._contexts: dict[str, _Context] = {}

    def info(self) -> dict[str, Any]:
        return {
            "engine": "llama-cpp-python",
            "version": self._lib.__version__,
            "build": self._lib.llama_print_system_info().decode(),
            "threads": self._threads,
            "weight_bytes": self._lib.llama_model_size(self._model),
        }

    def time(self, setting: str, work: Work) -> float:
        """Seconds of the work."""
        context = self._context(setting, work.n_ctx, work.parallel)
        context.reach(work.depth, tokens_for(self._vocab_size, work.depth))
        tokens = tokens_for(self._vocab_size, work.n)
        timed: dict[str, Callable[[Work, list[int]], float]] = {
            "decode": context.decode,
            "prefill": context.prefill,
            "step": context.step,
        }
        return timed[work.kind](work, tokens)

    def logits(self, setting: str, tokens: list[int]) -> list[float]:
        """The logits after the last of at most BATCH tokens."""
        context = self._context(setting, len(tokens), 1)
        context.reach(0, [])
        context.feed(tokens)
        return [float(x) for x in self._lib.llama_get_logits_ith(context.handle, -1)[: self._vocab_size]]

    def probe(self, what: str) -> float:
        raise ValueError("only our side probes the machine")

    def _context(self, setting: str, n_ctx: int, parallel: int) -> _Context:
        """A context of the wanted size. Those of another size are freed: caches of deep contexts are large."""
        size = (-(-n_ctx // (_STEP_CTX * parallel)) * _STEP_CTX * parallel, parallel)
        for name in [name for name, made in self._contexts.items() if made.size != size]:
            self._contexts.pop(name).close()
        if setting not in self._contexts:
            flash = {
                "flash attention": self._lib.LLAMA_FLASH_ATTN_TYPE_ENABLED,
                "no flash attention": self._lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
            }[setting]
            self._contexts[setting] = _Context(self._lib, self._model, self._threads, size, flash)
        return self._contexts[setting]


class _Context:
    """A llama_context with `parallel` sequences, and how many tokens they hold."""

    def __init__(self, lib: Any, model: Any, threads: int, size: tuple[int, int], flash: int) -> None:
        self._lib = lib
        self.size = size
        self._parallel = size[1]
        parameters = lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = size
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = flash
        parameters.no_perf = True
        self.handle = lib.llama_init_from_model(model, parameters)
        if not self.handle:
            raise RuntimeError("llama.cpp makes no context")
        self._memory = lib.llama_get_memory(self.handle)
        self._batch = lib.llama_batch_init(BATCH, 0, self._parallel)
        self._depth = 0

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self.handle)

    def reach(self, depth: int, tokens: list[int]) -> None:
        """Every sequence holds `depth` tokens afterwards, those that it held already kept."""
        if depth != self._depth:
            self._lib.llama_memory_clear(self._memory, True)
            for sequence in range(self._parallel):
                for at in range(0, depth, BATCH):
                    self._fill(tokens[at : at + BATCH], at, [sequence], wanted="last")
                    self._decode()
            self._depth = depth
        self._cut()

    def feed(self, tokens: list[int]) -> float:
        """Seconds of the steps; filling the batch, which is our Python, is not counted here or below."""
        seconds = 0.0
        for at in range(0, len(tokens), BATCH):
            self._fill(tokens[at : at + BATCH], self._depth + at, [0], wanted="last")
            seconds += self._timed_step()
        return seconds

    def decode(self, work: Work, tokens: list[int]) -> float:
        seconds = 0.0
        for i, token in enumerate(tokens):
            self._fill([token], self._depth + i, list(range(self._parallel)), wanted="all")
            seconds += self._timed_step()
        return seconds

    def prefill(self, work: Work, tokens: list[int]) -> float:
        return self.feed(tokens)

    def step(self, work: Work, tokens: list[int]) -> float:
        seconds = 0.0
        for _ in range(work.repeat):
            self._cut()
            self._fill(tokens, self._depth, [0], wanted="all")
            seconds += self._timed_step()
        return seconds / work.repeat

    def _timed_step(self) -> float:
        start = time.perf_counter()
        self._decode()
        self._lib.llama_synchronize(self.handle)
        return time.perf_counter() - start

    def _cut(self) -> None:
        for sequence in range(self._parallel):
            self._lib.llama_memory_seq_rm(self._memory, sequence, self._depth, -1)

    def _fill(self, tokens: Sequence[int], position: int, sequences: list[int], wanted: str) -> None:
        """The tokens at these positions, for each of the sequences."""
        batch, row = self._batch, 0
        for sequence in sequences:
            for i, token in enumerate(tokens):
                batch.token[row] = token
                batch.pos[row] = position + i
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = wanted == "all" or i == len(tokens) - 1
                row += 1
        batch.n_tokens = row

    def _decode(self) -> None:
        status = self._lib.llama_decode(self.handle, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: status {status}")


def start(path: str, threads: int, variant: str) -> dict[str, float]:
    """From opening the file to the first token, imports done: seconds, and bytes resident beyond the mapped file."""
    import llama_cpp  # noqa: F401

    before = resident_bytes()
    began = time.perf_counter()
    peer = LlamaCpp(path, threads, variant)
    logits = peer.logits(peer.settings[0], [1])
    seconds = time.perf_counter() - began
    after = resident_bytes()
    assert len(logits) > 1
    return {"seconds": seconds, "extra_bytes": after["anonymous"], "before_bytes": before["anonymous"]}
