"""What the tests of damaged files share: the smallest model, and the check that a file is refused as it should be.

Refused means: a ModelFormatError, on one printable line, that names the file and the thing, in little memory.
"""

from __future__ import annotations

import contextlib
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyllama.common.errors import ModelFormatError
from tests import make_sources as make
from tests.make_sources import Shape

SMALL = Shape(dim=32, hidden_dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, vocab_size=9)
WEIGHTS = make.random_weights(SMALL)


@contextlib.contextmanager
def little_memory(limit_bytes: int = 8 << 20) -> Iterator[None]:
    """Fails when more than `limit_bytes` are allocated at once inside."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= limit_bytes, f"{peak} bytes at once"


def refused(opener: Callable[[Path], Any], path: Path, pattern: str) -> None:
    with little_memory(), pytest.raises(ModelFormatError) as caught:
        opener(path)
    message = str(caught.value)
    assert re.search(pattern, message), f"{message!r} does not match {pattern!r}"
    assert path.name in message and len(message) < 1000 and message.isprintable(), message
