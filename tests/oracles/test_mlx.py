"""MLX's packed matrices against mlx.core's own quantize and dequantize, for every number of bits that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama.common.formats import dequantize
from quantize.readers import open_source

from .. import make_sources as make

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed")
SHAPE = make.Shape(dim=128, hidden_dim=192, n_layers=1, n_heads=8)


@pytest.mark.parametrize("number", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 32), (4, 64), (4, 128), (5, 32), (6, 64), (8, 64)])
def test_values(bits: int, group: int, number: str, tmp_path: Path) -> None:
    kinds = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
    shape = make.Shape(**vars(SHAPE) | ({"hidden_dim": 256} if group == 128 else {}))
    plain, extra, expected = {}, {}, {}
    for i, (name, values) in enumerate(make.random_weights(shape).items()):
        if values.ndim == 1:
            plain[name] = values
            continue
        random = np.random.default_rng(i).standard_normal(values.shape).astype(np.float32)
        parts = mx.quantize(mx.array(random).astype(kinds[number]), group_size=group, bits=bits)
        module = make.hf_name(name).removesuffix(".weight")
        extra[f"{module}.weight"] = ("U32", parts[0].shape, np.array(parts[0]).tobytes())
        for part, stored in zip(("scales", "biases"), parts[1:], strict=True):
            extra[f"{module}.{part}"] = (number, stored.shape, bytes(memoryview(stored.view(mx.uint8))))
        numbers = [stored.astype(mx.float32) for stored in parts[1:]]
        expected[name] = np.array(mx.dequantize(parts[0], *numbers, group_size=group, bits=bits))
    config = {"quantization": {"group_size": group, "bits": bits}}
    make.write_hf_folder(tmp_path, shape, plain, extra=extra, **config)
    tensors = open_source(tmp_path).tensors
    for name, values in expected.items():
        tensor = tensors[name]
        if number == "F32":  # there s · c is rounded before m is added, or not: mlx may fuse the two
            np.testing.assert_allclose(tensor.read(), values, rtol=0, atol=2**-23 * np.abs(values).max() * 2)
            continue
        np.testing.assert_array_equal(tensor.read(), values)
        assert (tensor.grid is not None) == (bits <= 4)
        if tensor.grid is not None:
            np.testing.assert_array_equal(dequantize(tensor.grid, tensor.read_packed()), values)
