"""Every CPU kernel against float64 numpy, on every instruction set of this machine, and all of these against each other
with ==. Shapes are odd on purpose: tails of rows, columns and groups are where kernels go wrong.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyllama import _C
from pyllama.common.formats import Packed, TensorSpec, dense, dequantize, pack

from .helpers_models import DENSE, QUANTIZED, Kind, native_weight, random_packed

ISAS = _C.isas()
EPS = 2.0**-24
TILE_TOK = (8, 12, 40)  # tokens that a tile unit takes in three ways: in pairs of blocks, one tile of them, a panel
ops = _C.ops


def same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal bit for bit."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def make(kind: Kind, n: int, k: int, seed: int = 0) -> tuple[TensorSpec, Packed]:
    spec = kind.spec("w", (n, k))
    return spec, random_packed(spec, np.random.default_rng(seed))


def stored_order(spec: TensorSpec, packed: Packed) -> NDArray[np.float64]:
    """The matrix with its columns as stored, in float64."""
    values = dequantize(spec, packed).astype(np.float64)
    return values if packed.input_order is None else values[:, packed.input_order]


def int8_activations(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the engine makes of activations: int8 with a float32 scale for each 32 columns, of 22 significant bits."""
    m, k = x.shape
    padded = np.zeros((m, -(-k // 32) * 32), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(m, -1, 32)
    amax = np.abs(blocks).max(axis=2, keepdims=True)
    tiny = amax < np.float32(1e-30)
    with np.errstate(divide="ignore", over="ignore"):
        bits = (amax / np.float32(127)).view(np.uint32) + np.uint32(3)
        scale = np.where(tiny, np.float32(0), (bits & ~np.uint32(3)).view(np.float32))
        inverse = np.where(tiny, np.float32(0), np.float32(1) / scale)
    codes = np.clip(np.rint(blocks * inverse), -127, 127)
    return (codes.astype(np.float64) * scale).reshape(m, -1)[:, :k]


def expected(spec: TensorSpec, packed: Packed, x: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The product in float64, and a bound on what float32 may add: a rounding for each fma of a chain, each at
    most EPS times the sum of magnitudes; the constant covers the scale's products and the offset's chain.
    """
    w = stored_order(spec, packed)
    if packed.input_order is not None:
        x = x[:, packed.input_order]
    a = int8_activations(x) if spec.info.quantized else x.astype(np.float64)
    terms = spec.shape[1] / 32 + 40
    magnitude = np.abs(a) @ np.abs(w).T
    if packed.offsets is not None:  # codes and offset may cancel in w, but not in the two chains
        codes = packed.codes.max() * np.abs(w).max()
        magnitude = magnitude + 4 * codes * np.abs(a).sum(axis=1, keepdims=True)
    return a @ w.T, terms * EPS * magnitude + 1e-38


@pytest.mark.parametrize("kind", DENSE + QUANTIZED, ids=str)
def test_matmul_against_float64_and_between_instruction_sets(kind: Kind) -> None:
    rng = np.random.default_rng(1)
    for n, k, m in [
        (1, 32, 1),
        (16, 64, 8),
        (17, 96, 3),
        (33, 160, 9),
        (40, 100, 5),
        (48, 577, 2),
        (63, 31, 12),
        (80, 320, 50),
        (34, 1060, 21),  # several chunks of columns, the last one short
        (32, 40, 519),  # more than one panel of tokens
        (150, 640, 64),  # tiles of tokens: two strips and a half, two chunks of columns and a half
        (49, 280, 43),  # tiles of tokens, the third one with eleven
    ]:
        spec, packed = make(kind, n, k, seed=n)
        weight = native_weight(spec, packed)
        x = rng.standard_normal((m, k)).astype(np.float32)
        want, bound = expected(spec, packed, x)
        results = {isa: ops.matmul(weight, x, isa=isa, threads=2) for isa in ISAS}
        for isa, y in results.items():
            assert (np.abs(y - want) <= bound).all(), (isa, n, k, m, np.abs(y - want).max())
            assert same(y, results["scalar"]), (isa, n, k, m)
        for row in range(min(m, 4)):
            assert same(ops.matmul(weight, x[row : row + 1], threads=1)[0], results["scalar"][row]), (n, k, m, row)


@pytest.mark.parametrize("kind", QUANTIZED, ids=str)
def test_every_count_of_few_tokens(kind: Kind) -> None:
    """Up to 8 tokens, up to 16, a remainder of either: a tile unit takes each another way. An odd number of blocks of
    columns and of tiles, one block alone. That nothing is read behind the weights' end is another test's.
    """
    rng = np.random.default_rng(3)
    for n, k in [(49, 96), (20, 20), (80, 320)]:
        spec, packed = make(kind, n, k, seed=n)
        weight = native_weight(spec, packed)
        x = rng.standard_normal((57, k)).astype(np.float32)
        want, bound = expected(spec, packed, x)
        rows = ops.matmul(weight, x, isa="scalar")
        assert (np.abs(rows - want) <= bound).all()
        for m in range(5, 58):
            assert same(ops.matmul(weight, x[-m:], threads=1 + m % 2), rows[-m:]), (n, k, m)


@given(
    st.sampled_from(DENSE + QUANTIZED),
    st.integers(1, 70),
    st.integers(1, 300),
    st.integers(1, 50),
    st.integers(0, 2**31),
)
def test_matmul_property(kind: Kind, n: int, k: int, m: int, seed: int) -> None:
    spec, packed = make(kind, n, k, seed)
    weight = native_weight(spec, packed)
    x = np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)
    want, bound = expected(spec, packed, x)
    y = ops.matmul(weight, x, threads=2)
    assert (np.abs(y - want) <= bound).all()
    for isa in ISAS:
        assert same(ops.matmul(weight, x, isa=isa), y), isa


@pytest.mark.parametrize("kind", QUANTIZED, ids=str)
def test_extreme_codes_do_not_saturate(kind: Kind) -> None:
    """Weights and activations at the ends of their ranges, signs alike, alternating and mixed: the largest sums there
    are, of 32 columns in int32 and of eight columns in int16. For few tokens and for many.
    """
    spec, packed = make(kind, 32, 256)
    codes = (packed.codes.min(), packed.codes.max())
    signs = np.ones((3, 256), np.float32)
    signs[1, ::2] = -1
    signs[2, 128:] = -1
    x = np.concatenate([signs, -signs] * 6)
    for columns in (slice(None), slice(None, None, 2)):
        for code, other in (codes, codes[::-1]):
            packed.codes[:] = other
            packed.codes[:, columns] = code
            weight = native_weight(spec, packed)
            want, bound = expected(spec, packed, x)
            for m in (1, 5, 12, len(x)):
                results = {isa: ops.matmul(weight, x[:m], isa=isa) for isa in ISAS}
                for isa, y in results.items():
                    assert (np.abs(y - want[:m]) <= bound[:m]).all(), (isa, m)
                    assert same(y, results["scalar"]), (isa, m)


@pytest.mark.parametrize("m", [6, *TILE_TOK])
@pytest.mark.parametrize("kind", DENSE + QUANTIZED, ids=str)
def test_zero_huge_and_subnormal_inputs(kind: Kind, m: int) -> None:
    spec, packed = make(kind, 19, 160)
    weight = native_weight(spec, packed)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((m, 160)).astype(np.float32)
    x[0::6] = 0
    x[1::6, 32:64] = 0
    x[2::6] *= np.float32(1e32)
    x[3::6] *= np.float32(1e-25)
    x[4::6] *= np.float32(1e-42)  # subnormal: below what a group keeps
    x[5::6, ::7] *= np.float32(1e6)
    want, bound = expected(spec, packed, x)
    results = [ops.matmul(weight, x, isa=isa) for isa in ISAS]
    for y in results:
        assert (np.abs(y - want) <= bound).all()
        assert (y[0::6] == 0).all()
        assert same(y, results[-1])


@pytest.mark.parametrize("kind", QUANTIZED, ids=str)
def test_zero_and_subnormal_scales(kind: Kind) -> None:
    spec, packed = make(kind, 16, 128)
    assert packed.scales is not None
    packed.scales[:, 0] = 0
    packed.scales[1] = np.array(3, np.uint16).view(packed.scales.dtype)  # the third-smallest subnormal
    weight = native_weight(spec, packed)
    x = np.random.default_rng(4).standard_normal((max(TILE_TOK), 128)).astype(np.float32)
    want, bound = expected(spec, packed, x)
    rows = ops.matmul(weight, x, isa="scalar")
    assert (np.abs(rows - want) <= bound).all()
    for isa in ISAS:
        for m in (3, *TILE_TOK):
            assert same(ops.matmul(weight, x[:m], isa=isa), rows[:m]), (isa, m)


@pytest.mark.parametrize("kind", DENSE + QUANTIZED, ids=str)
def test_rows_of_the_embedding(kind: Kind) -> None:
    spec, packed = make(kind, 21, 100)
    weight, want = native_weight(spec, packed), dequantize(spec, packed)
    for row in (0, 15, 16, 20):
        assert same(ops.dequantize_row(weight, row), want[row])


def guarded(data: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], mmap.mmap]:
    """A copy of `data` that ends where an unreadable page begins."""
    page = mmap.PAGESIZE
    size = -(-data.nbytes // page) * page
    region = mmap.mmap(-1, size + page)
    view = np.frombuffer(region, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    address = view.ctypes.data + size
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), mmap.PROT_READ * 0) == 0
    out = view[size - data.nbytes : size]
    out[:] = data.reshape(-1).view(np.uint8)
    return out, region


@pytest.mark.parametrize("kind", DENSE + QUANTIZED, ids=str)
def test_nothing_is_read_beyond_the_buffers(kind: Kind) -> None:
    """Also by a tile unit's ways of few tokens: odd numbers of blocks and of tiles, so that what is taken two at a time
    ends at the half, and so few scales behind the codes that a block read too many would leave them.
    """
    few = [(16, 96, 7), (48, 96, 8), (33, 32, 7), (16, 32, 12), (48, 160, 12), (20, 224, 23), (16, 96, 24)]
    for n, k, m in [(17, 100, 3), (16, 32, 1), (5, 70, 2), (40, 100, 9), (48, 64, 50), *few]:
        spec, packed = make(kind, n, k)
        payload, keep = guarded(pack(spec, packed))
        weight = _C.Weight(**spec.arguments, data=payload)
        x = np.random.default_rng(0).standard_normal((m, k)).astype(np.float32)
        edge, keep_x = guarded(x)
        at_edge = edge.view(np.float32).reshape(m, k)
        want, bound = expected(spec, packed, x)
        for isa in ISAS:
            assert (np.abs(ops.matmul(weight, at_edge, isa=isa) - want) <= bound).all()
        assert keep is not None and keep_x is not None


@pytest.mark.parametrize("isa", ISAS)
def test_vector_kernels_read_nothing_beyond_their_input(isa: str) -> None:
    rng = np.random.default_rng(5)
    for n in (2, 34, 70, 130):
        x, keep = guarded(rng.standard_normal(n).astype(np.float32))
        w, keep_w = guarded(rng.standard_normal(n).astype(np.float32))
        a, b = x.view(np.float32), w.view(np.float32)
        assert np.isfinite(ops.rmsnorm(a, b, 1e-5, isa=isa)).all()
        assert np.isfinite(ops.swiglu(a, b, isa=isa)).all()
        assert np.isfinite(ops.rope(a, b[: n // 2], b[n // 2 :], isa=isa)).all()
        assert keep is not None and keep_w is not None


@pytest.mark.parametrize("isa", ISAS)
def test_quantized_activations(isa: str) -> None:
    rng = np.random.default_rng(6)
    for k in (1, 31, 32, 33, 576, 1000):
        x = (rng.standard_normal((3, k)) * 10.0 ** rng.integers(-20, 20, (3, 1))).astype(np.float32)
        q, scale, sums = ops.quantize_activations(x, isa=isa)
        blocks = q.reshape(3, -1, 32)
        assert np.abs(q).max() <= 127 and (q[:, k:] == 0).all()
        assert (sums == blocks.sum(axis=2)).all()
        values = (blocks.astype(np.float64) * scale[:, :, None]).reshape(3, -1)[:, :k]
        assert (values == int8_activations(x)).all()
        widest = np.repeat(scale, 32, axis=1)[:, :k]
        assert (np.abs(values - x) <= widest * 0.5001).all()
        assert (scale.view(np.uint32) & 3 == 0).all()  # so that 1.5 * 2**23 * scale is exact


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_not_made_one(isa: str, bad: float) -> None:
    for position in range(32):
        x = np.ones((1, 64), np.float32)
        x[0, position] = bad
        _, scale, _ = ops.quantize_activations(x, isa=isa)
        assert np.isnan(scale[0, 0]) and np.isfinite(scale[0, 1]), position
        x[0, position] = 1.01e33  # beyond what a block's scale may be
        assert np.isnan(ops.quantize_activations(x, isa=isa)[1][0, 0]), position
    for kind in [*DENSE, *QUANTIZED]:
        spec, packed = make(kind, 16, 64)
        weight = native_weight(spec, packed)
        good = ops.matmul(weight, np.ones((1, 64), np.float32), isa=isa)
        assert np.isfinite(good).all()
        for m in (2, *TILE_TOK):
            for row in {0, 1, m - 1}:
                x = np.ones((m, 64), np.float32)
                x[row, 5] = bad
                y = ops.matmul(weight, x, isa=isa)
                assert not np.isfinite(y[row]).any(), (kind, m, row)
                assert same(np.delete(y, row, axis=0), np.repeat(good, m - 1, axis=0)), (kind, m, row)
    q, k, v = np.ones((3, 2, 1, 16), np.float32)
    v[0, 0, 3] = np.nan
    assert np.isnan(ops.attention(q[1:], k, v, 1, isa=isa)[0, 0, 3])


@pytest.mark.parametrize("isa", ISAS)
def test_exp(isa: str) -> None:
    x = np.concatenate([np.linspace(-87.6, 88.3, 20001), np.linspace(-1, 1, 2001)]).astype(np.float32)
    y = ops.exp(x, isa=isa)
    want = np.exp(x.astype(np.float64))
    assert (np.abs(y - want) <= 3e-7 * want).all()
    assert same(y, ops.exp(x, isa="scalar"))
    assert (ops.exp(np.array([-np.inf, -1e30, -88.0], np.float32), isa=isa) == 0).all()
    assert np.isposinf(ops.exp(np.array([np.inf, 1e30, 89.0], np.float32), isa=isa)).all()
    assert ops.exp(np.array([0.0], np.float32), isa=isa)[0] == 1.0


@pytest.mark.parametrize("isa", ISAS)
def test_norm_rope_and_swiglu(isa: str) -> None:
    rng = np.random.default_rng(7)
    for n in (2, 16, 48, 62, 100, 576, 4096):
        x, w = rng.standard_normal((2, n)).astype(np.float32)
        y = ops.rmsnorm(x, w, 1e-5, isa=isa)
        want = x.astype(np.float64) / np.sqrt(np.mean(x.astype(np.float64) ** 2) + 1e-5) * w
        # n/16 fma of a lane, the tree, division, root and two products: relative to the value
        assert (np.abs(y - want) <= (n / 32 + 12) * EPS * np.abs(want)).all()
        assert same(y, ops.rmsnorm(x, w, 1e-5, isa="scalar"))

        h = ops.swiglu(x * 20, w, isa=isa)
        gate = (x * 20).astype(np.float64)
        want = gate / (1 + np.exp(-gate)) * w
        assert (np.abs(h - want) <= 1e-6 * np.abs(want) + 1e-36).all()
        assert same(h, ops.swiglu(x * 20, w, isa="scalar"))

        angle = rng.uniform(-3, 3, n // 2)
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        r = ops.rope(x, cos, sin, isa=isa)
        a, b = x[: n // 2].astype(np.float64), x[n // 2 :].astype(np.float64)
        want = np.concatenate([a * cos - b * sin, b * cos + a * sin])
        assert np.abs(r - want).max() <= 4 * EPS * np.abs(x).max()
        assert same(r, ops.rope(x, cos, sin, isa="scalar"))


def in_cache(x: NDArray[Any], kv_dtype: str) -> NDArray[np.float64]:
    """Keys or values [n_tok, heads, head_dim] as the cache holds them."""
    if kv_dtype == "f16":
        return x.astype(np.float16).astype(np.float64)
    out = np.empty(x.shape, np.float64)
    for d in range(0, x.shape[2], 32):
        part = x[:, :, d : d + 32]
        wanted = np.abs(part).max(axis=2, keepdims=True) / np.float32(127)
        scale = np.minimum(wanted, np.float32(65504)).astype(np.float16)
        below = (scale.astype(np.float32) < wanted) & (scale < 65504)
        scale = np.where(below, np.nextafter(np.minimum(scale, np.float16(65472)), np.float16(np.inf)), scale)
        scale = scale.astype(np.float32)
        codes = np.rint(np.clip(part * (1 / np.where(scale > 0, scale, np.inf)).astype(np.float32), -127, 127))
        out[:, :, d : d + 32] = codes.astype(np.float64) * scale
    return out


def attention_oracle(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], pos: int, kv_dtype: str = "f16", window: int = 0
) -> tuple[NDArray[np.float64], float]:
    """The output, and the bound of what it may be off because a q8 cache's weights are integers."""
    n_tok, n_heads, head_dim = q.shape
    group = n_heads // k.shape[1]
    k64 = np.repeat(in_cache(k, kv_dtype), group, axis=1)
    v64 = np.repeat(in_cache(v, kv_dtype), group, axis=1)
    scores = np.einsum("thd,khd->htk", q.astype(np.float64), k64) / np.sqrt(head_dim)
    back = np.arange(n_tok)[:, None] + pos - np.arange(pos + n_tok)[None, :]
    scores[:, (back < 0) | (back >= (window or pos + n_tok))] = -np.inf
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.einsum("htk,khd->thd", p / p.sum(axis=2, keepdims=True), v64), weight_rounding(p, v64)


def weight_rounding(p: NDArray[np.float64], v: NDArray[np.float64]) -> float:
    """What a q8 cache's weights may be off: in a page of 64 keys each weight times its value's scale goes to a multiple
    of the largest / 16383, which is off by half of that, and meets a code of at most 127."""
    largest = p * np.abs(v).max(axis=2).T[:, None, :]
    pages = np.maximum.reduceat(largest, np.arange(0, p.shape[2], 64), axis=2).sum(axis=2)
    return float((pages / p.sum(axis=2)).max()) * 1.01 * 64 / 2 / 16383


SHAPES = [  # n_tok, pos, n_heads, n_kv_heads, head_dim
    (1, 0, 1, 1, 2),
    (1, 63, 4, 2, 16),
    (1, 64, 9, 3, 64),
    (5, 60, 6, 2, 24),
    (70, 0, 4, 4, 32),
    (3, 511, 2, 1, 40),
    (2, 1500, 12, 1, 64),
    (33, 500, 8, 2, 128),
    (1, 1030, 3, 3, 6),
    (2, 100, 5, 1, 80),  # 10 rows: blocks of 6 and 4
    (7, 90, 3, 3, 96),  # 7 rows, made even
    (130, 450, 1, 1, 24),  # two tiles of rows, the second sees one split more
    (15, 1000, 8, 1, 48),  # 120 rows over two splits
]


@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
@pytest.mark.parametrize("window", [0, 3, 520], ids=lambda window: f"window {window}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape: tuple[int, int, int, int, int], window: int, kv_dtype: str) -> None:
    n_tok, pos, n_heads, n_kv_heads, head_dim = shape
    if window >= pos + n_tok:
        return
    rng = np.random.default_rng(8)
    q = (2 * rng.standard_normal((n_tok, n_heads, head_dim))).astype(np.float32)
    k, v = rng.standard_normal((2, pos + n_tok, n_kv_heads, head_dim)).astype(np.float32)
    want, rounding = attention_oracle(q, k, v, pos, kv_dtype, window)
    first = ops.attention(q, k, v, pos, isa="scalar", threads=1, kv_dtype=kv_dtype, window=window)
    # scores carry head_dim roundings, weights a relative error of about that, sums one for each key
    bound = (2 * head_dim + 64 + 8) * 4 * EPS * np.abs(v).max() * (1 + np.abs(q).max())
    if kv_dtype == "q8":
        # Two digits leave max|q| / 127 / 254 / 2 of a query, so a score is off by that times Σ|k| / √head_dim, a weight
        # relatively by that, and an output by that times twice the largest value.
        off = np.abs(q).max() / 127 / 254 / 2 * np.abs(k).sum(axis=2).max() / np.sqrt(head_dim)
        bound += 2 * np.abs(v).max() * off + rounding
    assert np.abs(first - want).max() <= bound
    for isa in ISAS:
        for threads in (1, 3):
            again = ops.attention(q, k, v, pos, isa=isa, threads=threads, kv_dtype=kv_dtype, window=window)
            assert same(again, first), (isa, threads)
    # Queries give the bits among others that they give in a step of their own.
    assert same(ops.attention(q[-1:], k, v, pos + n_tok - 1, kv_dtype=kv_dtype, window=window), first[-1:])
    half = n_tok // 2
    if half:
        begin = ops.attention(
            q[:half], k[: pos + half], v[: pos + half], pos, threads=2, kv_dtype=kv_dtype, window=window
        )
        assert same(begin, first[:half])


@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_attention_property(data: st.DataObject) -> None:
    """Any cut of the rows, any head_dim, any group, any window, on any instruction set: the scalar kernels' bits."""
    n_tok, pos = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([0, 1, 50, 63, 64, 65, 130, 511, 513]))
    group, head_dim = data.draw(st.integers(1, 9)), 2 * data.draw(st.integers(1, 70))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    window = data.draw(st.sampled_from([0, 1, 2, 63, 64, 65, 128, 450]))
    size = np.float32(10.0 ** data.draw(st.integers(-8, 3)))
    q = rng.standard_normal((n_tok, group, head_dim)).astype(np.float32)
    k, v = size * rng.standard_normal((2, pos + n_tok, 1, head_dim)).astype(np.float32)
    for kv_dtype in ("f16", "q8"):
        want = ops.attention(q, k, v, pos, isa="scalar", kv_dtype=kv_dtype, window=window)
        isa, cut = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, n_tok))
        assert same(ops.attention(q, k, v, pos, isa=isa, threads=2, kv_dtype=kv_dtype, window=window), want)
        part = ops.attention(q[:cut], k[: pos + cut], v[: pos + cut], pos, isa=isa, kv_dtype=kv_dtype, window=window)
        assert same(part, want[:cut])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
def test_keys_before_the_window_add_nothing(isa: str, kv_dtype: str) -> None:
    """Those in the window's first page have no weight, whatever they are; pages before it are not even read: NaN there
    would be everywhere."""
    rng = np.random.default_rng(12)
    for (n_tok, pos), window in itertools.product([(1, 1300), (3, 640), (30, 700), (120, 1000)], [1, 50, 64, 65, 600]):
        q = rng.standard_normal((n_tok, 4, 32)).astype(np.float32)
        k, v = rng.standard_normal((2, pos + n_tok, 2, 32)).astype(np.float32)
        want = ops.attention(q, k, v, pos, isa=isa, kv_dtype=kv_dtype, window=window)
        first = pos + 1 - window
        k[:first], v[:first] = 100 * rng.standard_normal((2, first, 2, 32))
        k[: first // 64 * 64], v[: first // 64 * 64] = np.nan, np.nan
        for threads in (1, 2):
            found = ops.attention(q, k, v, pos, isa=isa, kv_dtype=kv_dtype, window=window, threads=threads)
            assert same(found, want), (n_tok, pos, window, threads)


def test_the_q8_cache_keeps_its_grid() -> None:
    """One key: the output is that value as the cache holds it, for sizes beyond both ends of half precision."""
    rng = np.random.default_rng(11)
    for size in (1e-9, 1e-6, 1e-4, 1.0, 1e4, 1e9):
        v = (size * rng.standard_normal((1, 3, 40))).astype(np.float32)
        v[0, 2] = 0
        want = in_cache(v, "q8")
        assert size < 1e6 or np.abs(want).max() == 127 * 65504
        for isa in ISAS:
            o = ops.attention(np.ones_like(v), v, v, 0, isa=isa, kv_dtype="q8")
            # The weight is half of 1/16383 off where its value's scale is not the head's largest.
            bound = np.abs(want).max(axis=2, keepdims=True) * 1.01 / 2 / 16383
            assert (np.abs(o - want) <= bound + 4 * EPS * np.abs(want)).all(), (isa, size)


def test_an_unknown_cache_type_is_an_error() -> None:
    x = np.zeros((1, 1, 8), np.float32)
    with pytest.raises(ValueError, match="kv_dtype='q4': expected f16 or q8"):
        ops.attention(x, x, x, 0, kv_dtype="q4")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n_tok", [1, 5], ids=["few rows", "many rows"])
@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
def test_attention_does_not_hide_what_is_not_a_number(isa: str, bad: float, n_tok: int, kv_dtype: str) -> None:
    rng = np.random.default_rng(10)
    for position in (0, 69):
        for which in range(3):
            q = rng.standard_normal((n_tok, 2, 16)).astype(np.float32)
            k, v = rng.standard_normal((2, 70 + n_tok, 1, 16)).astype(np.float32)
            (q if which == 0 else k if which == 1 else v)[0 if which == 0 else position, 0, 3] = bad
            o = ops.attention(q, k, v, 70, isa=isa, kv_dtype=kv_dtype)
            touched = o[0, 0] if which == 0 else o if which == 1 else o[:, :, 3]
            assert not np.isfinite(touched).any(), (position, which)
            assert np.isfinite(
                o[:, 1] if which == 0 else o[:, :, 4:] if which == 2 and kv_dtype == "f16" else 0
            ).all(), (position, which)


def test_attention_with_huge_scores_and_values() -> None:
    rng = np.random.default_rng(9)
    q = (1e4 * rng.standard_normal((2, 2, 16))).astype(np.float32)
    k = (1e3 * rng.standard_normal((130, 1, 16))).astype(np.float32)
    v = np.full((130, 1, 16), 1e9, np.float32)  # beyond half precision: kept at its largest number
    for isa in ISAS:
        o = ops.attention(q, k, v, 128, isa=isa)
        assert np.isfinite(o).all()
        assert np.abs(o / 65504 - 1).max() < 1e-5


def test_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"isa='avx9000': no such instruction set.*scalar"):
        ops.exp(x, isa="avx9000")
    monkeypatch.setenv("PYLLAMA_ISA", "mmx")
    with pytest.raises(ValueError, match="PYLLAMA_ISA='mmx'"):
        ops.exp(x)
    monkeypatch.setenv("PYLLAMA_ISA", "scalar")
    assert ops.exp(x)[0] == 1.0


def test_bad_arguments() -> None:
    spec, packed = make(Kind("f32"), 4, 8)
    weight = native_weight(spec, packed)
    with pytest.raises(ValueError, match="x must be"):
        ops.matmul(weight, np.zeros((2, 9), np.float32))
    vector = TensorSpec("v", "f32", (8,))
    with pytest.raises(ValueError, match="row out of range"):
        ops.dequantize_row(native_weight(vector, dense(vector, np.zeros(8, np.float32))), 0)


@pytest.mark.skipif("amx" not in ISAS, reason="this machine has no AMX, or its system does not allow it")
def test_without_permission_for_tiles_there_is_the_next_instruction_set() -> None:
    """Linux refuses the tile registers while a thread has a signal stack that they would not fit on."""
    script = """
import ctypes, mmap
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = mmap.mmap(-1, 8192)
at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(at, 0, 8192)), None) == 0
from pyllama import _C
assert "amx" in _C.all_isas()
print(*_C.isas())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa for isa in ISAS if isa != "amx"]
