"""What the engine refuses: one defect of a tensor, a set of tensors or a config each, and the message that names it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from pyllama import _C
from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import FORMATS, TensorSpec
from tests.helpers_models import CODEBOOK, DENSE, QUANTIZED, Kind, Shape, aligned, small_model


def payload(n_bytes: int) -> Any:
    return aligned(np.zeros(n_bytes, dtype=np.uint8))


def spec_arguments(**change: Any) -> dict[str, Any]:
    """A q4 matrix [20, 40] of group 32 that is right: 32 rows, 64 columns, 2 groups."""
    right = {"name": "w", "format": "q4", "shape": [20, 40], "data": payload(32 * 64 // 2 + 32 * 2 * 2), "group": 32}
    return right | change


def test_attributes() -> None:
    weight = _C.Weight(**spec_arguments())
    assert (weight.name, weight.format, weight.shape, weight.nbytes) == ("w", "q4", (20, 40), 1152)
    vector = _C.Weight("v", "f32", [3], payload(64))
    assert (vector.shape, vector.nbytes) == ((3,), 64)


def test_the_format_table_is_pythons() -> None:
    fields = ("name", "code_bits", "quantized", "has_offset", "has_codebook", "code_bias")
    assert _C.format_table() == [{field: getattr(row, field) for field in fields} for row in FORMATS.values()]


@pytest.mark.parametrize("kind", DENSE + QUANTIZED, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (131, 200)], ids=str)
def test_sizes_are_those_of_the_format(kind: Kind, shape: tuple[int, int]) -> None:
    spec = kind.spec("w", shape)
    right = {
        field: getattr(spec, field) for field in ("name", "format", "shape", "group", "scale", "offset", "codebook")
    }
    data = payload(spec.payload_bytes)
    if spec.input_order:
        order = spec.sections[-1]
        data[order.start : order.start + order.nbytes] = np.arange(shape[1], dtype="<i4").view(np.uint8)
    assert _C.Weight(**right, data=data, input_order=spec.input_order).nbytes == spec.payload_bytes
    for wrong in (spec.payload_bytes - 64, spec.payload_bytes + 64, spec.payload_bytes - 1, 0):
        with pytest.raises(
            ModelFormatError, match=f"w: {wrong} bytes, expected {spec.payload_bytes} for {kind.format}"
        ):
            _C.Weight(**right, data=payload(wrong), input_order=spec.input_order)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "q5"}, r'w: format "q5", expected one of f32, f16, bf16, q8, q4, q4a, q4nl, q5nl, q6'),
        ({"shape": []}, r"w: shape \[\], expected \[N, K\] or \[N\]"),
        ({"shape": [1, 2, 3]}, r"w: shape \[1, 2, 3\]"),
        ({"shape": [20]}, "w: a vector in format q4, expected f32"),
        ({"shape": [0, 40]}, r"w: shape \[0, 40\], expected sides in 1…"),
        ({"shape": [20, -40]}, r"w: shape \[20, -40\]"),
        ({"shape": [2**31, 40]}, r"w: shape \[2147483648, 40\]"),
        ({"shape": [2**31 - 2000, 2**31 - 2000]}, "w: the shape describes more bytes than can be addressed"),
        ({"shape": [2**31 - 2000, 2**25]}, f"w: 1152 bytes, expected {(2**31 - 2000) * (2**24 + 2**21)} for q4"),
        ({"group": 0}, "w: group 0, expected 32, 64 or 128"),
        ({"group": 48}, "w: group 48"),
        ({"group": -32}, "w: group -32"),
        ({"scale": "bf16"}, 'w: scale "bf16", but q4 takes only f16'),
        ({"scale": "f32"}, 'w: scale "f32", expected f16 or bf16'),
        ({"offset": "f16"}, 'w: offset "f16", but q4 has no offsets'),
        ({"format": "q4a", "offset": ""}, 'w: offset "", expected f16, bf16 or u8'),
        ({"format": "q4a", "offset": "i8"}, 'w: offset "i8"'),
        ({"format": "f32"}, "w: group 32, but f32 has no groups"),
        ({"codebook": list(CODEBOOK)}, "w: a codebook, but q4 has none"),
        ({"format": "q4nl"}, "w: codebook of 0 entries, expected 16"),
        ({"format": "q4nl", "codebook": [1] * 15}, "w: codebook of 15 entries"),
        ({"format": "q5nl", "codebook": [1] * 16}, "w: codebook of 16 entries, expected 32"),
        ({"format": "q6"}, "w: 1152 bytes, expected 1664 for q6"),
        ({"format": "q4nl", "codebook": [-128] + [0] * 15}, "w: codebook entry -128, expected -127…127"),
        ({"format": "q4nl", "codebook": [0] * 15 + [128]}, "w: codebook entry 128"),
        ({"input_order": True}, "w: input_order, but only q4a may have one"),
        ({"data": payload(1152 + 64)[:1151]}, "w: 1151 bytes, expected 1152"),
        ({"data": payload(1152 + 64)[4:1156]}, "w: the data must be aligned to 64 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_one_defect(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        _C.Weight(**spec_arguments(**change))


@pytest.mark.parametrize(
    "data", [np.zeros(288, np.float32), np.zeros((36, 64), np.uint8)[:, ::2]], ids=["f32", "strided"]
)
def test_data_must_be_plain_bytes(data: Any) -> None:
    with pytest.raises(ValueError, match="w: data must be a contiguous buffer of bytes"):
        _C.Weight(**spec_arguments(data=data))


@pytest.mark.parametrize(
    ("position", "value", "found"), [(0, 40, "40"), (39, -1, "-1"), (7, 8, "8"), (3, 2**31 - 1, "2147483647")]
)
def test_an_input_order_that_is_no_permutation(position: int, value: int, found: str) -> None:
    spec = TensorSpec("w", "q4a", (20, 40), 32, "f16", "f16", (), True)
    order = np.arange(40, dtype="<i4")
    order[position] = value
    data, section = payload(spec.payload_bytes), spec.sections[-1]
    data[section.start : section.start + section.nbytes] = order.view(np.uint8)
    with pytest.raises(
        ModelFormatError, match=rf"w: input_order\[\d+\] is {found}, expected each of 0…39 exactly once"
    ):
        _C.Weight("w", "q4a", (20, 40), data, group=32, scale="f16", offset="f16", input_order=True)


def test_the_buffer_lives_as_long_as_the_model() -> None:
    class Buffer(np.ndarray):  # type: ignore[type-arg]
        """An array that can be watched."""

    small = small_model(Shape(n_layers=1, vocab_size=9))
    values = aligned(np.ones(96, np.float32).view(np.uint8)).view(Buffer)
    watched = weakref.ref(values)
    small.weights["norm"] = _C.Weight("norm", "f32", [96], values)
    model = small.model()
    del values
    small.weights.clear()
    gc.collect()
    assert watched() is not None
    assert model.step([(model.sequence(), [1], _C.Sampler(), "none")])[0].token >= 0
    del model
    gc.collect()
    assert watched() is None


# ---- sets of tensors


def other_weight(name: str, shape: tuple[int, ...]) -> Any:
    return _C.Weight(name, "f32", shape, payload(Kind("f32").spec(name, shape).payload_bytes))


ALL_NAMES = sorted(Shape(n_layers=1).tensors())


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_missing_tensor(name: str) -> None:
    small = small_model(Shape(n_layers=1))
    shape = list(small.weights.pop(name).shape)
    with pytest.raises(ModelFormatError) as caught:
        small.model()
    assert str(caught.value) == f"{name}: missing, expected shape {shape}"


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_tensor_of_another_shape(name: str) -> None:
    small = small_model(Shape(n_layers=1))
    right = small.weights[name].shape
    wrong = (right[0] + 1, *right[1:])
    small.weights[name] = other_weight(name, wrong)
    with pytest.raises(ModelFormatError) as caught:
        small.model()
    assert str(caught.value) == f"{name}: shape {list(wrong)}, expected {list(right)}"


def test_a_vector_for_a_matrix_and_the_other_way_round() -> None:
    small = small_model(Shape(n_layers=1))
    small.weights["layers.0.wq"] = other_weight("layers.0.wq", (96,))
    with pytest.raises(ModelFormatError, match=r"layers.0.wq: shape \[96\], expected \[96, 96\]"):
        small.model()
    small = small_model(Shape(n_layers=1))
    small.weights["norm"] = other_weight("norm", (96, 1))
    with pytest.raises(ModelFormatError, match=r"norm: shape \[96, 1\], expected \[96\]"):
        small.model()


@pytest.mark.parametrize("name", ["layers.1.wq", "layers.0.wz", "rope_freqs"])
def test_an_extra_tensor(name: str) -> None:
    small = small_model(Shape(n_layers=1))
    small.weights[name] = other_weight(name, (96, 96))
    with pytest.raises(ModelFormatError, match=rf"^{name}: unexpected tensor of shape \[96, 96\]"):
        small.model()


def test_a_head_beside_tied_embeddings() -> None:
    small = small_model(Shape(n_layers=1, tied=True))
    small.weights["output"] = other_weight("output", (131, 96))
    with pytest.raises(ModelFormatError, match="output: unexpected tensor, since tied_embeddings is true"):
        small.model()


@pytest.mark.parametrize("which", ["bq", "bk", "bv"])
def test_a_bias_may_stand_alone(which: str) -> None:
    small = small_model(Shape(n_layers=1, biases=True))
    for other in {"bq", "bk", "bv"} - {which}:
        del small.weights[f"layers.0.{other}"], small.values[f"layers.0.{other}"]
    model, sequence_tokens = small.model(), [1, 2, 3]
    found = model.step([(model.sequence(), sequence_tokens, None, "all")])[0].logits
    expected = small.oracle().logits(sequence_tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_weights_of_another_type() -> None:
    small = small_model(Shape(n_layers=1))
    small.weights["norm"] = np.zeros(96, np.float32)
    with pytest.raises(TypeError, match="expected a Weight"):
        small.model()


# ---- configs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "config: dim is 0, expected 1…"),
        ({"hidden_dim": -5}, "config: hidden_dim is -5"),
        ({"n_layers": 2**30}, "config: n_layers is 1073741824"),
        ({"n_layers": 2**40}, "config: n_layers is 1099511627776, expected an integer"),
        ({"vocab_size": "many"}, "config: vocab_size is 'many', expected an integer"),
        ({"dim": 96.5}, "config: dim is 96.5, expected an integer"),
        ({"n_heads": None}, "config: n_heads is None"),
        ({"vocab_size": 2**20}, "config: vocab_size is 1048576, expected at most 1048575"),
        ({"n_kv_heads": 4}, "config: n_heads is 6, expected a multiple of n_kv_heads, 4"),
        ({"head_dim": 15}, "config: head_dim is 15, expected an even number"),
        ({"n_heads": 6 * 2**20, "head_dim": 2**20}, "config: n_heads . head_dim is "),
        ({"norm_eps": -1e-5}, "config: norm_eps is -1e-05"),
        ({"norm_eps": float("nan")}, "config: norm_eps is nan"),
        ({"rope_inv_freq": [1.0] * 7}, "config: rope_inv_freq has 7 entries, expected head_dim / 2 = 8"),
        ({"rope_inv_freq": [1.0] * 7 + [float("inf")]}, "config: rope_inv_freq holds inf"),
        ({"rope_attention_factor": float("inf")}, "config: rope_attention_factor is inf"),
        ({"max_seq_len": 0}, "config: max_seq_len is 0"),
        ({"tied_embeddings": None}, "config: tied_embeddings is None, expected true or false"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_makes_no_model(change: dict[str, Any], message: str) -> None:
    small = small_model(Shape(n_layers=1))
    small.config = small.config | change
    with pytest.raises(ModelFormatError, match=message):
        small.model()


@pytest.mark.parametrize("key", sorted(Shape().config()))
def test_a_missing_key(key: str) -> None:
    small = small_model(Shape(n_layers=1))
    del small.config[key]
    with pytest.raises(ModelFormatError, match=f"config: {key} is missing"):
        small.model()
