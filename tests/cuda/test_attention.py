"""csrc/cuda/attention_few.cu on the emulated device, against softmax attention in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.cuda.conftest import Emulated, EmulationError
from tests.cuda.helpers_attention import BOTH, Span, Text, attend, check, expected, queries
from tests.cuda.helpers_cache import Cache


@BOTH
@pytest.mark.parametrize("head_dim", [6, 32, 64, 80, 96, 100, 128])
def test_values(emulated: Emulated, head_dim: int, q8: bool) -> None:
    """Three tokens over a page's end beside one of another text, five heads a group: nothing fills a tile."""
    cache = Cache(q8, 1, head_dim, n_layers=2)
    spans = [
        Span(Text(cache, 66, seed=1), 62, queries(3, 5, head_dim)),
        Span(Text(cache, 7, seed=2), 6, queries(1, 5, head_dim, seed=3)),
    ]
    found = emulated.in_all_orders(lambda: attend(emulated, spans, layer=1))
    check(found, spans, layer=1)


@BOTH
@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_groups_and_splits(emulated: Emulated, group: int, q8: bool) -> None:
    """Three splits, several tiles of rows, two heads; the same bits in every order and from launch to launch."""
    cache = Cache(q8, 2, 32)
    spans = [
        Span(Text(cache, 520, seed=4), 510, queries(3, 2 * group, 32, seed=5, scale=3.0)),
        Span(Text(cache, 255, seed=6), 254, queries(1, 2 * group, 32, seed=7)),
        Span(Text(cache, 1, seed=8), 0, queries(1, 2 * group, 32, seed=9)),
    ]
    found = emulated.in_all_orders(lambda: attend(emulated, spans, launches=2))
    check(found, spans)


def test_an_odd_number_of_rows_and_splits(emulated: Emulated) -> None:
    """15 parts: {top, sum} of all of them is 120 bytes, and what is loaded by 16 bytes must not lie behind it."""
    span = Span(Text(Cache(False, 1, 32), 600, seed=21), 599, queries(1, 5, 32, seed=22))
    check(attend(emulated, [span]), [span])


def test_a_span_longer_than_the_step_allows_is_nan(emulated: Emulated) -> None:
    """Three splits where the launch has two: NaN, its neighbour as always, and the counters are zero afterwards."""
    cache = Cache(False, 2, 32)
    spans = [
        Span(Text(cache, 600, seed=23), 598, queries(2, 6, 32, seed=24)),
        Span(Text(cache, 300, seed=25), 299, queries(1, 6, 32, seed=26)),
    ]
    found = attend(emulated, spans, room=-200, launches=2)
    assert np.isnan(found[:2]).all()
    check(found[2:], spans[1:])


@BOTH
@pytest.mark.parametrize("pos", [0, 60, 250, 505])
def test_bits_do_not_depend_on_the_step(emulated: Emulated, pos: int, q8: bool) -> None:
    """Eight tokens at once, one by one, beside another sequence, with more room and other pages: the same bits."""
    cache = Cache(q8, 1, 64)
    text, other = Text(cache, pos + 8, seed=10), Text(cache, 300, seed=11)
    q = queries(8, 4, 64, seed=12)
    together = attend(emulated, [Span(text, pos, q)])
    check(together, [Span(text, pos, q)])
    beside = attend(emulated, [Span(other, 299, q[:1]), Span(text, pos, q)], room=900, seed=5)
    assert (beside[1:] == together).all()
    for first, last in [(0, 1), (1, 4), (4, 8), (7, 8)]:
        part = attend(emulated, [Span(text, pos + first, q[first:last])])
        assert (part == together[first:last]).all()


@pytest.mark.parametrize("pos", [[1500, 0, 3, 255, 700, 256], [0, 255, 256, 1023, 1024, 40], [767] * 4], ids=str)
def test_texts_of_any_lengths_beside_each_other(emulated: Emulated, pos: list[int]) -> None:
    """Each has its own splits' room, and none meets another's; guard zones stand around all of it."""
    cache = Cache(False, 2, 32)
    spans = [Span(Text(cache, p + 2, seed=i), p, queries(1 + i % 2, 4, 32, i)) for i, p in enumerate(pos)]
    together, first = attend(emulated, spans), 0
    for span in spans:
        alone = attend(emulated, [span], room=512)
        assert together[first : first + len(span.q)].tobytes() == alone.tobytes()
        first += len(span.q)


