"""What the engine does with memory: a step for which there is none changes nothing, and what is not used any more goes
back to the system. Results are test_engine.py's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama.native import load_native

from .helpers_models import QUANTIZED, Kind, Shape, all_logits, random_tokens, small_model

ROOT = Path(__file__).resolve().parent.parent
STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("n_more", [0, 2])
def test_a_step_that_finds_no_memory_for_its_results_changes_nothing(n_more: int) -> None:
    """Python's n-th allocation fails, for every n until the step needs no more of them."""
    set_nomemory = pytest.importorskip("_testcapi", reason="CPython's own test module is not installed").set_nomemory
    remove_hooks = sys.modules["_testcapi"].remove_mem_hooks
    model = small_model(Shape()).model(threads=1)
    sampler = load_native().Sampler(temperature=0.0, logprobs=3)
    expected = model.step([(model.sequence(), [1, 2, 3, 4, 5], sampler, "none")])[0]
    n_failed = 0
    for n in range(1, 1000):
        sequence = model.sequence()
        batch = [
            (sequence, [1, 2, 3, 4, 5], sampler, "none"),
            (model.sequence(), [7], sampler, "none" if n_more else "last"),
        ]
        set_nomemory(n, n + 1)
        try:
            results: Any = model.step(batch, n_more)
        except (MemoryError, RuntimeError, TypeError):  # as pybind11 puts it
            results = None
        finally:
            remove_hooks()
        assert sequence.n_past == (5 + n_more if results else 0)
        if results:
            assert results[0][:3] == expected[:3]
            if n > n_failed + 100:
                break
        else:
            n_failed = n
    assert n_failed > 10


@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
def test_pages_that_nobody_holds_go_back_to_the_system() -> None:
    shape = Shape(dim=32, hidden_dim=32, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=128, max_seq_len=256)
    model = small_model(shape, Kind("q8", 32)).model(threads=1)
    n, slab = 96, 16 * model.page_bytes  # 8 MB each
    source = model.sequence()
    model.step([(source, [1], None, "none")])
    for _ in range(2):
        forks = [source.fork(1) for _ in range(n)]
        found = model.step([(fork, [2], None, "last") for fork in forks])  # each copies the page that they share
        assert all(np.array_equal(result.logits, found[0].logits) for result in found)
        before = resident_bytes()
        del forks
        assert before - resident_bytes() > n * model.page_bytes - 2 * slab, (
            "but for the one in use and one that is kept"
        )
    pages = model.pages_in_use
    assert pages == 1 and np.array_equal(model.step([(source, [2], None, "last")])[0].logits, found[0].logits), (
        "the page in use is untouched"
    )


@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
def test_room_for_many_tokens_costs_no_memory_before_it_is_used() -> None:
    model = small_model(Shape(dim=512, hidden_dim=1024, n_heads=8, n_kv_heads=8, head_dim=64), QUANTIZED[-1])
    before = resident_bytes()
    roomy = model.model(max_batch_tok=65536, threads=1)  # x, q, k, v, o, gate, up, h of so many tokens: 1.6 GB
    few = all_logits(roomy, random_tokens(model, 3))
    assert resident_bytes() - before < 250e6
    assert np.array_equal(few, all_logits(model.model(max_batch_tok=64, threads=1), random_tokens(model, 3)))


def test_threads_that_the_system_does_not_give_are_an_error_that_says_so() -> None:
    code = """
import resource
from pyllama.native import load_native
load_native()
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from tests.helpers_models import small_model
try:
    small_model().model(threads=1024)
except OSError as error:
    print(error)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("a limit of address space stops threads on Linux")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("threads is 1024, only "), done.stderr
