"""Holds a conversation of two turns."""

import sys

from pyllama import LLM

messages = []
with LLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
    for question in ("What is the capital of Germany?", "And what is it known for?"):
        messages.append({"role": "user", "content": question})
        reply = llm.chat(messages, temperature=0, max_tokens=32)
        messages.append({"role": "assistant", "content": reply.text})
        print(f"> {question}\n{reply.text}")
