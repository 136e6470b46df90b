"""The rows of the comparison, as data: what is timed on which models, and what counts as good enough.

Kinds of rows. `against`: our tokens per second over the peer's. `itself`: one way of doing a thing over another way,
for each side (several tokens in one step against one). `absolute`: ours alone, in a unit of its own. `start`: seconds
to the first token, and the memory that it took. Nothing here runs; compare.py does, and judge.py says what it means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Work:
    """What a side is asked to time. All of it happens after `depth` tokens, which are not timed.

    decode   `n` steps of one token of each of `parallel` sequences
    prefill  `n` tokens in steps of at most 512, the head for the last one only
    step     one step of `n` tokens with the head for each, the mean of `repeat`
    matmuls  of `prefill`, the time inside the products of the layers (ours only)
    python   what happens outside of the engine's calls for each of `n` tokens in `LLM.generate` (ours only)
    python-stream  the same in `LLM.stream`, which makes one call for each token
    python-warm  `python` where calls only pretend to run, so that the caches stay as they were
    start    a fresh process from opening the model to its first token, imports done
    """

    kind: str
    n: int
    depth: int = 0
    parallel: int = 1
    repeat: int = 1

    @property
    def n_tok(self) -> int:
        """Tokens that are timed."""
        return self.n * self.parallel

    @property
    def n_ctx(self) -> int:
        """Tokens that the context must hold."""
        return (self.depth + self.n) * self.parallel


def tokens_for(vocab_size: int, n: int) -> list[int]:
    """The same tokens on both sides."""
    found: list[int] = np.random.default_rng(11).integers(3, vocab_size, n).tolist()
    return found


@dataclass(frozen=True)
class Row:
    """One line of the table. `ours` and `peer` are names in models.py; no `peer`: ours alone.

    `goal`: the ratio (or the time, or the share) to be reached; `at_most` where less is better. `floor` names the probe
    that our speed is a share of, `share_goal` the share to be reached (in a `start` row: memory beyond the file as a
    share of it, at most).
    """

    key: str
    title: str
    ours: str
    peer: str
    work: Work
    goal: float | None
    kind: str = "against"
    base: Work | None = None  # for kind "itself"
    at_most: bool = False
    floor: str = ""  # "read" or "int8"
    share_goal: float | None = None
    threads: int = 0  # 0: those of the run
    kv_dtype: str = "f16"
    unit: str = "tok/s"
    note: str = ""


DECODE = Work("decode", 128)
DECODE_7B = Work("decode", 32)
DEEP = Work("decode", 64, depth=4096)
PREFILL = Work("prefill", 512)
PREFILL_DEEP = Work("prefill", 512, depth=4096)
MATMULS = Work("matmuls", 512)
ONE = Work("step", 1, depth=64, repeat=16)

_OTHER = "other weights of the same shape: the peer has no such format"
_SHORT = "32 tokens instead of 128, for time"
_INSIDE = (
    "time stamps inside a whole prompt, on the calling thread: the layers' matrices and the wait for others at their "
    "end, without SwiGLU and without the rounding before them"
)

# Rows that share models stand together, so that each model is opened as seldom as possible.
ROWS = (
    Row("decode-demo", "decode 128, 135M demo, equal bytes", "demo", "demo", DECODE, 1.7, floor="read",
        share_goal=0.85),
    Row("prefill-demo", "prefill 512, 135M demo", "demo", "demo", PREFILL, 2.0, floor="int8"),
    Row("python", "our Python between two steps", "demo", "", Work("python", 256), 10, "absolute",
        at_most=True, unit="µs/token"),
    Row("python-stream", "our Python for a token of a stream", "demo", "", Work("python-stream", 256), 10, "absolute",
        at_most=True, unit="µs/token"),
    Row("python-warm", "our Python between two steps, without the model's sweep through the caches", "demo", "",
        Work("python-warm", 256), 10, "absolute", at_most=True, unit="µs/token"),
    Row("decode-1b", "decode 128, 1B, q4 g32", "1b-q4", "1b-q4_0", DECODE, 1.08, floor="read", share_goal=0.95),
    Row("prefill-1b", "prefill 512, 1B, q4 g32", "1b-q4", "1b-q4_0", PREFILL, 2.3, floor="int8", share_goal=0.62),
    Row("step4-1b", "4 tokens in one step against one, 1B", "1b-q4", "1b-q4_0", replace(ONE, n=4), 1.2, "itself",
        base=ONE, at_most=True, unit="× the time of one"),
    Row("step8-1b", "8 tokens in one step against one, 1B", "1b-q4", "1b-q4_0", replace(ONE, n=8), 1.6, "itself",
        base=ONE, at_most=True, unit="× the time of one"),
    Row("parallel8-1b", "8 sequences at once, 1B, total", "1b-q4", "1b-q4_0", Work("decode", 16, parallel=8), 4.5,
        "itself", base=Work("decode", 16), unit="× the tok/s of one"),
    Row("deep-decode-1b", "decode 64 at depth 4,096, 1B, f16 cache", "1b-q4", "1b-q4_0", DEEP, 1.7, floor="read",
        share_goal=0.85),
    Row("deep-prefill-1b", "prefill 512 at depth 4,096, 1B", "1b-q4", "1b-q4_0", PREFILL_DEEP, 2.4, floor="int8"),
    Row("deep-decode-1b-q8", "decode 64 at depth 4,096, 1B, q8 cache against f16", "1b-q4", "1b-q4_0", DEEP, 1.85,
        floor="read", share_goal=0.85, kv_dtype="q8"),
    Row("matmuls-1b", "prefill 512, 1B, q4 g32: inside the matmuls", "1b-q4", "", MATMULS, 0.73, "absolute",
        floor="int8", unit="of the int8 peak", note=_INSIDE),
    Row("decode-1b-1t", "decode 128 on one thread, 1B, q4 g32", "1b-q4", "1b-q4_0", DECODE, 1.25, floor="read",
        share_goal=0.9, threads=1),
    Row("decode-1b-q4nl", "decode 128, 1B, q4nl g64 against Q4_0", "1b-q4nl", "1b-q4_0", DECODE, 1.14, floor="read",
        share_goal=0.94, note=_OTHER),
    Row("prefill-1b-q4nl", "prefill 512, 1B, q4nl g64", "1b-q4nl", "1b-q4_0", PREFILL, 2.3, floor="int8",
        share_goal=0.62, note=_OTHER),
    Row("matmuls-1b-q4nl", "prefill 512, 1B, q4nl g64: inside the matmuls", "1b-q4nl", "", MATMULS, 0.73,
        "absolute", floor="int8", unit="of the int8 peak", note=_INSIDE),
    Row("decode-1b-km", "decode 128, 1B, q4nl g64 against Q4_K_M", "1b-q4nl", "1b-q4_k_m", DECODE, 1.2, floor="read",
        share_goal=0.94, note=_OTHER),
    Row("decode-1b-q8", "decode 128, 1B, q8 against Q8_0", "1b-q8", "1b-q8_0", DECODE, 1.3, floor="read"),
    Row("prefill-1b-q8", "prefill 512, 1B, q8 against Q8_0", "1b-q8", "1b-q8_0", PREFILL, 2.8, floor="int8"),
    Row("decode-7b", "decode 32, 7B, q4 g32", "7b-q4", "7b-q4_0", DECODE_7B, 1.03, floor="read", share_goal=0.95,
        note=_SHORT),
    Row("prefill-7b", "prefill 512, 7B, q4 g32", "7b-q4", "7b-q4_0", PREFILL, 2.3, floor="int8", share_goal=0.62),
    Row("matmuls-7b", "prefill 512, 7B, q4 g32: inside the matmuls", "7b-q4", "", MATMULS, 0.73, "absolute",
        floor="int8", unit="of the int8 peak", note=_INSIDE),
    Row("decode-7b-q4nl", "decode 32, 7B, q4nl g64 against Q4_0", "7b-q4nl", "7b-q4_0", DECODE_7B, 1.09, floor="read",
        share_goal=0.94, note=f"{_SHORT}; {_OTHER}"),
    Row("prefill-7b-q4nl", "prefill 512, 7B, q4nl g64", "7b-q4nl", "7b-q4_0", PREFILL, 2.3, floor="int8",
        share_goal=0.62, note=_OTHER),
    Row("decode-7b-km", "decode 32, 7B, q4nl g64 against Q4_K_M", "7b-q4nl", "7b-q4_k_m", DECODE_7B, 1.15, floor="read",
        share_goal=0.94, note=f"{_SHORT}; {_OTHER}"),
    Row("start-7b", "7B in the page cache: start to first token; memory beyond the file", "7b-q4", "7b-q4_0",
        Work("start", 1), 0.4, "start", at_most=True, share_goal=0.05, unit="s"),
)  # fmt: skip
