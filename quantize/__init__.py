"""Converts LLaMA checkpoints (Hugging Face's and Meta's folders, GGUF files) into pyllama's model folders.

`convert` is the whole of it; the `quantize` command is cli.py. Needs numpy and nothing of pyllama but pyllama.common:
neither the compiled extension nor a deep-learning framework.
"""

from __future__ import annotations

from .convert import Plan, Progress, convert, make_plan, write_plan
from .verify import verify

__all__ = ["Plan", "Progress", "convert", "make_plan", "verify", "write_plan"]
