"""What opening K-quants costs: divergences of the demo model's K-quants, as they are opened, from their exact numbers.

    python -m benchmarks.gguf_kl [TYPE …] 2>/dev/null    needs llama-cpp-python, which says much, and gguf

The demo's width, 576, is no multiple of 256. It is widened by zeros to 768 without changing what it computes (norms
make up for the longer vector; three heads and the columns behind them are zero), quantized by llama.cpp, and run by our
engine three ways: decoded to float32, as it is opened, and as it is opened with the weights turned back into float32,
which leaves the arithmetic of activations out. Kullback-Leibler divergences in nats, mean over the tokens of a text.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from pyllama import LLM
from pyllama.common.formats import TensorSpec, dense, dequantize, pack, unpack
from pyllama.common.model_folder import read_model_folder
from pyllama.demo import demo_source
from quantize import make_plan, write_plan
from quantize.compare import EVALUATION_TEXT
from quantize.readers import open_source
from quantize.writer import TOKENIZER_FILES, FolderWriter

TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q4_K_S", "IQ4_XS", "Q3_K_M", "Q2_K")
TEXT = EVALUATION_TEXT
WIDTH, HEADS, KV_HEADS = 768, 12, 4
CHUNK, CHUNKS = 512, 3


def widened(name: str, values: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """A tensor of the demo model (canonical name, Hugging Face's row order) with zeros around it."""
    if values.ndim == 1:
        scaled = values * np.float32((dim / WIDTH) ** 0.5)
        return np.concatenate([scaled, np.ones(WIDTH - dim, np.float32)])
    part = name.rsplit(".", 1)[-1]
    rows = {"wq": WIDTH, "wk": KV_HEADS * 64, "wv": KV_HEADS * 64, "wo": WIDTH, "w_down": WIDTH}.get(part, len(values))
    columns = values.shape[1] if part == "w_down" else WIDTH
    out = np.zeros((rows, columns), np.float32)
    out[: len(values), : values.shape[1]] = values
    return out


def write_wide_demo(path: Path) -> None:
    """The demo model, widened, as a GGUF of float32."""
    source, stock = open_source(demo_source()), gguf.GGUFReader(demo_source())
    config = source.config
    writer = gguf.GGUFWriter(path, "llama")
    changed: dict[str, Any] = {
        "llama.embedding_length": WIDTH,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": config["norm_eps"] * config["dim"] / WIDTH,
    }
    for key, entry in stock.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind = entry.types[0]
            sub = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, changed.get(key, entry.contents()), kind, sub_type=sub)
    for name, tensor in source.tensors.items():
        values = widened(name, tensor.read(), config["dim"])
        if name.rsplit(".", 1)[-1] in ("wq", "wk"):
            values = values.reshape(-1, 2, 32, WIDTH).swapaxes(1, 2).reshape(-1, WIDTH)  # pairs side by side
        writer.add_tensor(tensor.source_name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(source: Path, target: Path, kind: str) -> Path:
    """llama.cpp's quantization of a GGUF."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError(f"llama.cpp could not make {kind}")
    return target


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


def log_probabilities(folder: Path) -> NDArray[np.float64]:
    """After each token of the text, float64 [tokens, vocab]."""
    with LLM(folder, n_ctx=CHUNK) as llm:
        ids = llm.tokenizer.encode(TEXT.read_text())
        logits = [llm.logits(ids[i * CHUNK : (i + 1) * CHUNK]) for i in range(CHUNKS)]
    found = np.concatenate(logits).astype(np.float64)
    found -= found.max(axis=1, keepdims=True)
    return found - np.log(np.exp(found).sum(axis=1, keepdims=True))


def divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> str:
    """Mean KL(p, q) and how often the likeliest token is the same."""
    kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    return f"{kl:.6f} ({(p.argmax(axis=1) == q.argmax(axis=1)).mean():.1%})"


def measure(wide: Path, kind: str, work: Path, original: NDArray[np.float64]) -> None:
    source = open_source(quantized(wide, work / f"{kind}.gguf", kind))
    plan = make_plan(source)
    opened = write_plan(plan, work / kind)
    exact = log_probabilities(write_plan(make_plan(source, format="f32"), work / f"{kind}-f32"))
    again = log_probabilities(as_float(opened, work / f"{kind}-again"))
    print(f"{kind}: {plan.change}", flush=True)
    print(f"  the file itself, from the original  {divergence(original, exact)}")
    print(f"  opened: its weights, from the file  {divergence(exact, again)}")
    print(f"  opened: as it runs, from the file   {divergence(exact, log_probabilities(opened))}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wide = work / "wide.gguf"
        write_wide_demo(wide)
        original = log_probabilities(write_plan(make_plan(open_source(wide), format="f32"), work / "wide"))
        narrow = log_probabilities(write_plan(make_plan(open_source(demo_source()), format="f32"), work / "demo"))
        print(f"widened against the demo: {divergence(narrow, original)}", flush=True)
        for kind in sys.argv[1:] or TYPES:
            measure(wide, kind, work, original)


if __name__ == "__main__":
    main()
