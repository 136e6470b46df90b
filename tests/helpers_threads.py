"""Work for several threads at once. An error in one of them fails the test: pytest is told so in pyproject.toml."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_threads(n: int, work: Callable[[int], None]) -> None:
    """work(0) … work(n - 1), each in a thread of its own; waits for all, for each at most a minute."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
