"""Quantized Hugging Face checkpoints: what config.json says of them, and which tensors make a matrix.

`unpack_quantized` checks the description key by key and puts one matrix in the place of each module's packed tensors;
what a checkpoint leaves unquantized (norms, embeddings, often the head) stays as it is. GPTQ, AWQ and MLX's affine mode
are known; every other method is refused by name. How codes lie in their words is hf_packings.py's affair.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pyllama.common.errors import ModelFormatError
from pyllama.common.reader import read_json, shown

from .hf_packings import AwqGemvRows, AwqRows, GptqRows, Grouped, MlxRows
from .source import Rows, StoredTensor

# Files in which auto-gptq and AutoAWQ kept their description before config.json had it.
OLD_DESCRIPTIONS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}

# What to take instead of a method that is not read.
OTHER_METHODS = {
    "compressed-tensors": "the original, or a GPTQ or AWQ export",
    "bitsandbytes": "the original: its 4-bit codes are made anew at each loading",
    "fp8": "the original in bf16",
    "fbgemm_fp8": "the original in bf16",
    "modelopt": "the original in bf16",
    "exl2": "the original, or a GPTQ export",
    "exl3": "the original, or a GPTQ export",
    "hqq": "the original, or a GPTQ export",
    "aqlm": "the original, or a GPTQ export",
    "auto-round": "the same model exported by auto-round with --format auto_gptq",
    "intel/auto-round": "the same model exported by auto-round with --format auto_gptq",
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys that say how a checkpoint was made, and nothing of what its numbers mean.
_INFORMATION = _names(
    """act_group_aware amp autoround_version backend batch_size block_name_to_quantize cache_block_outputs
    damp_auto_increment damp_percent data_type dataset disable_exllama enable_minmax_tuning
    enable_quanted_input exllama_config fuse_max_seq_len do_fuse gradient_accumulate_steps hessian iters lm_head
    low_gpu_mem_usage lr max_input_length meta minmax_lr model_file_base_name model_name_or_path model_seqlen
    module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse modules_to_not_convert mse
    not_use_best_mse nsamples pad_token_id parallel_packing provider quant_block_list scale_dtype seqlen static_groups
    tokenizer true_sequential use_cuda_fp16 use_exllama use_marlin"""
)
_GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # that exports may have beside -1, a whole row


def unpack_quantized(config: Mapping[str, Any], folder: Path, stored: Mapping[str, Rows]) -> dict[str, Rows]:
    """`stored` with a matrix for each quantized module of a Hugging Face folder; as it is where none is quantized.

    config: config.json as it stands. Raises ModelFormatError for a method that cannot be read, a description that is
    not understood to the last key, and parts that are missing or do not fit together.
    """
    where, description, method = _description(config, folder, stored)
    if method is None:
        return dict(stored)
    reader = {"gptq": _Gptq, "awq": _Awq, "mlx": _Mlx}[method](description, where)
    out = dict(stored)
    modules = [name.removesuffix(reader.mark) for name in stored if name.endswith(reader.mark)]
    if not modules:
        reader.fail("", f"says that this is a {method.upper()} checkpoint, but no tensor is named *{reader.mark}")
    for module in modules:
        parts = {part: out.pop(f"{module}.{part}") for part in reader.parts if f"{module}.{part}" in stored}
        missing = [part for part in reader.parts if part not in parts and part != "g_idx"]
        if missing:
            reader.fail("", f"module {shown(module)} has no {missing[0]}")
        if f"{module}.weight" in out:
            reader.fail("", f"module {shown(module)} has both {reader.mark[1:]} and weight")
        matrix = reader.rows(module, {part: reader.packed(tensor) for part, tensor in parts.items()})
        out[matrix.name] = matrix
    return out


def _description(
    config: Mapping[str, Any], folder: Path, stored: Mapping[str, Rows]
) -> tuple[str, Mapping[str, Any], str | None]:
    """Where the quantization is described, the description, and its method; None where nothing is quantized."""
    path = str(folder / "config.json")
    found, mlx = config.get("quantization_config"), config.get("quantization")
    for key, value in (("quantization_config", found), ("quantization", mlx)):
        if value is not None and not isinstance(value, dict):
            raise ModelFormatError(f"{path}: {key}: found {shown(value)}, expected an object")
    if mlx:
        if found and found != mlx:
            raise ModelFormatError(f"{path}: quantization and quantization_config disagree; take the original")
        return f"{path}: quantization", mlx, "mlx"
    if found:
        method = found.get("quant_method")
        if method not in ("gptq", "awq"):
            instead = OTHER_METHODS.get(method, "the original") if isinstance(method, str) else "the original"
            raise ModelFormatError(
                f"{path}: quantization_config: quant_method {shown(method)} cannot be read, only gptq, awq and MLX's"
                f" affine mode; take {instead}"
            )
        return f"{path}: quantization_config", found, method
    if any(name.endswith(".qweight") for name in stored):
        for name, method in OLD_DESCRIPTIONS.items():
            if (folder / name).exists():
                return str(folder / name), read_json(folder / name), method
        raise ModelFormatError(
            f"{path}: quantization_config is missing, though tensors are packed (*.qweight);"
            f" expected it there or in {' or '.join(OLD_DESCRIPTIONS)}"
        )
    return path, {}, None


class _Description:
    """A method's description, checked key by key; `rows` makes a matrix of a module's parts."""

    method = ""
    mark = ".qweight"  # the tensor by which a quantized module is known
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def rows(self, module: str, parts: dict[str, StoredTensor]) -> Grouped:
        raise NotImplementedError

    def packed(self, tensor: Rows) -> StoredTensor:
        if not isinstance(tensor, StoredTensor):
            raise ModelFormatError(f"{tensor.where}: tensor {shown(tensor.name)} is packed; expected safetensors")
        return tensor

    def fail(self, key: str, message: str) -> NoReturn:
        raise ModelFormatError(f"{self.where}: {key}{': ' if key else ''}{message}")

    def refuse_unknown(self, known: frozenset[str]) -> None:
        for key in self.values:
            if key not in known and key not in _INFORMATION:
                self.fail(shown(key), "is not known, and may change what the numbers mean; take the original")

    def want(self, key: str, *allowed: Any) -> None:
        """An absent key, or one of these values."""
        if key in self.values and self.values[key] not in allowed:
            expected = " or ".join("null" if value is None else repr(value) for value in allowed)
            self.fail(key, f"found {shown(self.values[key])}, expected {expected}; take the original")

    def integer(self, key: str, allowed: tuple[int, ...]) -> int:
        value = self.values.get(key)
        if type(value) is not int or value not in allowed:
            self.fail(key, f"found {shown(value)}, expected one of {', '.join(map(str, allowed))}")
        return value

    def flag(self, key: str) -> bool:
        if type(self.values.get(key)) is not bool:
            self.fail(key, f"found {shown(self.values.get(key))}, expected true or false")
        return bool(self.values[key])

    def spelling(self, *keys: str, default: str) -> str:
        """One of several keys that mean the same, in lower case; they must agree."""
        given = {key: self.values[key] for key in keys if self.values.get(key) is not None}
        words = {value.lower() if isinstance(value, str) else shown(value) for value in given.values()}
        if len(words) > 1:
            self.fail(" and ".join(given), f"found {' and '.join(sorted(words))}, which disagree")
        return words.pop() if words else default

    def demand(self, tensor: StoredTensor, types: tuple[str, ...], shape: tuple[int, ...]) -> None:
        if tensor.type_name not in types or tensor.shape != shape:
            raise ModelFormatError(
                f"{tensor.where}: tensor {shown(tensor.name)}: {tensor.type_name} {list(tensor.shape)}, expected"
                f" {' or '.join(types)} {list(shape)}; check {self.where}"
            )

    def sides(self, tensor: StoredTensor, types: tuple[str, ...]) -> tuple[int, int]:
        """The two sides of a part, neither of them 0."""
        if tensor.type_name not in types or len(tensor.shape) != 2 or not all(tensor.shape):
            self.demand(tensor, types, (1, 1))
        return tensor.shape[0], tensor.shape[1]


_SCALES = ("F16", "BF16", "F32")


class _Gptq(_Description):
    """auto-gptq, gptqmodel and transformers. Under `dynamic`, modules differ: bits and groups are what shapes say."""

    method = "gptq"
    parts = ("qweight", "qzeros", "scales", "g_idx")
    known = _names(
        """quant_method method bits group_size desc_act sym checkpoint_format format pack_dtype dynamic
        is_marlin_format adapter rotation"""
    )

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values, where)
        self.refuse_unknown(self.known)
        self.want("quant_method", "gptq")
        self.want("method", "gptq")
        self.want("pack_dtype", "int32")
        self.want("is_marlin_format", False, None)
        self.want("adapter", None, {})
        self.want("rotation", None, "")
        form = self.spelling("checkpoint_format", "format", default="gptq")
        if form not in ("gptq", "gptq_v2"):
            self.fail("checkpoint_format", f"found {shown(form)}, only gptq and gptq_v2 can be read; take the original")
        self.plus_one = form == "gptq"
        meta = values.get("meta")
        self.borrows = "gptqmodel" in shown(meta.get("quantizer") if isinstance(meta, dict) else None).lower()
        self.dynamic = bool(values.get("dynamic"))
        self.bits = self.integer("bits", (2, 3, 4, 8) if self.dynamic else (4, 8))
        self.group = self.integer("group_size", (-1, *_GROUPS))
        self.desc_act, self.symmetric = self.flag("desc_act"), self.flag("sym")

    def rows(self, module: str, parts: dict[str, StoredTensor]) -> Grouped:
        n_groups, n = self.sides(parts["scales"], _SCALES)
        words, _ = self.sides(parts["qweight"], ("I32",))
        _, zero_words = self.sides(parts["qzeros"], ("I32",))
        bits = 32 * zero_words // n if self.dynamic else self.bits
        if bits not in (4, 8):
            self.fail("dynamic", f"module {shown(module)} has {bits} bits, only 4 and 8 can be read; take the original")
        k = words * 32 // bits
        group = self._group(module, k, n_groups) if self.dynamic else (k if self.group == -1 else self.group)
        self.demand(parts["qweight"], ("I32",), (k * bits // 32, n))
        self.demand(parts["scales"], _SCALES, (math.ceil(k / group), n))
        self.demand(parts["qzeros"], ("I32",), (n_groups, n * bits // 32))
        if n * bits % 32:
            self.fail("bits", f"{bits} bits of {n} rows of {shown(module)} fill no whole words")
        if "g_idx" in parts:
            self.demand(parts["g_idx"], ("I32",), (k,))
        elif self.desc_act:
            self.fail("desc_act", f"is true, but module {shown(module)} has no g_idx")
        how = {"plus_one": self.plus_one, "symmetric": self.symmetric, "borrows": self.borrows}
        return GptqRows(module, parts, (n, k), bits, group, **how)

    def _group(self, module: str, k: int, n_groups: int) -> int:
        fits = [group for group in _GROUPS if math.ceil(k / group) == n_groups]
        if n_groups == 1:
            return k
        if len(fits) != 1:
            self.fail("dynamic", f"module {shown(module)} has {n_groups} groups of {k} columns; no one size makes them")
        return fits[0]


class _Awq(_Description):
    """AutoAWQ, by itself or through transformers and gptqmodel."""

    method = "awq"
    known = _names(
        """quant_method method bits w_bit group_size q_group_size zero_point version checkpoint_format format pack_dtype
        desc_act sym dynamic"""
    )

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        older = {"w_bit": "bits", "q_group_size": "group_size"}  # AutoAWQ's own names
        super().__init__({older.get(key, key): value for key, value in values.items()}, where)
        self.refuse_unknown(self.known)
        self.want("quant_method", "awq")
        self.want("method", "awq")
        self.want("pack_dtype", "int32")
        self.want("zero_point", True, False)  # symmetric exports carry zero points too, all 8
        self.want("desc_act", False, None)
        self.want("dynamic", None, {})
        if str(self.values.get("backend")).lower() == "llm-awq":
            self.fail("backend", "llm-awq packs in a form of its own, which cannot be read; take an AutoAWQ export")
        self.form = self.spelling("version", "checkpoint_format", "format", default="gemm")
        if self.form not in ("gemm", "gemv"):
            self.fail("version", f"found {shown(self.form)}, only gemm and gemv can be read; take a gemm export")
        self.integer("bits", (4,))
        self.group = self.integer("group_size", (-1, *_GROUPS))

    def rows(self, module: str, parts: dict[str, StoredTensor]) -> Grouped:
        first, second = self.sides(parts["qweight"], ("I32",))
        k, n = (first, 8 * second) if self.form == "gemm" else (8 * second, first)
        group = k if self.group == -1 else self.group
        if k % group:
            self.fail("group_size", f"{group} does not divide the {k} columns of {shown(module)}")
        if self.form == "gemm":
            self.demand(parts["qzeros"], ("I32",), (k // group, n // 8))
            self.demand(parts["scales"], _SCALES, (k // group, n))
            return AwqRows(module, parts, (n, k), 4, group)
        _, words = self.sides(parts["qzeros"], ("I32",))
        words = max(words, math.ceil(k // group / 8))
        self.demand(parts["qzeros"], ("I32",), (n, words))
        self.demand(parts["scales"], _SCALES, (n, 8 * words))
        return AwqGemvRows(module, parts, (n, k), 4, group)


class _Mlx(_Description):
    """mlx-lm: group_size, bits and mode of all modules, and by a module's name what it has instead."""

    method = "mlx"
    mark = ".scales"
    parts = ("weight", "scales", "biases")
    known = frozenset(("group_size", "bits", "mode"))
    all_bits = (2, 3, 4, 5, 6, 8)
    all_groups = (16, 32, 64, 128)

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values, where)
        self.own = {key: value for key, value in values.items() if isinstance(value, (dict, bool))}
        for key in values:
            if key not in self.known and key not in self.own:
                self.fail(shown(key), f"is not known, expected one of {', '.join(sorted(self.known))} or a module")
        self._numbers(self)

    def _numbers(self, of: _Description) -> tuple[int, int]:
        of.want("mode", "affine", None)
        return of.integer("bits", self.all_bits), of.integer("group_size", self.all_groups)

    def rows(self, module: str, parts: dict[str, StoredTensor]) -> Grouped:
        own = self.own.get(module, True)
        if own is False:
            self.fail(shown(module), "is false, but the module is quantized")
        of: _Description = self
        if isinstance(own, dict):
            of = _Description({**{key: self.values.get(key) for key in self.known}, **own}, f"{self.where}: {module}")
            of.refuse_unknown(self.known)
        bits, group = self._numbers(of)
        n, words = of.sides(parts["weight"], ("U32",))
        k = words * 32 // bits
        if words * 32 % bits or k % group:
            self.fail("group_size", f"{words} words of {bits} bits in {shown(module)} are no groups of {group} columns")
        of.demand(parts["scales"], _SCALES, (n, k // group))
        of.demand(parts["biases"], (parts["scales"].type_name,), (n, k // group))
        return MlxRows(module, parts, (n, k), bits, group)
