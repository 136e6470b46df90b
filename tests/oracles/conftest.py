"""The ring of tests that compares with reference implementations live; run by `make test-oracles`, which installs them.

They are demanded here rather than skipped: a green run must mean that the comparison took place. No network is used.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

from tests.cuda.conftest import cuda_library, emulated  # noqa: F401

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# On a device only the files that speak of CUDA are run (scripts/gpu_check.py), and none of them reads GGUF.
needed = ("torch", "transformers", *["gguf"] * ("PYLLAMA_CUDA_TESTS" not in os.environ))
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    pytest.exit(f"tests/oracles needs {', '.join(missing)}: run `make test-oracles`, or pip install '.[oracles]'", 4)

import torch  # noqa: E402

torch.set_num_threads(max(1, min(4, len(os.sched_getaffinity(0)))))
torch.set_grad_enabled(False)
torch.use_deterministic_algorithms(True)
