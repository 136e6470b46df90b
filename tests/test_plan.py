"""Plans of memory: bytes against what the engine takes and against the second definition of the device's layouts; how
many layers fit against counting.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama import DeviceError, sizes
from pyllama.common.formats import FORMATS, TensorSpec
from pyllama.cuda import CudaDevice
from pyllama.open import spec_of
from pyllama.plan import SPARE_BYTES, Planner, make_plan
from pyllama.synthetic import SHAPES, synthetic_config, synthetic_specs

from .cuda.helpers_cache import Cache
from .cuda.helpers_fragments import CASES, case_name, random_weight, reference
from .helpers_models import Kind, Shape, small_model

GIB = 2**30


def device(free: int, *, emulated: bool = False) -> CudaDevice:
    return CudaDevice(0, "Fake 9000", free, free, emulated)


def planner(shape: str = "8b", format: str = "q4", **options: Any) -> Planner:
    config = synthetic_config(shape)
    return Planner(config, synthetic_specs(config, format), **options)


# -------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("shape", [(16, 64), (5, 33), (40, 200), (17, 129)])
def test_fragments_take_what_the_layout_has(case: dict[str, Any], shape: tuple[int, int]) -> None:
    weight = random_weight(shape, seed=1, **case)
    layout = reference([weight])
    expected = [len(np.asarray(part).tobytes()) for part in (layout.codes, layout.scales, layout.row_scales)]
    assert list(sizes.fragment_bytes([weight.spec])) == expected


def test_matrices_below_each_other_share_padding() -> None:
    weights = [random_weight((n, 100), seed=n, format="q8", group=64) for n in (20, 7, 16)]
    layout = reference(weights)
    expected = [len(np.asarray(part).tobytes()) for part in (layout.codes, layout.scales, layout.row_scales)]
    assert list(sizes.fragment_bytes([weight.spec for weight in weights])) == expected


def test_what_one_product_can_take() -> None:
    def matrix(n: int, **changes: Any) -> TensorSpec:
        settings = {"format": "q4a", "group": 32, "scale": "f16", "offset": "f16"} | changes
        return TensorSpec(f"w{n}", shape=(16, settings.pop("columns", 64)), **settings)

    def lengths(*matrices: TensorSpec) -> list[int]:
        return [len(stack) for stack in sizes.stacks_of(matrices)]

    assert lengths(matrix(0), matrix(1), matrix(2)) == [3]
    assert lengths(matrix(0), matrix(1, offset="bf16", scale="bf16")) == [2], "numbers become halves"
    for changes in ({"group": 64}, {"offset": "u8"}, {"columns": 96}, {"format": "q4", "offset": ""}):
        assert lengths(matrix(0), matrix(1, **changes), matrix(2)) == [1, 1, 1]
    assert lengths(matrix(0), matrix(1, input_order=True), matrix(2, input_order=True)) == [1, 1, 1]


@pytest.mark.parametrize(
    ("window", "n_ctx", "fits"),
    [
        ({"sliding_window": 100}, None, False),
        ({"sliding_window": 100}, 101, False),
        ({"sliding_window": 100}, 100, True),
        ({"sliding_window": 100, "sliding_layers": [1]}, None, False),
        ({"sliding_window": 100, "sliding_layers": []}, None, True),
        ({"sliding_window": None, "sliding_layers": [0]}, None, True),
    ],
)
def test_windows_that_a_device_can_leave_away(window: dict[str, Any], n_ctx: int | None, fits: bool) -> None:
    assert (sizes.unsupported_on_device(synthetic_config("tiny") | window, n_ctx) is None) == fits


@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
@pytest.mark.parametrize("head_dim", [16, 34, 64, 80, 128])
def test_pages(kv_dtype: str, head_dim: int) -> None:
    small = small_model(Shape(head_dim=head_dim, n_layers=3, vocab_size=32))
    found = small.model(kv_dtype=kv_dtype, threads=1).page_bytes
    assert found == 3 * sizes.cpu_page_bytes(small.config, kv_dtype)
    cache, zeros = Cache(kv_dtype == "q8", 3, head_dim), np.zeros((64, head_dim), np.float16)
    head = (zeros.astype(np.int8), np.zeros((64, cache.wide // 32), np.float16)) if cache.q8 else zeros
    assert sizes.device_page_bytes(small.config, kv_dtype) == 3 * len(cache.block(head, head))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["q8", "q4a", "q4nl", "bf16"])
def test_opened_weights_are_what_they_were_made_of(format: str) -> None:
    kind = Kind(format, 32 if FORMATS[format].quantized else 0)
    if format == "q4a":
        kind = Kind("q4a", 32, "bf16", "bf16", input_order=True)
    small = small_model(Shape(vocab_size=32), kind)
    for name, weight in small.weights.items():
        spec = spec_of(weight)
        assert (spec.name, spec.payload_bytes, spec.format) == (name, weight.nbytes, weight.format)
        assert spec.shape == small.shape.tensors()[name]
    wq = spec_of(small.weights["layers.0.wq"])
    assert (wq.scale, wq.offset, wq.input_order) == (kind.scale, kind.offset, format == "q4a")
    assert wq.group == kind.group and len(wq.codebook) == (16 if format == "q4nl" else 0)


def test_a_cpu_takes_its_file_its_cache_and_buffers() -> None:
    for shape in ("8b", "1b"):  # an output matrix of its own, and a tied one
        plan = make_plan(planner(shape), shape, None)
        share = plan.on_cpu
        specs = synthetic_specs(synthetic_config(shape), "q4")
        assert share.layers + share.embedding + share.head == sum(spec.payload_bytes for spec in specs)
        assert share.cache == 8192 * plan.cache_bytes_per_tok and plan.on_device is None
    assert plan.gpu_layers == 0 and plan.most_gpu_layers is None and plan.fits


def test_known_models() -> None:
    """By hand: 8B at 4.5 bits is 218,103,808 weights a layer, at 128 KiB of keys and values a token."""
    plan = make_plan(planner("8b"), "8b", device(24 * GIB))
    assert plan.on_device is not None and plan.gpu_layers == 32 and plan.on_cpu.total == 0
    rows = 4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096  # a float of each, and of norms and biases
    assert plan.layer_bytes[0] == 218_103_808 * 9 // 16 + 4 * rows + 4 * (2 * 4096 + 4096 + 2 * 1024)
    assert plan.cache_bytes_per_tok == 128 * 1024 and plan.on_device.cache == GIB
    assert plan.on_device.embedding == 128256 * (4096 * 9 // 16 + 4) and plan.on_device.spare == SPARE_BYTES
    tied = make_plan(planner("1b"), "1b", device(24 * GIB))
    assert tied.on_device is not None and tied.on_device.embedding == 0, "the head is it"


# -------------------------------------------------------------------------------- how much fits


@settings(max_examples=60)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    format=st.sampled_from(["q4", "f16"]),
    n_ctx=st.integers(1, 8192),
    kv_dtype=st.sampled_from(["f16", "q8"]),
    free=st.integers(0, 20 * GIB),
)
def test_as_many_as_fit(shape: str, format: str, n_ctx: int, kv_dtype: str, free: int) -> None:
    counted = planner(shape, format, n_ctx=n_ctx, kv_dtype=kv_dtype)
    plan = make_plan(counted, shape, device(free))
    n = plan.gpu_layers
    assert n == plan.most_gpu_layers
    if n:
        assert plan.on_device is not None and plan.on_device.total <= free and plan.on_device.n_layers == n
    if n < plan.n_layers:
        assert counted.on_device(n + 1).total > free
        assert plan.on_cpu.n_layers == plan.n_layers - n
        of_all = plan.n_ctx_of_all
        assert of_all is not None and of_all < n_ctx
        if of_all:
            assert counted.on_device(plan.n_layers, of_all).total <= free
        assert counted.on_device(plan.n_layers, of_all + 64).total > free
    parts = [plan.on_cpu.layers, counted.on_device(n).layers if n else 0]
    assert all(parts) == (0 < n < plan.n_layers)


def test_wishes_for_layers() -> None:
    counted = planner("8b")
    free = counted.on_device(10).total
    auto, all_, twelve = (make_plan(counted, "8b", device(free), wish) for wish in ("auto", "all", 12))
    assert (auto.gpu_layers, all_.gpu_layers, twelve.gpu_layers) == (10, 32, 12)
    assert auto.fits and not all_.fits and not twelve.fits
    auto.require("auto")
    wanted = (
        r"wants? \d+\.\d\d GiB of cuda:0 with a context of 8192 tokens, \d\.\d\d GiB are free; 10 layers would fit "
    )
    for plan, wish in ((all_, "all"), (twelve, 12)):
        with pytest.raises(DeviceError, match=rf"gpu_layers={wish!r}: .* of 32 layers {wanted}\(gpu_layers=10\)$"):
            plan.require(wish)
    none = make_plan(counted, "8b", device(1000))
    assert none.gpu_layers == 0
    with pytest.raises(DeviceError, match=r'a single layer wants .* free; nothing would fit, use device="cpu"'):
        none.require("auto")
    make_plan(counted, "8b", device(1000), 0).require(0)
    make_plan(counted, "8b", None, "all").require("all")  # the CPU alone


def test_a_shorter_context_is_proposed_where_it_helps() -> None:
    counted = planner("1b", n_ctx=8192)
    free = counted.on_device(16, 1000).total  # most of it for loading: the cache has that room later
    with pytest.raises(DeviceError, match=r"layers would fit .gpu_layers=\d+., or all would fit with n_ctx=4480$"):
        make_plan(counted, "1b", device(free), "all").require("all")


@pytest.mark.parametrize("wish", ["some", -1, 1.5, True, None, "4"])
def test_wishes_that_make_no_sense(wish: Any) -> None:
    with pytest.raises(ValueError, match=r'gpu_layers=.*: expected "auto", "all" or a number of layers'):
        make_plan(planner("1b"), "1b", None, wish)


def test_more_layers_than_there_are() -> None:
    with pytest.raises(ValueError, match="gpu_layers=17: the model has 16 layers"):
        make_plan(planner("1b"), "1b", device(GIB), 17)


def test_contexts_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="n_ctx=9000: this model was made for at most 8192"):
        planner("1b", n_ctx=9000)