def test_one_long_text_costs_what_it_needs(emulated: Emulated) -> None:
    """A 70B model's heads, 64 texts of which one has 128k tokens; once a prompt is among them."""

    def room(n_tok: int, n_spans: int, longest: int, few: int, keys: int, n_pages: int) -> int:
        step, found = np.array([n_tok, 64, n_spans, longest, few, keys, n_pages], np.int32), np.zeros(1, np.int64)
        emulated.call("attention_room", Cache(False, 8, 128, 80).shape, step, found)
        return int(found[0])

    alone = room(1, 1, 1, 1, 131072, 2048)
    assert 512 * 64 * 130 * 4 <= alone < 513.5 * 64 * 130 * 4, "of each split a row of 128, a maximum and a sum"
    assert room(64, 64, 1, 1, 131072, 2048 + 63) < alone * 1.2
    assert room(512, 64, 449, 1, 131072, 2048 + 63 + 8) < alone * 1.2
    assert room(64, 64, 1, 1, 64, 64) < alone / 6


@BOTH
def test_what_is_masked_adds_exactly_nothing(emulated: Emulated, q8: bool) -> None:
    """Keys behind a query are NaN, values there large: bits are those without. Who sees a NaN key is NaN."""
    cache = Cache(q8, 2, 64)
    text = Text(cache, 300, seed=13)
    q = queries(3, 4, 64, seed=14)
    clean = attend(emulated, [Span(text, 280, q)])
    text.k[0, 281:] = np.nan
    text.v[0, 281:] = 6e4
    found = attend(emulated, [Span(text, 280, q)])
    assert (found[:, 2:] == clean[:, 2:]).all()  # the other key/value head
    assert (found[0, :2] == clean[0, :2]).all()
    assert np.isnan(found[1:, :2]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_queries_that_are_no_numbers_are_noticed(emulated: Emulated, bad: float) -> None:
    text = Text(Cache(False, 1, 64), 90, seed=15)
    q = queries(2, 4, 64, seed=16)
    clean = attend(emulated, [Span(text, 80, q)])
    q[1, 2, 33] = bad
    found = attend(emulated, [Span(text, 80, q)])
    hit = np.zeros((2, 4), bool)
    hit[1, 2] = True
    assert np.isnan(found[hit]).all() and (found[~hit] == clean[~hit]).all()


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e5, 1e30, 1e36])
def test_queries_of_any_size(emulated: Emulated, scale: float) -> None:
    """Far beyond what a half can hold. From 1e5 on one key takes it all, whatever rounding does to scores."""
    text = Text(Cache(False, 1, 64), 90, seed=17)
    text.k[:, 40] = 2.0
    q = np.abs(queries(1, 2, 64, seed=18)).clip(0.25, 1.0) * np.float32(scale)
    found = attend(emulated, [Span(text, 89, q)])
    o, bound = expected(Span(text, 89, q))
    limit = bound if scale < 1 else 2.0**-11 * np.abs(o)
    assert (np.abs(found - o) <= limit).all()


def test_values_up_to_the_end_of_half_precision(emulated: Emulated) -> None:
    text = Text(Cache(False, 1, 64), 600, seed=19)
    text.v[:] = np.float16(65504)
    found = attend(emulated, [Span(text, 599, queries(1, 2, 64, seed=20))])
    limit = 2.0**-18 if emulated.on_device else 2.0**-20  # a mean of equal numbers: only sums round, or are cut off
    assert (np.abs(found - 65504) <= 65504 * limit).all()


@pytest.mark.parametrize(("head_dim", "said"), [(7, "head_dim 7"), (130, "head_dim 130"), (256, "even ones up to 128")])
def test_heads_that_no_kernel_is_made_for(emulated: Emulated, head_dim: int, said: str) -> None:
    with pytest.raises(EmulationError, match=said):
        emulated.call("cache_page_bytes", Cache(False, 1, head_dim).shape, np.zeros(1, np.int64))


def test_heads_that_do_not_divide(emulated: Emulated) -> None:
    cache = Cache(False, 2, 32)
    with pytest.raises(EmulationError, match="n_heads 3 is no multiple of n_kv_heads 2"):
        attend(emulated, [Span(Text(cache, 3), 2, queries(1, 3, 32))])


@BOTH
def test_the_page_has_the_size_that_numpy_gives_it(emulated: Emulated, q8: bool) -> None:
    for head_dim in (2, 64, 80, 128):
        cache = dataclasses.replace(Cache(q8, 3, head_dim), n_layers=2)
        found = np.zeros(1, np.int64)
        emulated.call("cache_page_bytes", cache.shape, found)
        assert found[0] == len(Text(cache, 1).pages(0)[0])
