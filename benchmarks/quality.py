"""Quality by size: our quantizers and llama.cpp's on the same references, each measured by our engine on exact numbers.

    python -m benchmarks.quality R P [--tokens 50000] [--seeds 3] [--json FILE] [--svg FILE] [--only NAME …]

For each reference (benchmarks/references.py) both sides make their models from the same f16 GGUF. A peer's file is
decoded to float32, exactly, and so is ours, so that weights alone are compared; `runs` is ours as it really runs, with
int8 activations. Sizes are those of all tensors. Peers' importance matrix comes from the same calibration as ours.
`gptq at KIND` has a format for each matrix, and the size of that peer with importance matrix; the ratio of their
divergences, with a bootstrap's 95 % interval over chunks of 512 tokens, is printed last.
Needs llama-cpp-python, which says much on stderr, and gguf.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import pydoc
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.formats import FORMATS, Packed, TensorSpec, dense, dequantize, pack, unpack
from pyllama.common.model_folder import read_model_folder
from quantize import convert
from quantize.compare import EVALUATION_TEXT, Comparison, compare
from quantize.methods import METHODS, Method, Statistics
from quantize.readers import open_source
from quantize.writer import TOKENIZER_FILES, FolderWriter

from .references import gguf_name, write_reference

Floats = NDArray[np.float32]

PEERS = ("Q4_0", "IQ4_XS", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
# name -> what convert() is asked for; the head and the embeddings as everything else.
OURS: dict[str, dict[str, Any]] = {
    f"{method} {format} g{group}": {"method": method, "format": format, "group_size": group}
    for method in METHODS
    for format in FORMATS
    for group in (32, 64, 128)
    if FORMATS[format].quantized
}

# Modules of Python whose documentation is read: prose, lists and code that calibration never saw.
MODULES = (
    "argparse ast asyncio bisect calendar cmd codecs collections concurrent.futures configparser contextlib copy csv "
    "ctypes datetime decimal difflib dis doctest email enum fractions ftplib functools gettext glob graphlib gzip "
    "heapq html http.client imaplib inspect io ipaddress itertools json locale logging lzma mailbox math mimetypes "
    "multiprocessing numbers operator optparse os pathlib pdb pickle platform plistlib pprint profile queue random re "
    "sched secrets selectors shelve shlex shutil signal smtplib socket sqlite3 ssl statistics string struct subprocess "
    "tarfile tempfile textwrap threading timeit tokenize traceback turtle types typing unittest urllib.parse uuid "
    "venv wave weakref xml.dom xmlrpc.client zipfile zoneinfo"
)


def evaluation_text() -> str:
    """The package's story, then the documentation of Python's own modules, of each at most 6,000 characters."""
    parts = [EVALUATION_TEXT.read_text(encoding="utf-8")]
    for name in MODULES.split():
        parts.append(pydoc.plain(pydoc.render_doc(importlib.import_module(name)))[:6000])
    return "\n\n".join(parts)


def quantized_by_peer(source: Path, target: Path, kind: str, importance: dict[str, Any]) -> Path:
    """llama.cpp's quantization of a GGUF; importance: {GGUF's tensor name: float32 [K]}, empty for none."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 2
    if importance:
        entry = llama_cpp.llama_model_imatrix_data
        entries = (entry * (len(importance) + 1))()  # the last one's name is null
        for at, (name, values) in zip(entries, importance.items(), strict=False):
            at.name = name.encode()
            at.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            at.size = len(values)
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(entry))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError(f"llama.cpp could not make {kind}")
    return target


def importance_of(reference: Path, work: Path) -> dict[str, Floats]:
    """E[x²] of each matrix's input in our calibration, by GGUF's names: what an importance matrix file holds."""
    seen: dict[str, Floats] = {}

    def probe(weights: Floats, spec: TensorSpec, statistics: Statistics | None) -> Packed:
        if statistics is not None:
            seen[gguf_name(spec.name)] = statistics.mean_squares.astype(np.float32)
        return METHODS["rtn"].quantize(weights, spec, None)

    METHODS["probe"] = Method(probe, "squares")
    try:
        shutil.rmtree(convert(reference, work / "probe", format="q8", method="probe"))
    finally:
        del METHODS["probe"]
    return seen


def bits_of(source: Path) -> float:
    """Bytes of all tensors of a checkpoint over its weights, in bits."""
    tensors = open_source(source).tensors.values()
    n_weights = sum(tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) == 2 else 1) for tensor in tensors)
    return sum(tensor.n_bytes for tensor in tensors) * 8 / n_weights


