"""Damages checkpoints of every kind at random and opens them: each loads or is refused by a ModelFormatError.

`make fuzz` runs it for a minute, FUZZ_ARGS="--runs 10000" for so many. Without a coverage tool an input counts as new
when it is refused in words that were not heard before; those are damaged further, and with --keep they stay in
fuzz/corpus, which every run replays first. What breaks the rule is kept there too and named. Nothing is written
elsewhere, memory is limited, and nothing here judges what a damaged file means.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import re
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pyllama.common.errors import ModelFormatError, QuantizeError  # noqa: E402
from quantize import make_plan  # noqa: E402
from quantize.readers import open_source  # noqa: E402
from tests import make_sources as make  # noqa: E402
from tests.helpers_hostile import SMALL, WEIGHTS  # noqa: E402
from tests.make_torch import meta_params, meta_shards, torch_file, write_meta_folder  # noqa: E402

CORPUS = Path(__file__).resolve().parent / "corpus"
MEMORY_BYTES = 4 << 30  # of addresses, so that a claim of gigabytes is a MemoryError and not a slow machine
EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
SNIPPETS = [b"0", b"9", b"-1", b'"', b",", b":", b"[", b"]", b"{", b"}", b"99999999999", b"1e999", b"null", b"\x00"]

Target = tuple[Path, Path]  # what is opened, the file that is damaged


def _hf(folder: Path) -> Target:
    return make.write_hf_folder(folder, SMALL, WEIGHTS), folder / "model.safetensors"


def _config(folder: Path) -> Target:
    return make.write_hf_folder(folder, SMALL, WEIGHTS), folder / "config.json"


def _gguf(folder: Path) -> Target:
    kinds = {"tok_embeddings": "Q8_0", "layers.0.wq": "Q4_1", "layers.0.wk": "Q4_0", "layers.0.wo": "F16"}
    tensors = make.llama_tensors(SMALL, WEIGHTS, lambda name: kinds.get(name, "BF16"))
    folder.mkdir()
    (folder / "m.gguf").write_bytes(make.gguf_bytes(make.llama_entries(SMALL), tensors))
    return folder / "m.gguf", folder / "m.gguf"


def _meta(folder: Path) -> Target:
    write_meta_folder(folder, meta_params(SMALL), meta_shards(SMALL, WEIGHTS), "F32")
    return folder, folder / "consolidated.00.pth"


def _params(folder: Path) -> Target:
    write_meta_folder(folder, meta_params(SMALL), meta_shards(SMALL, WEIGHTS), "F32")
    return folder, folder / "params.json"


def _bin(folder: Path) -> Target:
    make.write_hf_folder(folder, SMALL, WEIGHTS)
    (folder / "model.safetensors").unlink()
    names = {make.hf_name(name): values for name, values in WEIGHTS.items()}
    (folder / "pytorch_model.bin").write_bytes(torch_file(names).bytes())
    return folder, folder / "pytorch_model.bin"


TARGETS: dict[str, Callable[[Path], Target]] = {
    "safetensors": _hf,
    "config": _config,
    "gguf": _gguf,
    "meta": _meta,
    "params": _params,
    "bin": _bin,
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, overwritten by extremes and by JSON's words, or with a piece moved; mostly near the ends."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        near = rng.choice([len(out), min(len(out), 1500), min(len(out), 200)])
        at = rng.randrange(near) if near else 0
        if near < len(out) and rng.random() < 0.3:
            at = len(out) - 1 - at  # a zip's folder stands at its end
        match rng.randrange(6):
            case 0:
                del out[at:]
            case 1 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
            case 3:
                out[at : at + rng.randint(0, 3)] = rng.choice(SNIPPETS)
            case 4:
                del out[at : at + rng.randint(1, 16)]
            case _:
                out[at:at] = out[at : at + rng.randint(1, 64)]
    return bytes(out)


def opened(path: Path) -> str:
    """Opens and reads everything; "" or the refusal without its numbers and names."""
    try:
        source = open_source(path)
        with contextlib.suppress(QuantizeError):
            make_plan(source)
        for tensor in source.tensors.values():
            tensor.read()
            if tensor.grid is not None:
                tensor.read_packed()
        source.tokenizer_files()
    except ModelFormatError as error:
        return re.sub(r"'[^']*'|\d+|\"[^\"]*\"", "#", str(error).split(": ", 1)[-1])[:80]
    return ""


class Fuzzer:
    """The state of a run: inputs worth damaging, words heard, failures kept."""

    def __init__(self, base: Path, seed: int, keep: bool) -> None:
        self.base, self.keep, self.rng = base, keep, random.Random(seed)
        self.targets = {name: build(base / name) for name, build in TARGETS.items()}
        self.seeds = {name: [file.read_bytes()] for name, (_, file) in self.targets.items()}
        self.heard: set[tuple[str, str]] = set()
        self.runs = self.failures = 0

    def replay(self) -> None:
        for name, (path, _) in self.targets.items():
            if opened(path):
                raise SystemExit(f"{name}: the sound checkpoint is refused")
        for file in sorted(CORPUS.glob("*-*")):
            name = file.name.split("-")[0]
            self.seeds[name].append(file.read_bytes())
            self.run(name, file.read_bytes())

    def run(self, name: str, content: bytes) -> None:
        path, file = self.targets[name]
        file.unlink(missing_ok=True)  # a new file each time: the old one may still be mapped
        file.write_bytes(content)
        self.runs += 1
        try:
            words = opened(path)
        except Exception:
            self.failures += 1
            print(f"{name}: {self._kept(name, content)}\n{traceback.format_exc()}", file=sys.stderr)
            return
        if (name, words) not in self.heard:
            self.heard.add((name, words))
            if words:
                self.seeds[name].append(content)
                if self.keep:
                    self._kept(name, content)

    def _kept(self, name: str, content: bytes) -> Path:
        place = CORPUS / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
        place.write_bytes(content)
        return place

    def step(self) -> None:
        name = self.rng.choice(list(self.targets))
        self.run(name, damaged(self.rng.choice(self.seeds[name]), self.rng))


def limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--runs", type=int, help="how many damaged files instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--keep", action="store_true", help="keep what is refused in new words in fuzz/corpus")
    options = parser.parse_args()
    limit_memory()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), options.seed, options.keep)
        fuzzer.replay()
        end = time.monotonic() + options.seconds
        while fuzzer.runs < options.runs if options.runs else time.monotonic() < end:
            fuzzer.step()
    found = {"runs": fuzzer.runs, "refusals of a kind": len(fuzzer.heard), "failures": fuzzer.failures}
    print(json.dumps(found))
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    sys.exit(main())
