"""The two sides of a comparison, each in a process of its own, doing what the other end of a pipe asks for.

One JSON object per line: {"do": "decode" | "prefill" | "logits" | "probe", ...} in, an object out. While one side works
the other one waits in a read, so neither side's threads disturb the other's. `compare.py` is the other end.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

MAX_CONTEXT = 4096
BATCH = 512


class Side(Protocol):
    """What both engines can do. Every method leaves an empty context behind."""

    settings: list[str]

    def info(self) -> dict[str, Any]: ...

    def decode(self, setting: str, tokens: list[int]) -> float:
        """Feeds the tokens one by one, head included; seconds."""
        ...

    def prefill(self, setting: str, tokens: list[int]) -> float:
        """Feeds the tokens in batches of at most BATCH, the head for the last one only; seconds."""
        ...

    def logits(self, setting: str, tokens: list[int]) -> list[float]:
        """The logits after the last token."""
        ...

    def probe(self) -> dict[str, float]: ...


class Ours:
    """pyllama through its extension: one call per step, and logits brought to Python as a user would have them."""

    def __init__(self, path: str, threads: int) -> None:
        from pyllama import _C
        from pyllama.open import open_model

        self._native: Any = _C
        opened: Any = open_model(path)
        self._model = _C.Model(opened.native_config(MAX_CONTEXT), opened.weights, threads=threads, max_batch_tok=BATCH)
        self._threads = threads
        self._weights = opened.weights
        self.settings = ["default"]

    def info(self) -> dict[str, Any]:
        per_token = sum(w.nbytes for name, w in self._weights.items() if self._is_read_per_token(name))
        macs = sum(int(np.prod(w.shape)) for name, w in self._weights.items() if self._is_multiplied(name))
        build = self._native.build_info()
        return {
            "engine": "pyllama",
            "version": build.get("version"),
            "build": build,
            "isa": self._model.isa,
            "threads": self._model.threads,
            "read_bytes_per_token": per_token,
            "macs_per_token": macs,
        }

    def _is_multiplied(self, name: str) -> bool:
        return len(self._weights[name].shape) == 2 and (name != "tok_embeddings" or "output" not in self._weights)

    def _is_read_per_token(self, name: str) -> bool:
        return self._is_multiplied(name) or len(self._weights[name].shape) == 1

    def decode(self, setting: str, tokens: list[int]) -> float:
        sequence = self._model.sequence()
        step = self._model.step
        rows = [np.array([t], np.int32) for t in tokens]
        start = time.perf_counter()
        for row in rows:
            step([(sequence, row, None, "last")])
        seconds = time.perf_counter() - start
        sequence.close()
        return seconds

    def prefill(self, setting: str, tokens: list[int]) -> float:
        sequence = self._model.sequence()
        start = time.perf_counter()
        self._feed(sequence, tokens)
        seconds = time.perf_counter() - start
        sequence.close()
        return seconds

    def logits(self, setting: str, tokens: list[int]) -> list[float]:
        sequence = self._model.sequence()
        found = self._feed(sequence, tokens)[0].tolist()
        sequence.close()
        return found

    def _feed(self, sequence: Any, tokens: list[int]) -> Any:
        result = None
        for at in range(0, len(tokens), BATCH):
            wanted = "last" if at + BATCH >= len(tokens) else "none"
            (result,) = self._model.step([(sequence, np.array(tokens[at : at + BATCH], np.int32), None, wanted)])
        return result.logits if result else None

    def probe(self) -> dict[str, float]:
        found = {"read_gb_per_s": self._native.read_bandwidth(self._threads, 0.5)}
        peak: Callable[..., float] | None = getattr(self._native, "int8_peak", None)
        if peak is not None:
            found["int8_gop_per_s"] = peak(self._threads, 0.3, self._model.isa)
        return found


class LlamaCpp:
    """llama.cpp through the C functions of llama-cpp-python; its Python classes are not involved in what is timed."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._version = llama_cpp.__version__
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not open {path}")
        self._contexts = {
            "flash-attention": self._context(threads, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED),
            "no-flash-attention": self._context(threads, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED),
        }
        self._threads = threads
        self.settings = list(self._contexts)

    def _context(self, threads: int, flash: int) -> Any:
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = MAX_CONTEXT
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = flash
        parameters.no_perf = True
        context = self._lib.llama_init_from_model(self._model, parameters)
        if not context:
            raise RuntimeError("llama.cpp makes no context")
        return context

    def info(self) -> dict[str, Any]:
        return {
            "engine": "llama-cpp-python",
            "version": self._version,
            "build": self._lib.llama_print_system_info().decode(),
            "threads": self._threads,
            "model_bytes": self._lib.llama_model_size(self._model),
        }

    def _decode(self, context: Any, tokens: Any, count: int) -> None:
        batch = self._lib.llama_batch_get_one(tokens, count)
        status = self._lib.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: status {status}")

    def _empty(self, context: Any) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)

    def decode(self, setting: str, tokens: list[int]) -> float:
        context = self._contexts[setting]
        self._empty(context)
        rows = [(ctypes.c_int32 * 1)(t) for t in tokens]
        start = time.perf_counter()
        for row in rows:
            self._decode(context, row, 1)
            self._lib.llama_synchronize(context)
        seconds = time.perf_counter() - start
        self._empty(context)
        return seconds

    def prefill(self, setting: str, tokens: list[int]) -> float:
        context = self._contexts[setting]
        self._empty(context)
        start = time.perf_counter()
        self._feed(context, tokens)
        seconds = time.perf_counter() - start
        self._empty(context)
        return seconds

    def logits(self, setting: str, tokens: list[int]) -> list[float]:
        context = self._contexts[setting]
        self._empty(context)
        self._feed(context, tokens)
        size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        found = [float(x) for x in self._lib.llama_get_logits_ith(context, -1)[:size]]
        self._empty(context)
        return found

    def _feed(self, context: Any, tokens: list[int]) -> None:
        for at in range(0, len(tokens), BATCH):
            part = tokens[at : at + BATCH]
            self._decode(context, (ctypes.c_int32 * len(part))(*part), len(part))
        self._lib.llama_synchronize(context)

    def probe(self) -> dict[str, float]:
        return {}


SIDES: dict[str, Callable[[str, int], Side]] = {"ours": Ours, "peer": LlamaCpp}


def serve(side: Side, requests: Any, replies: Any) -> None:
    """Answers requests until the pipe closes."""

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    reply({"info": side.info(), "settings": side.settings})
    for line in requests:
        request = json.loads(line)
        what = request["do"]
        if what == "probe":
            reply(side.probe())
        elif what == "logits":
            reply({"logits": side.logits(request["setting"], request["tokens"])})
        else:
            timed = {"decode": side.decode, "prefill": side.prefill}[what]
            reply({"seconds": timed(request["setting"], request["tokens"])})


def main() -> None:
    parser = argparse.ArgumentParser(description="one side of compare.py; started by it")
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    # Whatever a library prints on stdout must not end up between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(SIDES[arguments.side](arguments.model, arguments.threads), sys.stdin, replies)


if __name__ == "__main__":
    main()
