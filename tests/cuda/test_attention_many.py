"""csrc/cuda/attention_many.cu on the emulated device, against softmax attention in float64; steps with spans of both
kinds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.conftest import Emulated
from tests.cuda.helpers_attention import BOTH, Span, Text, attend, check, expected, queries
from tests.cuda.helpers_cache import Cache

LARGE = {"multiprocessors": 1, "shared_bytes": 200 << 10}  # a device that is given tiles of 128 rows


@BOTH
@pytest.mark.parametrize("head_dim", [2, 32, 64, 80, 90, 128])
def test_values(emulated: Emulated, head_dim: int, q8: bool) -> None:
    """Prompts over a page's end, from the beginning and in the middle, beside a token of another text; nothing fills a
    tile."""
    cache = Cache(q8, 1, head_dim, n_layers=2)
    spans = [
        Span(Text(cache, 70, seed=1), 50, queries(20, 5, head_dim)),
        Span(Text(cache, 7, seed=2), 6, queries(1, 5, head_dim, seed=3)),
        Span(Text(cache, 9, seed=4), 0, queries(9, 5, head_dim, seed=5)),
    ]
    found = emulated.in_all_orders(lambda: attend(emulated, spans, layer=1))
    check(found, spans, layer=1)


@BOTH
@pytest.mark.parametrize("group", [1, 3, 16])
def test_groups_and_tiles(emulated: Emulated, group: int, q8: bool) -> None:
    """Several tiles and two key/value heads; tiles of either size give the same bits."""
    cache = Cache(q8, 2, 32)
    spans = [
        Span(Text(cache, 290, seed=6), 150, queries(140 // group + 9, 2 * group, 32, seed=7, scale=3.0)),
        Span(Text(cache, 300, seed=8), 290, queries(10, 2 * group, 32, seed=9)),
    ]
    found = emulated.in_all_orders(lambda: attend(emulated, spans))
    check(found, spans)
    assert (attend(emulated, spans, **LARGE) == found).all()


@BOTH
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_tiles_of_either_size(emulated: Emulated, head_dim: int, q8: bool) -> None:
    cache = Cache(q8, 1, head_dim)
    span = Span(Text(cache, 130, seed=10), 90, queries(40, 4, head_dim, seed=11))
    small, large = attend(emulated, [span]), attend(emulated, [span], **LARGE)
    check(large, [span])
    assert (small == large).all()


@BOTH
@pytest.mark.parametrize("pos", [0, 63, 500])
def test_bits_do_not_depend_on_the_step(emulated: Emulated, pos: int, q8: bool) -> None:
    """Forty tokens at once, in pieces, beside others, with more room and other pages: the same bits."""
    cache = Cache(q8, 1, 64)
    text, other = Text(cache, pos + 40, seed=12), Text(cache, 300, seed=13)
    q = queries(40, 3, 64, seed=14)
    together = attend(emulated, [Span(text, pos, q)])
    check(together, [Span(text, pos, q)])
    beside = attend(emulated, [Span(other, 200, q[:33]), Span(text, pos, q), Span(other, 5, q[:1])], room=900, seed=5)
    assert (beside[33:73] == together).all()
    for first, last in [(0, 9), (9, 31), (11, 40), (31, 40)]:
        part = attend(emulated, [Span(text, pos + first, q[first:last])])
        assert (part == together[first:last]).all()


@BOTH
def test_spans_of_both_kinds(emulated: Emulated, q8: bool) -> None:
    """Decoded tokens beside a prompt have the bits that they have without it, and the other way round."""
    cache = Cache(q8, 2, 32)
    few = [
        Span(Text(cache, 600, seed=15), 599, queries(1, 4, 32, seed=16)),
        Span(Text(cache, 300, seed=17), 290, queries(8, 4, 32, seed=18)),
    ]
    many = [Span(Text(cache, 90, seed=19), 70, queries(20, 4, 32, seed=20))]
    alone = attend(emulated, few, launches=2)
    found = emulated.in_all_orders(lambda: attend(emulated, [few[0], *many, few[1]], launches=2))
    assert (found[:1] == alone[:1]).all() and (found[21:] == alone[1:]).all()
    assert (found[1:21] == attend(emulated, many)).all()
    check(found, [few[0], *many, few[1]])


@pytest.mark.parametrize("direction", [1, -1])
def test_maxima_that_move(emulated: Emulated, direction: int) -> None:
    """Scores that grow by a few octaves from page to page, or fall: sums are brought to new maxima again and again."""
    text = Text(Cache(False, 1, 64), 64 * 8, seed=21)
    text.k *= np.float16(0.125)
    text.k[..., 0] = direction * np.arange(text.k.shape[1]) / 64
    q = queries(12, 2, 64, seed=22)
    q[..., 0] = np.array([40, 20, 8, 1])[np.arange(12) % 4, None]  # of 16 rows some move and some do not
    span = Span(text, 64 * 8 - 12, q)
    found = attend(emulated, [span])
    check(found, [span])
    assert (found[3:] == attend(emulated, [Span(text, 64 * 8 - 9, q[3:])])).all()


@BOTH
def test_equal_keys_give_the_mean(emulated: Emulated, q8: bool) -> None:
    text = Text(Cache(q8, 1, 32), 200, seed=23)
    text.k[:] = text.k[:, :1]
    span = Span(text, 150, queries(20, 2, 32, seed=24, scale=10.0))
    found = attend(emulated, [span])
    values = text.numbers(0)[1][0]
    for t in range(20):
        seen = values[: 151 + t]
        assert (np.abs(found[t] - seen.mean(0)) <= 2.0**-11 * np.abs(seen).max()).all()


@BOTH
def test_what_is_masked_adds_exactly_nothing(emulated: Emulated, q8: bool) -> None:
    """Keys behind a query are NaN, values there large: bits are those without. Who sees a NaN key is NaN."""
    cache = Cache(q8, 2, 64)
    text = Text(cache, 200, seed=25)
    q = queries(60, 4, 64, seed=26)
    clean = attend(emulated, [Span(text, 110, q)])
    text.k[0, 130:] = np.nan
    text.v[0, 130:] = 6e4
    found = attend(emulated, [Span(text, 110, q)])
    assert (found[:, 2:] == clean[:, 2:]).all()  # the other key/value head
    assert (found[:20, :2] == clean[:20, :2]).all()
    assert np.isnan(found[20:, :2]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_queries_that_are_no_numbers_are_noticed(emulated: Emulated, bad: float) -> None:
    text = Text(Cache(False, 1, 64), 90, seed=27)
    q = queries(12, 4, 64, seed=28)
    clean = attend(emulated, [Span(text, 70, q)])
    q[7, 2, 33] = bad
    found = attend(emulated, [Span(text, 70, q)])
    hit = np.zeros((12, 4), bool)
    hit[7, 2] = True
    assert np.isnan(found[hit]).all() and (found[~hit] == clean[~hit]).all()


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e5, 1e30, 1e36])
def test_queries_of_any_size(emulated: Emulated, scale: float) -> None:
    """Far beyond what a half can hold. From 1e5 on one key takes it all, whatever rounding does to scores."""
    text = Text(Cache(False, 1, 64), 90, seed=29)
    text.k[:, 40] = 2.0
    q = np.abs(queries(9, 2, 64, seed=30)).clip(0.25, 1.0) * np.float32(scale)
    found = attend(emulated, [Span(text, 80, q)])
    o, bound = expected(Span(text, 80, q))
    limit = bound if scale < 1 else 2.0**-11 * np.abs(o)
    assert (np.abs(found - o) <= limit).all()


def test_values_up_to_the_end_of_half_precision(emulated: Emulated) -> None:
    text = Text(Cache(False, 1, 64), 600, seed=31)
    text.v[:] = np.float16(65504)
    found = attend(emulated, [Span(text, 588, queries(12, 2, 64, seed=32))])
    limit = 2.0**-18 if emulated.on_device else 2.0**-20  # a mean of equal numbers: only sums round, or are cut off
    assert (np.abs(found - 65504) <= 65504 * limit).all()
