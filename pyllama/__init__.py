"""LLaMA inference on the CPU from Python, by the C++ kernels of `pyllama._C`.

Public names are loaded on first use (PEP 562), so that `import pyllama.common` works where the extension is not
built; the `quantize` package relies on that. Nothing here starts a thread or reads a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .common.errors import ContextLengthError, DeviceError, ModelFormatError, PyllamaError, QuantizeError
    from .llm import LLM
    from .outputs import Logprob, Piece, RequestOutput, Timings, TokenLogprobs, Usage
    from .sampling import SamplingParams

    __version__: str

_HOME = {
    "LLM": "llm",
    "SamplingParams": "sampling",
    "RequestOutput": "outputs",
    "Piece": "outputs",
    "Usage": "outputs",
    "Timings": "outputs",
    "TokenLogprobs": "outputs",
    "Logprob": "outputs",
    "PyllamaError": "common.errors",
    "ModelFormatError": "common.errors",
    "ContextLengthError": "common.errors",
    "DeviceError": "common.errors",
    "QuantizeError": "common.errors",
}

__all__ = [
    "LLM",
    "ContextLengthError",
    "DeviceError",
    "Logprob",
    "ModelFormatError",
    "Piece",
    "PyllamaError",
    "QuantizeError",
    "RequestOutput",
    "SamplingParams",
    "Timings",
    "TokenLogprobs",
    "Usage",
    "__version__",
]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pyllama")
    except PackageNotFoundError:
        return "0+unknown"  # a source folder that was never installed


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module 'pyllama' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
