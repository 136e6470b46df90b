"""Makes tests/golden/gguf_blocks.npz: blocks of each type and the numbers that the gguf package makes of them.

    python -m tests.make_golden_gguf

Bytes are random, but for the blocks' own numbers, which are moderate, and the last block's, whose are subnormal. Needs
the package `gguf`; Q8_K, which it does not decode, is left to the definitions in helpers_gguf.py.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tests.make_sources import BLOCKS

GOLDEN = Path(__file__).parent / "golden" / "gguf_blocks.npz"
WEIGHTS = 1024  # of each type


def main() -> None:
    rng = np.random.default_rng(20)
    arrays = {}
    for kind, (weights, size, places) in BLOCKS.items():
        if kind == "Q8_K":
            continue
        raw = rng.integers(0, 256, (WEIGHTS // weights, size), np.uint8)
        for at in places:
            numbers = rng.uniform(-0.25, 0.25, len(raw))
            numbers[-1] = 3 * 2.0**-24
            raw[:, at : at + 2] = numbers.astype("<f2").view(np.uint8).reshape(-1, 2)
        arrays[f"{kind}.bytes"] = raw
        arrays[f"{kind}.values"] = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
