"""Prints text as it is written."""

import sys

from pyllama import LLM

with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    for piece in llm.stream("Once upon a time", temperature=0.7, seed=3, max_tokens=24):
        print(piece.text, end="", flush=True)
    print()
