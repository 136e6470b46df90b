"""The one door to the extension `pyllama._C`: a missing build becomes an ImportError that says what to do.

Nothing else imports `_C` at module level, so everything that needs no kernels (`--help`, formats, errors) works
without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load_native() -> Any:
    """Returns `pyllama._C`. Raises ImportError with instructions when it is not built or cannot be loaded."""
    try:
        return import_module("pyllama._C")
    except ModuleNotFoundError as error:
        if error.name != "pyllama._C":
            raise
        raise ImportError(
            "the C++ extension pyllama._C is not built; run `pip install .` in the source folder "
            "(or `make dev` for an incremental build)"
        ) from None
    except ImportError as error:
        raise ImportError(
            f"the C++ extension pyllama._C is there but cannot be loaded ({error}); rebuild it with `pip install .` "
            "and this Python"
        ) from error
