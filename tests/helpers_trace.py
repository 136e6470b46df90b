"""A trace function that is on inside a `with` block: the tests' way to strike at a chosen line. What to do there, and
which lines count, is for the classes that derive from it.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

T = TypeVar("T", bound="Tracing")


class Tracing:
    """`with` a derived object, its `trace` sees every call and line of this thread."""

    def __enter__(self: T) -> T:
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def trace(self, frame: Any, event: str, argument: object) -> Any:
        raise NotImplementedError
