"""Texts in pages, a step's attention over them on the emulated device, and the same in float64 with a bound."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.cuda.conftest import Emulated
from tests.cuda.helpers_cache import PAGE, Cache

RNG = np.random.default_rng
BOTH = pytest.mark.parametrize("q8", [False, True], ids=["f16", "q8"])


def quantized(x: np.ndarray, wide: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and float16 scales of each 32 dimensions of [tokens, head_dim]."""
    groups = np.pad(x, [(0, 0), (0, wide - x.shape[1])]).reshape(len(x), -1, 32)
    scales = (np.abs(groups).max(-1) / 127).astype(np.float16)
    codes = np.rint(groups / np.where(scales > 0, scales, 1)[..., None].astype(np.float64)).clip(-127, 127)
    return codes.reshape(len(x), wide)[:, : x.shape[1]].astype(np.int8), scales


@dataclass
class Text:
    """One sequence's keys and values, float16 [n_kv_heads, tokens, head_dim], and pages that have them."""

    cache: Cache
    n_tok: int
    seed: int = 0
    scale: float = 1.0
    k: np.ndarray = field(init=False)
    v: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shape = (2, self.cache.n_kv_heads, -(-self.n_tok // PAGE) * PAGE, self.cache.head_dim)
        x = RNG(self.seed).standard_normal(shape) * self.scale
        self.k, self.v = x.astype(np.float16)

    def pages(self, layer: int) -> list[bytes]:
        """Pages with this text in one layer and what nobody may look at, NaN keys and large values, in others."""
        result = []
        for p in range(self.k.shape[1] // PAGE):
            here = slice(p * PAGE, (p + 1) * PAGE)
            blocks = [self._block(self.k[h, here], self.v[h, here]) for h in range(self.cache.n_kv_heads)]
            nothing = np.full((PAGE, self.cache.head_dim), np.nan, np.float16)
            other = self._block(nothing, np.full_like(nothing, 3e4)) if self.cache.n_layers > 1 else b""
            page = [b"".join(blocks) if i == layer else other * len(blocks) for i in range(self.cache.n_layers)]
            result.append(b"".join(page))
        return result

    def _block(self, k: np.ndarray, v: np.ndarray) -> bytes:
        if not self.cache.q8:
            return self.cache.block(k, v)
        with np.errstate(invalid="ignore"):
            return self.cache.block(quantized(k, self.cache.wide), quantized(v, self.cache.wide))

    def numbers(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values as the pages have them."""
        per_head = [[], []]
        for page in self.pages(layer):
            size = len(page) // self.cache.n_layers // self.cache.n_kv_heads
            first = layer * self.cache.n_kv_heads
            heads = [page[(first + h) * size : (first + h + 1) * size] for h in range(self.cache.n_kv_heads)]
            for kv, both in zip(per_head, zip(*map(self.cache.unpacked, heads), strict=True), strict=True):
                kv.append(np.stack(both)[..., : self.cache.head_dim])
        return np.concatenate(per_head[0], 1), np.concatenate(per_head[1], 1)


@dataclass
class Span:
    text: Text
    pos: int
    q: np.ndarray  # float32 [n_tok, n_heads, head_dim]


def attend(
    emulated: Emulated,
    spans: list[Span],
    *,
    layer: int = 0,
    room: int = 0,
    launches: int = 1,
    seed: int = 0,
    multiprocessors: int = 4,
    shared_bytes: int = 0,
) -> np.ndarray:
    """One launch over the spans, [n_tok, n_heads, head_dim]. Pages are scattered; `room`: keys beyond those needed."""
    cache = spans[0].text.cache
    table, at, pages = [], [], []
    for s in spans:
        at.append(len(table))
        table += range(len(pages), len(pages) + -(-(s.pos + len(s.q)) // PAGE))
        pages += s.text.pages(layer)
    order = RNG(seed).permutation(len(pages))
    data = np.frombuffer(b"".join(pages[i] for i in order), np.uint8)
    ids = np.argsort(order)[table].astype(np.int32)
    q = np.ascontiguousarray(np.concatenate([s.q for s in spans]))
    first = np.cumsum([0] + [len(s.q) for s in spans])
    rows = np.array([[f, len(s.q), s.pos, p] for f, s, p in zip(first, spans, at, strict=False)], np.int32)
    most = max(len(s.q) for s in spans)
    keys = max(s.pos + len(s.q) for s in spans) + room
    step = [layer, len(q), q.shape[1], len(spans), most, keys, len(pages), len(ids), launches]
    step += [multiprocessors, shared_bytes, max([len(s.q) for s in spans if len(s.q) <= 8], default=0)]
    o = np.full(q.shape, 7, np.float32)  # what nobody writes is neither right nor NaN
    emulated.call("attend_step", cache.shape, np.array(step, np.int32), rows, ids, data, q, o)
    return o


def expected(span: Span, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64, and how far from it rounding may lead.

    Queries become halves: a score is off by 2^-11 Σ|q k| / √head_dim at most (2^-12 for the half, as much again for
    all float arithmetic), and with it, relatively, a weight. Weights become halves, and so do values of a q8 cache:
    2^-11 each. A weighted mean of values moves by twice a weight's relative error times the largest value at most.
    Weights below 2^-34 of the largest vanish.
    """
    k, v = span.text.numbers(layer)
    n_tok, n_heads, head_dim = span.q.shape
    group = n_heads // len(k)
    o, bound = np.zeros(span.q.shape), np.zeros(span.q.shape)
    for t in range(n_tok):
        seen = span.pos + t + 1
        for h in range(n_heads):
            q, keys, values = span.q[t, h].astype(np.float64), k[h // group, :seen], v[h // group, :seen]
            s = keys @ q / np.sqrt(head_dim)
            p = np.exp(s - s.max())
            o[t, h] = p @ values / p.sum()
            score_error = 2.0**-11 * (np.abs(keys) @ np.abs(q)).max() / np.sqrt(head_dim)
            relative = np.expm1(min(score_error, 100)) + 2.0**-11 + seen * 2.0**-34
            bound[t, h] = (2 * relative + 2.0**-11) * np.abs(values).max()
    return o, bound


def queries(n_tok: int, n_heads: int, head_dim: int, seed: int = 1, scale: float = 1.0) -> np.ndarray:
    return (RNG(seed).standard_normal((n_tok, n_heads, head_dim)) * scale).astype(np.float32)


def check(found: np.ndarray, spans: list[Span], layer: int = 0) -> None:
    """Within the bound, and on the average far within: roundings do not all point the same way."""
    first = 0
    for s in spans:
        o, bound = expected(s, layer)
        error = np.abs(found[first : first + len(s.q)] - o)
        assert (error <= bound).all(), (error / bound).max()
        assert error.mean() <= 0.02 * bound.mean(), (error.mean(), bound.mean())
        first += len(s.q)
