"""csrc/cuda/cache.cu on the emulated device: rotating, and keys and values into their pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tests.cuda.conftest import Emulated
from tests.cuda.helpers_cache import PAGE, Cache

RNG = np.random.default_rng
BOTH = pytest.mark.parametrize("q8", [False, True], ids=["f16", "q8"])


@dataclass
class Step:
    """One step's tokens: positions, pages they go to, queries, keys and values, float32 [tokens, heads, head_dim]."""

    cache: Cache
    n_heads: int
    pos: np.ndarray
    page: np.ndarray
    qkv: np.ndarray

    @classmethod
    def random(cls, cache: Cache, n_heads: int, pos: list[int], page: list[int], seed: int = 0) -> Step:
        shape = (len(pos), n_heads + 2 * cache.n_kv_heads, cache.head_dim)
        qkv = (RNG(seed).standard_normal(shape) * 4).astype(np.float32)
        return cls(cache, n_heads, np.array(pos, np.int32), np.array(page, np.int32), qkv)

    @property
    def angles(self) -> np.ndarray:
        half = self.cache.head_dim // 2
        return self.pos[:, None] * 10000.0 ** (-np.arange(half) / half)

    def run(self, emulated: Emulated, pages: np.ndarray, layer: int = 0) -> np.ndarray:
        """Writes into `pages`, uint8 [n_pages, page_bytes]; the rotated queries."""
        q = np.full((len(self.pos), self.n_heads, self.cache.head_dim), np.nan, np.float32)
        step = np.array([layer, len(self.pos), self.n_heads, len(pages)], np.int32)
        cos, sin = np.cos(self.angles).astype(np.float32), np.sin(self.angles).astype(np.float32)
        shape = self.cache.shape
        emulated.call("rope_append_step", shape, step, self.page, self.pos, cos, sin, self.qkv, pages, q)
        return q

    def rotated(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys and values in float64."""
        x = self.qkv.astype(np.float64)
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(self.angles)[:, None], np.sin(self.angles)[:, None]
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        n_kv = self.cache.n_kv_heads
        return turned[:, : self.n_heads], turned[:, self.n_heads : -n_kv], x[:, -n_kv:]


def empty_pages(emulated: Emulated, cache: Cache, n: int) -> np.ndarray:
    size = np.zeros(1, np.int64)
    emulated.call("cache_page_bytes", cache.shape, size)
    return np.full((n, size[0]), 0xEE, np.uint8)


def read(cache: Cache, page: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """A page's keys and values in one layer, float64 [n_kv_heads, 64, wide]."""
    blocks = page.reshape(cache.n_layers, cache.n_kv_heads, -1)[layer]
    keys, values = zip(*(cache.unpacked(b.tobytes()) for b in blocks), strict=True)
    return np.stack(keys), np.stack(values)


@BOTH
@pytest.mark.parametrize("head_dim", [6, 64, 80, 128])
def test_values(emulated: Emulated, head_dim: int, q8: bool) -> None:
    """Tokens of two sequences, over a page's end; all slots of a page are used by some token of the last step."""
    cache = Cache(q8, 2, head_dim, n_layers=2)
    step = Step.random(cache, 5, [62, 63, 64, 1000, 7], [2, 2, 0, 1, 1])
    before = empty_pages(emulated, cache, 3)

    def run() -> np.ndarray:
        pages = before.copy()
        q = step.run(emulated, pages, layer=1)
        return np.concatenate([pages.ravel(), q.view(np.uint8).ravel()])

    found = emulated.in_all_orders(run)
    pages = found[: before.size].reshape(before.shape)
    q, k, v = step.rotated()
    got_q = found[before.size :].view(np.float32).reshape(q.shape)
    assert (np.abs(got_q - q) <= 2.0**-22 * np.abs(step.qkv).max()).all()  # four roundings and those of cos and sin
    touched = np.zeros_like(pages, bool)
    for t in range(len(step.pos)):
        keys, values = read(cache, pages[step.page[t]], 1)
        for kind, stored, wanted in [("k", keys, k), ("v", values, v)]:
            x = stored[:, step.pos[t] % PAGE]
            assert (x[:, head_dim:] == 0).all(), kind
            error = np.abs(x[:, :head_dim] - wanted[t])
            if q8:  # half a code of the scale, which is at most 2^-10 too large
                groups = np.pad(np.abs(wanted[t]), [(0, 0), (0, cache.wide - head_dim)]).reshape(2, -1, 32)
                scale = np.repeat(groups.max(-1), 32, axis=-1)[:, :head_dim] / 127 * (1 + 2.0**-9)
                assert (error <= scale * 0.5 * (1 + 2.0**-10)).all(), kind
                # The scale is rounded up, so that the largest of a group is not cut off.
                got = np.pad(np.abs(x), [(0, 0), (0, cache.wide - x.shape[-1])]).reshape(2, -1, 32).max(-1)
                assert (got >= groups.max(-1) * (1 - 2.0**-20)).all(), kind
            else:
                assert (error <= 2.0**-11 * np.abs(wanted[t]) + 2.0**-20).all(), kind
    for byte in (0xEE, 0x11):  # what differs from both fillings was written
        again = np.full_like(before, byte)
        step.run(emulated, again, layer=1)
        touched |= again != byte
    size = pages.shape[1] // 2
    assert not touched[:, :size].any()  # the other layer
    per_token = 2 * cache.wide * (1 if q8 else 2) + (2 * 2 * (cache.wide // 32) if q8 else 0)
    assert touched.sum() == len(step.pos) * 2 * per_token


@pytest.mark.many_blocks
def test_more_tokens_than_a_grid_is_high(emulated: Emulated) -> None:
    n = 65_537
    cache = Cache(False, 1, 2)
    step = Step.random(cache, 1, list(range(n)), [0] * n, seed=6)
    q = step.run(emulated, empty_pages(emulated, cache, 1))
    wanted, _, _ = step.rotated()
    assert (np.abs(q - wanted) <= 2.0**-22 * np.abs(step.qkv).max()).all()


@BOTH
def test_every_slot_of_a_page(emulated: Emulated, q8: bool) -> None:
    """64 tokens that fill a page leave no byte of it as it was, and each is where it belongs."""
    cache = Cache(q8, 1, 64)
    step = Step.random(cache, 1, list(range(128, 192)), [0] * 64, seed=3)
    pages = empty_pages(emulated, cache, 1)
    step.run(emulated, pages)
    other = pages ^ 0xFF
    step.run(emulated, other)
    assert (pages == other).all()
    keys, values = read(cache, pages[0], 0)
    _, k, v = step.rotated()
    limit = np.abs(step.qkv).max() / 127 if q8 else 2.0**-8
    assert (np.abs(keys[0] - k[:, 0]) <= limit).all() and (np.abs(values[0] - v[:, 0]) <= limit).all()


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_what_is_no_number_makes_the_key_nan_and_the_value_zero(
    emulated: Emulated, where: str, bad: float, q8: bool
) -> None:
    """Of that token and head alone: values must stay finite, since a weight of zero does not take a NaN away."""
    cache = Cache(q8, 2, 80)
    step = Step.random(cache, 2, [3, 4], [0, 0], seed=4)
    clean = empty_pages(emulated, cache, 1)
    step.run(emulated, clean)
    step.qkv[1, 2 if where == "key" else 5, 79] = bad  # head 0 of the keys, head 1 of the values
    pages = empty_pages(emulated, cache, 1)
    step.run(emulated, pages)
    head = 0 if where == "key" else 1
    keys, values = read(cache, pages[0], 0)
    clean_keys, clean_values = read(cache, clean[0], 0)
    assert np.isnan(keys[head, 4]).all() and (values[head, 4] == 0).all()
    assert (keys[head, 3] == clean_keys[head, 3]).all() and (values[head, 3] == clean_values[head, 3]).all()
    assert (keys[1 - head, 3:5] == clean_keys[1 - head, 3:5]).all()
    assert (values[1 - head, 3:5] == clean_values[1 - head, 3:5]).all()


@BOTH
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e5, 1e30, 3e38])
def test_numbers_of_any_size(emulated: Emulated, size: float, q8: bool) -> None:
    """Beyond half precision's range they end at its end, or where the q8 cache ends; nothing becomes infinite."""
    cache = Cache(q8, 1, 64)
    step = Step.random(cache, 1, [0], [0], seed=5)  # position 0: no rotation
    step.qkv = np.clip(step.qkv.astype(np.float64) * size, -3e38, 3e38).astype(np.float32)
    pages = empty_pages(emulated, cache, 1)
    step.run(emulated, pages)
    end = 515.5 * 127 if q8 else 65504.0
    wanted = np.clip(step.qkv[0, 1:].astype(np.float64), -end, end)
    for stored, x in zip(read(cache, pages[0], 0), wanted, strict=True):
        if q8:  # scales are halves, whose smallest is 2^-24
            limit = np.repeat(np.abs(x).reshape(2, 32).max(-1), 32) / 254 * 1.01 + 2.0**-24 * 64
        else:
            limit = 2.0**-11 * np.abs(x) + 2.0**-25
        assert (np.abs(stored[0, 0] - x) <= limit).all()
