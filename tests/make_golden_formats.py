"""Makes tests/golden/formats.json: tiny tensors of every format with their payloads, byte by byte.

Run it by hand after a deliberate change of docs/FORMAT.md and review the difference:
`python -m tests.make_golden_formats`. The numbers follow from simple formulas, not from a random generator: they
are the same everywhere. A payload is a list of lines of 64 bytes in hex; scales and offsets are given by their bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pyllama.common.formats import (
    Q4NL_CODEBOOK,
    Q5NL_CODEBOOK,
    Packed,
    TensorSpec,
    dense,
    dequantize,
    from_float32,
    pack,
)

GOLDEN = Path(__file__).parent / "golden" / "formats.json"

SPECS = (
    TensorSpec("vector", "f32", (5,)),
    TensorSpec("f32", "f32", (3, 5)),
    TensorSpec("f16", "f16", (3, 5)),
    TensorSpec("bf16", "bf16", (17, 3)),
    TensorSpec("q8", "q8", (3, 37), 32),
    TensorSpec("q8 two tiles", "q8", (17, 5), 64),
    TensorSpec("q4", "q4", (3, 37), 32),
    TensorSpec("q4 two tiles", "q4", (17, 9), 128),
    TensorSpec("q4a f16 minimum", "q4a", (3, 37), 32, "f16", "f16"),
    TensorSpec("q4a bf16 minimum", "q4a", (3, 67), 64, "bf16", "bf16"),
    TensorSpec("q4a zero point", "q4a", (5, 33), 32, "f16", "u8"),
    TensorSpec("q4a input order", "q4a", (3, 37), 32, "f16", "u8", input_order=True),
    TensorSpec("q4nl", "q4nl", (3, 37), 32, codebook=Q4NL_CODEBOOK),
    TensorSpec("q5nl", "q5nl", (3, 37), 32, codebook=Q5NL_CODEBOOK),
    TensorSpec("q6", "q6", (17, 37), 64),
)


def example(spec: TensorSpec) -> Packed:
    """The numbers of one golden tensor."""
    if spec.is_vector:
        return dense(spec, (np.arange(spec.shape[0], dtype=np.float32) - 2) / 8)
    i, j = np.indices(spec.shape)
    if not spec.info.quantized:
        return dense(spec, ((7 * i + 3 * j + i * j) / 16 - 1.1).astype(np.float32))
    codes = (7 * i + 3 * j + i * j % 5) % (255 if spec.info.code_bits == 8 else 2**spec.info.code_bits)
    if spec.info.code_bits == 8:
        codes -= 127
    row, group = np.indices((spec.shape[0], spec.n_groups))
    scales = from_float32((-1.0) ** (row + group) * (row + 2 * group + 1) / 96, spec.scale)
    offsets: Any = None
    if spec.offset == "u8":
        offsets = ((5 * row + 3 * group + 7) % 16).astype(np.uint8)
    elif spec.offset:
        offsets = from_float32((row - 3 * group - 1) / 24, spec.offset)
    width = spec.shape[1]
    order = ((np.arange(width) * 5 + 3) % width).astype(np.int32) if spec.input_order else None
    return Packed(codes.astype(np.int8 if spec.info.code_bits == 8 else np.uint8), scales, offsets, order)


def bits(values: Any) -> Any:
    """Stored numbers as lists of their bits; integers as they are; None stays None."""
    if values is None:
        return None
    return values.view(f"u{values.itemsize}").tolist() if values.dtype.kind == "f" else values.tolist()


def entry(spec: TensorSpec) -> dict[str, Any]:
    """One tensor of the golden file."""
    packed = example(spec)
    payload = pack(spec, packed).tobytes().hex()
    return {
        "name": spec.name,
        "metadata": json.loads(spec.to_metadata()),
        "codes": bits(packed.codes),
        "scales": bits(packed.scales),
        "offsets": bits(packed.offsets),
        "input_order": bits(packed.input_order),
        "value_bits": bits(dequantize(spec, packed)),
        "payload": [payload[at : at + 128] for at in range(0, len(payload), 128)],
    }


def golden_text() -> str:
    """The golden file's content: one row or line of bytes per line of text."""
    entries = []
    for spec in SPECS:
        fields = []
        for key, value in entry(spec).items():
            text = json.dumps(value)
            if isinstance(value, list) and len(text) > 100:
                text = "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
            fields.append(f"{json.dumps(key)}: {text}")
        entries.append("{" + ",\n".join(fields) + "}")
    return "[\n" + ",\n".join(entries) + "\n]\n"


if __name__ == "__main__":
    GOLDEN.write_text(golden_text(), encoding="utf-8")
    print(f"{GOLDEN.name}: {len(SPECS)} tensors, {GOLDEN.stat().st_size} bytes")
