"""Digests of what the engine computes, a line each: `python -m tests.print_bits`, on two kinds of processor, must print
the same. scripts/test_arm.sh compares an emulated ARM with the machine it runs on; a test within one process compares
only the instruction sets of that process. Digests are not stored: a change of the arithmetic is no fault.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from pyllama import _C
from tests.helpers_models import DENSE, QUANTIZED, Shape, small_model

SHAPES = {
    "plain": Shape(),
    "odd": Shape(dim=100, hidden_dim=300, n_heads=5, n_kv_heads=1, head_dim=20, vocab_size=97, biases=True, tied=True),
}
N_TOK = 70  # more than a page of the cache


def digest(*arrays: Any) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    sampling = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 7}
    for name, shape in SHAPES.items():
        tokens = np.random.default_rng(1).integers(0, shape.vocab_size, N_TOK, dtype=np.int32)
        for kind in [*DENSE, *QUANTIZED]:
            small = small_model(shape, kind)
            print(f"{name} {kind}: inputs", digest(small.config["rope_inv_freq"], *small.values.values()))
            for isa in (_C.isas()[0], "scalar"):
                model = small.model(isa=isa)
                sequence, sampler = model.sequence(), _C.Sampler(**sampling)
                first = model.step([(sequence, tokens, sampler, "all")])[0]
                drawn = [first.token]
                for _ in range(8):
                    drawn.append(model.step([(sequence, np.array(drawn[-1:], np.int32), sampler, "none")])[0].token)
                print(f"{name} {kind}: logits {digest(first.logits)} tokens {drawn}")


if __name__ == "__main__":
    main()
