"""What a model on CUDA does when something goes wrong: a kernel fails, the device is full, is not there, or cannot run
the model. Emulated: the emulation can be told to fail.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyllama import _C, DeviceError
from tests.helpers_models import Kind, Shape, all_logits, random_tokens, small_model

from .conftest import Emulated, emulation_only

pytestmark = emulation_only("failures on demand")

SMALL = Shape(dim=64, hidden_dim=96, n_heads=4, n_kv_heads=2, head_dim=16, vocab_size=67)


@pytest.fixture
def device(emulated: Emulated, cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    monkeypatch.setenv("PYLLAMA_CUDA_LIBRARY", str(cuda_library))
    yield emulated
    emulated.call("fail_after", -1)
    emulated.call("leave_memory", -1)


@pytest.mark.parametrize("n_tok", [1, 12])
@pytest.mark.parametrize("wanted", ["all", "none"])
def test_a_kernel_that_fails_leaves_sequences_as_they_were(device: Emulated, n_tok: int, wanted: str) -> None:
    """At each moment of a step that is launched, recorded or replayed; the same step then succeeds, with the same
    bits. Without logits nobody asks for anything after the last verb, and the step must fail all the same."""
    small = small_model(SMALL, Kind("q4", 32))
    model = small.model(device="cuda", max_batch_tok=32)
    tokens = random_tokens(small, 10 + 7 * n_tok)
    expected = all_logits(small.model(device="cuda", max_batch_tok=32), tokens, [10, *[n_tok] * 7])
    sequence = model.sequence()
    model.step([(sequence, tokens[:10], None, "none")])
    for step, n_good in enumerate((0, 1, 7, 5, 2, 9, 11)):
        now = tokens[10 + step * n_tok :][:n_tok]
        before, pages = sequence.tokens, model.pages_in_use
        device.call("fail_after", n_good)
        with pytest.raises(DeviceError, match=r"CUDA failed: kernel of .*: fails, as a test wants"):
            model.step([(sequence, now, None, wanted)])
        assert sequence.tokens == before and model.pages_in_use == pages
        rows = model.step([(sequence, now, None, "all")])[0].logits
        assert np.array_equal(rows, expected[10 + step * n_tok :][:n_tok])


def test_a_failure_while_the_weights_are_brought(device: Emulated) -> None:
    small = small_model(SMALL, Kind("q4", 32))
    device.call("fail_after", 3)
    with pytest.raises(DeviceError, match="CUDA failed: kernel of"):
        small.model(device="cuda")
    assert small.model(device="cuda").backend == "cuda emulated"


def test_too_little_memory_for_a_model(device: Emulated) -> None:
    """The message says what is wanted, what there is, and how many layers would fit."""
    shape = Shape(dim=256, hidden_dim=2048, n_heads=4, n_kv_heads=4, head_dim=64, vocab_size=64, n_layers=6)
    small = small_model(shape, Kind("f16"))  # a layer takes 3.5 MiB
    device.call("leave_memory", 16 << 20)
    with pytest.raises(DeviceError) as caught:
        small.model(device="cuda", max_batch_tok=16)
    text = str(caught.value)
    assert (
        "out of memory on the device" in text and "MiB are wanted on device 0 (weights 22 MiB), 16 MiB are free" in text
    )
    assert "3 of 6 layers would fit: gpu_layers=3" in text
    device.call("leave_memory", 1 << 20)
    with pytest.raises(DeviceError, match='not even one layer would fit: use device="cpu"'):
        small.model(device="cuda", max_batch_tok=16)


def test_too_little_memory_for_pages(device: Emulated) -> None:
    """A MemoryError, at which the scheduler empties its cache of prefixes; what others hold is not touched."""
    small = small_model(SMALL, Kind("q4", 32))
    model = small.model(device="cuda", max_batch_tok=32)
    tokens = random_tokens(small, 32)
    first = model.sequence()
    model.step([(first, tokens, None, "none")])
    device.call("leave_memory", 1000)
    second = model.sequence()
    with pytest.raises(MemoryError, match=r"on the CUDA device: out of emulated device memory: .* for key/value pages"):
        model.step([(second, tokens, None, "none")])
    assert second.n_past == 0 and model.pages_in_use == 1
    model.step([(first, [1, 2], None, "all")])
    first.close()
    model.step([(second, tokens, None, "none")])


def test_pages_are_asked_for_in_smaller_pieces_where_memory_is_short(device: Emulated) -> None:
    """A slab is as large as all before it: eight pages where four are there. Room for three gives two, and one."""
    small = small_model(SMALL, Kind("q4", 32))
    model = small.model(device="cuda", max_batch_tok=64)
    tokens = random_tokens(small, 64)
    first, second = model.sequence(), model.sequence()
    for _ in range(4):
        model.step([(first, tokens, None, "none")])
    device.call("leave_memory", 3 * model.page_bytes + 1000)
    for _ in range(3):
        model.step([(second, tokens, None, "none")])
    with pytest.raises(MemoryError, match="for key/value pages"):
        model.step([(second, tokens, None, "none")])
    assert model.pages_in_use == 7


def test_steps_larger_than_a_grid(device: Emulated) -> None:
    small = small_model(SMALL, Kind("q4", 32))
    with pytest.raises(DeviceError, match="max_batch_tok is 65536, the CUDA kernels take 65535 at most"):
        small.model(device="cuda", max_batch_tok=65536)


def test_devices_that_are_not_there(device: Emulated) -> None:
    small = small_model(SMALL, Kind("q4", 32))
    with pytest.raises(DeviceError, match="there is no device 3: the driver counts 1, from 0"):
        small.model(device="cuda:3")
    for wrong in ("gpu", "cuda:", "cuda:x", "cuda0", "cuda:-1"):
        with pytest.raises(ValueError, match=rf'device is "{wrong}", expected'):
            small.model(device=wrong)


def test_models_that_no_kernel_is_made_for(device: Emulated) -> None:
    wide = small_model(Shape(head_dim=130, n_heads=1, n_kv_heads=1), Kind("f16"))
    with pytest.raises(DeviceError, match=r'head_dim 130: .* up to 128; use device="cpu" for this model'):
        wide.model(device="cuda")
    with pytest.raises(ValueError, match=r'kv_dtype is "q4", expected f16 or q8'):
        small_model(SMALL, Kind("f16")).model(device="cuda", kv_dtype="q4")


def test_steps_from_several_threads(device: Emulated) -> None:
    """A model is used by whoever holds its lock; sequences come and go meanwhile."""
    small = small_model(SMALL, Kind("q4", 32))
    model = small.model(device="cuda", max_batch_tok=32)
    texts = [random_tokens(small, 12, seed=i) for i in range(3)]
    expected = [all_logits(model, t, [9, 1, 1, 1]) for t in texts]
    found: dict[int, bool] = {}

    def run(i: int) -> None:
        found[i] = np.array_equal(all_logits(model, texts[i], [9, 1, 1, 1]), expected[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: True, 1: True, 2: True} and model.pages_in_use == 0


@pytest.mark.usefixtures("uncollected")
def test_ctrl_c_changes_nothing(device: Emulated) -> None:
    """In a call of many replayed steps; what the device had begun is done when the next step begins."""
    small = small_model(SMALL, Kind("q4", 32))
    model = small.model(device="cuda", max_batch_tok=32)
    tokens = random_tokens(small, 14)
    expected = all_logits(model, tokens, [11, 1, 1, 1])
    sequence = model.sequence()
    model.step([(sequence, tokens[:11], None, "none")])
    about_to_step = threading.Event()

    def interrupt() -> None:
        about_to_step.wait()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        about_to_step.set()
        while True:
            model.step([(sequence, tokens[11:12], _C.Sampler(seed=1), "none")], n_more=300)
            sequence.truncate(11)
    thread.join()
    assert sequence.tokens == tokens[:11].tolist() and model.pages_in_use == 1
    for i in range(11, 14):
        assert np.array_equal(model.step([(sequence, tokens[i : i + 1], None, "all")])[0].logits[0], expected[i])