def as_float(folder: Path, out: Path) -> Path:
    """A model folder with its weights turned into float32."""
    opened = read_model_folder(folder)
    specs = [TensorSpec(name, "f32", tensor.spec.shape) for name, tensor in opened.tensors.items()]
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name in TOKENIZER_FILES}
    with FolderWriter(out, specs, opened.config, files) as writer:
        for spec in specs:
            tensor = opened.tensors[spec.name]
            values = dequantize(tensor.spec, unpack(tensor.spec, tensor.payload()))
            writer.add_tensor(spec, pack(spec, dense(spec, values)))
        return writer.finish()


def measure(kind: str, seed: int, text: str, n_tokens: int, only: list[str], work: Path) -> list[dict[str, Any]]:
    """A record per model of one reference."""
    reference = work / f"{kind}{seed}.gguf"
    write_reference(kind, reference, seed)
    models: dict[str, tuple[Path, float]] = {}  # name -> folder, bits per weight
    importance = importance_of(reference, work)
    for peer, known in product(PEERS, ({}, importance)):
        name = f"llama.cpp {peer}" + ", imatrix" * bool(known)
        if not wanted(name, only):
            continue
        file = quantized_by_peer(reference, work / f"{name}.gguf", peer, known)
        models[name] = (convert(file, work / name, format="f32"), bits_of(file))
        file.unlink()
    ours = dict(OURS)
    ours |= {
        f"gptq at {peer}": {"method": "gptq", "target_bpw": models[name][1]}
        for peer in PEERS
        if (name := f"llama.cpp {peer}, imatrix") in models
    }
    for name, options in ours.items():
        if not wanted(name, only):
            continue
        made = convert(reference, work / name, **options)
        exact = as_float(made, work / f"{name} exact")
        bits = sum(t.spec.payload_bytes for t in read_model_folder(made).tensors.values()) * 8 / n_weights(made)
        models[name] = (exact, bits)
        models[f"{name}, runs"] = (made, bits)
        print(f"{kind}{seed}: made {name}, {bits:.3f} bits", file=sys.stderr, flush=True)
    found = compare([folder for folder, _ in models.values()], reference, text, max_tokens=n_tokens, progress=_say)
    return [record(kind, seed, name, bits, item) for (name, (_, bits)), item in zip(models.items(), found, strict=True)]


def n_weights(folder: Path) -> int:
    return sum(tensor.spec.n_weights for tensor in read_model_folder(folder).tensors.values())


def wanted(name: str, only: list[str]) -> bool:
    return not only or any(part in name for part in only)


def record(kind: str, seed: int, name: str, bits: float, found: Comparison) -> dict[str, Any]:
    return {"reference": kind, "seed": seed, "name": name, "bits_per_weight": bits, **asdict(found.divergence)}


def _say(done: int, total: int, name: str) -> None:
    print(f"\r{done / total:4.0%}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("references", nargs="+", choices=("P", "R"))
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="parts of names of what is measured")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="an empty folder for models (default: a temporary one)")
    options = parser.parse_args()
    text, records = evaluation_text(), []
    for kind in options.references:
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory(dir=options.work) as folder:
                records += measure(kind, seed, text, options.tokens, options.only, Path(folder))
            if options.json:
                options.json.write_text(json.dumps(records, indent=1) + "\n")
            rows = sorted((row for row in records if row["seed"] == seed and row["reference"] == kind), key=_bits)
            for row in rows:
                print(
                    f"| {kind}{seed} | {row['name']} | {row['bits_per_weight']:.3f} | {row['kl_mean']:.5f} ± "
                    f"{row['kl_error']:.5f} | {row['kl_median']:.5f} | {row['top1']:.2%} |",
                    flush=True,
                )
            print_ratios(rows)


def ratio(mine: Sequence[float], theirs: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Of the mean divergences of two models on the same chunks, and its 95 % interval by a paired bootstrap."""
    a, b = np.array(mine), np.array(theirs)
    drawn = np.random.Generator(np.random.PCG64(1)).integers(0, len(a), (draws, len(a)))
    low, high = np.quantile(a[drawn].mean(axis=1) / b[drawn].mean(axis=1), (0.025, 0.975))
    return float(a.mean() / b.mean()), float(low), float(high)


def print_ratios(rows: list[dict[str, Any]]) -> None:
    """Of the models of one reference: each of ours that has a peer's size beside that peer."""
    by_name = {row["name"]: row for row in rows}
    for peer in PEERS:
        mine, theirs = by_name.get(f"gptq at {peer}"), by_name.get(f"llama.cpp {peer}, imatrix")
        if mine is not None and theirs is not None:
            found, low, high = ratio(mine["kl_chunks"], theirs["kl_chunks"])
            print(f"{mine['name']}: {found:.3f} ({low:.3f} to {high:.3f}) of its divergence", flush=True)


def _bits(row: dict[str, Any]) -> float:
    return float(row["bits_per_weight"])


if __name__ == "__main__":
    main()
