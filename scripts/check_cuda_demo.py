"""`make check-cuda-demo`: the demo model, whole, through the CUDA kernels, against the CPU. Wants no GPU: by default
the kernels are emulated, where a step takes half a minute; --library names one for a device.

A prompt goes through the prompts' kernels, then the CPU's greedy reply through those of decoding, token by token, and
once more the device writes a reply of its own. Prints the KL of the distributions, where the greedy tokens differ, if
they do, and the time; ends with 1 where a bound of docs/GPU.md is not kept. Measures no speed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
from pyllama import LLM  # noqa: E402
from tests.cuda.compiling import compile_emulated  # noqa: E402

PROMPT = "The capital of France is Paris. The capital of Italy is"
MOST_KL, LEAST_TOP1 = 0.003, 0.97
Logits = NDArray[np.float32]


def read_and_reply(llm: LLM, prompt: list[int], reply: list[int] | None, n_tok: int) -> tuple[Logits, list[int]]:
    """Logits after each token of the prompt, read in one step, and of the reply, one token a step; and the reply: the
    given one, or the model's own of n_tok greedy tokens."""
    model = llm._model
    assert model is not None
    sequence = model.sequence()
    rows = [model.step([(sequence, prompt, None, "all")])[0].logits]
    written: list[int] = []
    for i in range(n_tok):
        written.append(int(np.argmax(rows[-1][-1])) if reply is None else reply[i])
        if i < n_tok - 1:
            rows.append(model.step([(sequence, written[-1:], None, "all")])[0].logits)
    sequence.close()
    return np.concatenate(rows), written


def kl_per_token(reference: Logits, other: Logits) -> NDArray[np.float64]:
    """Of each position's distribution, in nats."""
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (np.float64(reference), np.float64(other)))
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    return next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)


def compare(name: str, reference: Logits, other: Logits) -> bool:
    """Prints one line; True where the bounds are kept."""
    kl, top1 = kl_per_token(reference, other), reference.argmax(1) == other.argmax(1)
    off = np.abs(reference - other).max() / np.abs(reference).max()
    print(
        f"{name}: {len(kl)} positions, KL mean {kl.mean():.1e}, most {kl.max():.1e} nats; "
        f"the same top token for {top1.mean():.1%}; logits differ by {off:.1e} of the largest"
    )
    return bool(kl.mean() <= MOST_KL and top1.mean() >= LEAST_TOP1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the demo model on CUDA kernels with the CPU.")
    parser.add_argument("--model", default="demo", help='folder, .gguf file or "demo"')
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=5, help="of the reply (default 5)")
    parser.add_argument("--kv-dtype", choices=("f16", "q8"), default="f16")
    parser.add_argument(
        "--library", type=Path, help="libpyllama_cuda.so for a device; default: the emulation, compiled"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = arguments.library or Path(folder) / "libpyllama_cuda_emulated.so"
        if arguments.library is None:
            compile_emulated(library)
        os.environ["PYLLAMA_CUDA_LIBRARY"] = str(library.resolve())
        return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    n_tok = arguments.tokens
    with LLM(arguments.model, kv_dtype=arguments.kv_dtype, n_ctx=256, device="cpu") as cpu:
        prompt = list(cpu.tokenizer.encode(arguments.prompt))
        expected, reply = read_and_reply(cpu, prompt, None, n_tok)
        print(f"{cpu.config['n_layers']} layers; {len(prompt)} tokens, then {cpu.tokenizer.decode(reply)!r} by the CPU")
    start = time.monotonic()
    with LLM(arguments.model, kv_dtype=arguments.kv_dtype, n_ctx=256, device="cuda", gpu_layers="all") as cuda:
        found, _ = read_and_reply(cuda, prompt, reply, n_tok)
        ok = compare("prompt", expected[: len(prompt)], found[: len(prompt)])
        ok &= compare("reply", expected[len(prompt) - 1 :], found[len(prompt) - 1 :])
        own = cuda.generate(prompt, temperature=0.0, max_tokens=n_tok, ignore_eos=True).token_ids
        at = first_difference(reply, own)
        said = "the same tokens" if at is None else f"another token from the {at + 1}. on"
        print(f"greedy, drawn on the device: {said} ({cuda.runs_on})")
    print(
        f"{time.monotonic() - start:.0f} s; bounds {'kept' if ok else 'NOT kept'}: KL {MOST_KL}, top-1 {LEAST_TOP1:.0%}"
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
