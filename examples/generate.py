"""Continues a prompt, and a batch of prompts in one go."""

import sys

from pyllama import LLM, SamplingParams

with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    out = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
    print(out.text)
    print(f"{out.usage.completion_tokens} tokens, {out.timings.decode_tok_per_s:.0f} tok/s, {out.finish_reason}")

    for out in llm.generate(["Roses are", "Violets are"], temperature=0.8, seed=1, max_tokens=8, stop="\n"):
        print(repr(out.text))
