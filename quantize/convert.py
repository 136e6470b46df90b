"""From a checkpoint to a model folder: decides each tensor's format; pipeline.py carries the plan out.

A matrix is repacked when the source has it on the wanted grid already, without loss or (GGUF's Q4_K and IQ4_XS) with
scales rounded to f16, and quantized by the method otherwise. Reading sources is readers/', choosing codes methods/'
affair.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyllama.common.errors import QuantizeError
from pyllama.common.formats import (
    CODEBOOKS,
    FORMATS,
    GROUPS,
    VERSION,
    TensorSpec,
)
from pyllama.common.model_folder import check_config, check_tensors, header_bytes

from .allocate import Target, allocate
from .calibration import in_order
from .calibration_texts import DEFAULT_TOKENS, MIX, SELF, TEXT_TOKENS, Calibration, read_texts
from .compare import EVALUATION_TEXT
from .lora import merge_adapters
from .methods import METHODS
from .pipeline import Progress, ProgressFunction, cores, resident_bytes, write_plan
from .readers import Source, SourceTensor, open_source
from .sensitivity import Choice, Report, Yardstick, bytes_held, measured_costs
from .writer import check_output

DEFAULT_FORMAT = "q8"  # of matrices on no grid of ours, when no format is asked for
DEFAULT_GROUP = 32
TARGET_FORMAT = "q4nl"  # where a plan begins that is to have a size or a divergence
_SENSITIVITY_TEXTS = 2


@dataclass(frozen=True)
class Planned:
    """What becomes of a tensor. how: `repack` (the source's codes as they are), `quantize` or `cast` to dense."""

    source: SourceTensor
    spec: TensorSpec
    how: str

    @property
    def rounds_scales(self) -> bool:
        """A repack whose scales and minima have more digits in the source than here."""
        return self.how == "repack" and not self.source.exact


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, decided before any weight is read."""

    source: Source
    tensors: tuple[Planned, ...]
    format: str  # of most weights
    group: int
    method: str  # "repack" when every matrix is repacked
    calibration: Calibration | None = None  # for a method that needs statistics
    target: Target | None = None  # what formats were chosen for, measured; None: one format for all
    predicted_kl: float | None = None  # mean divergence of the next token that the chosen formats are thought to make
    yardstick: Yardstick | None = None  # by which that is measured when all is written

    @property
    def payload_bytes(self) -> int:
        """Bytes of all payloads."""
        return sum(item.spec.payload_bytes for item in self.tensors)

    @property
    def n_weights(self) -> int:
        """Weights of the model, vectors included."""
        return sum(item.spec.n_weights for item in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """All payload bytes, scales and padding included, over all weights."""
        return self.payload_bytes * 8 / self.n_weights

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors in the source."""
        return sum(item.source.n_bytes for item in self.tensors)

    @property
    def change(self) -> str:
        """What becomes of types and size, for a line of text: `Q4_K to q4a, 4.50 -> 5.00 bits per weight, …`."""
        before = self.source_bytes * 8 / self.n_weights
        return (
            f"{self._most(lambda item: item.source.dtype)} to {self._most(lambda item: item.spec.format)}, "
            f"{before:.2f} -> {self.bits_per_weight:.2f} bits per weight, "
            f"{size_text(self.source_bytes)} -> {size_text(self.payload_bytes)}"
        )

    def _most(self, kind_of: Callable[[Planned], str]) -> str:
        """The two kinds of matrices that most weights are of."""
        weights: dict[str, int] = {}
        for item in self.tensors:
            if not item.spec.is_vector:
                weights[kind_of(item)] = weights.get(kind_of(item), 0) + item.spec.n_weights
        return " and ".join(sorted(weights, key=lambda kind: -weights[kind])[:2])

    def in_words(self) -> str:
        """What becomes of the matrices: how many are taken over, rounded, or changed to other numbers."""
        counts: dict[str, int] = {}
        for item in self.tensors:
            if not item.spec.is_vector:
                group = f" g{item.spec.group}" if item.spec.group else ""
                how = {"repack": "repacked without loss", "quantize": f"by {self.method}", "cast": "as numbers"}[
                    item.how
                ]
                how = "repacked with rounded scales" if item.rounds_scales else how
                name = f"{item.spec.format}{group} {how}"
                counts[name] = counts.get(name, 0) + 1
        return ", ".join(
            f"{n} {'matrix' if n == 1 else 'matrices'} to {name}"
            for name, n in sorted(counts.items(), key=lambda pair: -pair[1])
        )

    def config(self) -> dict[str, Any]:
        """config.json of the model folder."""
        quantization: dict[str, Any] = {"format": self.format}
        if self.group:
            quantization["group"] = self.group
        quantization.update(method=self.method, bits_per_weight=round(self.bits_per_weight, 4))
        if self.target is not None and self.predicted_kl is not None:
            quantization.update(target=self.target.in_words(), predicted_kl=float(f"{self.predicted_kl:.3g}"))
        # Without the time of the file's last change, so that the same source always gives the same bytes.
        identity = {key: value for key, value in self.source.identity.items() if key != "mtime_ns"}
        head = {"format": "pyllama", "version": int(VERSION)}
        return {**head, **self.source.config, **head, "quantization": quantization, "source": identity}


def size_text(n_bytes: int) -> str:
    """A size for reading, as `4.41 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.3g} {unit}" if n_bytes < 100 * scale else f"{n_bytes / scale:.0f} {unit}"
    return f"{n_bytes} bytes"


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    group_size: int | None = None,
    method: str = "rtn",
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    lora: Sequence[tuple[str | os.PathLike[str], float]] = (),
    target_size: int | None = None,
    target_bpw: float | None = None,
    max_kld: float | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    progress: ProgressFunction | None = None,
) -> Path:
    """Converts the checkpoint `src` (Hugging Face's or Meta's, or a GGUF) into a model folder `out`; returns its path.

    format: of all matrices; None repacks those that are on a grid of ours (docs/GGUF.md) and makes the others q8.
    group_size: 32, 64 or 128 columns per scale of what is quantized (default 32). method: how codes are chosen.
    calibration: for a method that runs texts through the model: a text file, "self" (sampled from the model), or by
    default "mix", our own; calibration_tokens: about how many tokens of it (default 16384).
    tensor_types: (regular expression, format) pairs for canonical names; the last that is found in a name decides.
    lora: PEFT adapters to be merged, each a folder and a factor.
    target_size (bytes of model.safetensors), target_bpw (bits per weight), max_kld (mean KL divergence of the next
    token, in nats, as predicted): one of them chooses a format for each matrix by what it is measured to cost, in place
    of `format` and `group_size`; tensor_types still decide.
    resume: goes on with a conversion to `out` that was stopped, to the same bytes, and keeps what is done if this one
    is stopped. max_memory: bytes that may be resident, mapped files included.
    Raises ModelFormatError for a defective source, QuantizeError when the output cannot be written or the request makes
    no sense for this model, ValueError for unknown formats, groups and methods. A failure leaves nothing at `out`.
    """
    check_request(format, group_size, method, tensor_types, calibration, calibration_tokens)
    aim = target_of(target_size, target_bpw, max_kld)
    check_target(aim, format, group_size)
    folder = check_output(out, overwrite=overwrite or resume)
    source = merge_adapters(open_source(src), lora)
    plan = make_plan(
        source,
        format=format if aim is None else TARGET_FORMAT,
        group_size=group_size,
        method=method,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        tensor_types=tensor_types,
    )
    if aim is not None:
        plan = aimed_at(aim, plan, calibration=calibration, tensor_types=tensor_types, max_memory=max_memory)
    return write_plan(plan, folder, overwrite=overwrite, resume=resume, max_memory=max_memory, progress=progress)


def check_request(
    format: str | None,
    group_size: int | None,
    method: str,
    tensor_types: Sequence[tuple[str, str]],
    calibration: str | None = None,
    calibration_tokens: int | None = None,
) -> None:
    """Raises ValueError for an unknown format, group size or method, a broken regular expression, or calibration that
    the method has no use for.
    """
    for name in [format] * (format is not None) + [wanted for _, wanted in tensor_types]:
        if name not in FORMATS:
            raise ValueError(f"unknown format {name!r}, expected one of {' '.join(FORMATS)}")
    if group_size is not None and group_size not in GROUPS:
        raise ValueError(f"group size {group_size}, expected 32, 64 or 128")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, expected one of {' '.join(METHODS)}")
    if not METHODS[method].needs and (calibration is not None or calibration_tokens is not None):
        data = " ".join(name for name, row in METHODS.items() if row.needs)
        raise ValueError(f"method {method} needs no calibration; methods that do are {data}")
    if calibration_tokens is not None and calibration_tokens < 1:
        raise ValueError(f"{calibration_tokens} tokens for calibration, expected at least 1")
    for pattern, _ in tensor_types:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"regular expression {pattern!r}: {error}") from None


def target_of(n_bytes: int | None, bpw: float | None, kld: float | None) -> Target | None:
    """None where nothing is given; ValueError for more than one or what is no positive number."""
    return None if n_bytes is bpw is kld is None else Target(n_bytes, bpw, kld)


def check_target(target: Target | None, format: str | None, group_size: int | None) -> None:
    """Raises ValueError where formats are chosen twice."""
    if target is not None and (format is not None or group_size is not None):
        raise ValueError(
            f"{'a format' if format is not None else 'a group size'} for all matrices, and a target for which each "
            "gets its own: give one of them; --tensor-type fixes single matrices"
        )


def make_plan(
    source: Source,
    *,
    format: str | None = None,
    group_size: int | None = None,
    method: str = "rtn",
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
) -> Plan:
    """Decides the format of every tensor of an opened source; arguments as in `convert`. Reads no weights."""
    check_request(format, group_size, method, tensor_types, calibration, calibration_tokens)
    check_config(source.config, "source")
    check_tensors(source.config, {name: tensor.shape for name, tensor in source.tensors.items()}, "source")
    rules = [(re.compile(pattern), wanted) for pattern, wanted in tensor_types]
    unused = set(range(len(rules)))
    planned: list[Planned] = []
    for name, tensor in source.tensors.items():
        wanted = format
        for i, (pattern, chosen) in enumerate(rules):
            if len(tensor.shape) == 2 and pattern.search(name):
                wanted = chosen
                unused.discard(i)
        planned.append(_plan_tensor(name, tensor, wanted, group_size))
    if unused:
        raise QuantizeError(
            f"--tensor-type {rules[min(unused)][0].pattern!r} fits no matrix; "
            "names are like layers.0.wq, and vectors stay f32"
        )
    if group_size is not None and not any(item.spec.group == group_size for item in planned):
        raise QuantizeError(f"group size {group_size} would apply to no matrix; say which format, as --format q4")
    plan = _summarize(source, planned, method)
    if plan.method not in METHODS or not METHODS[plan.method].needs:
        return plan
    wish = Calibration(calibration or MIX, calibration_tokens or DEFAULT_TOKENS)
    return replace(plan, tensors=in_order(source.config, plan.tensors), calibration=wish)


def aimed_at(
    target: Target,
    plan: Plan,
    *,
    calibration: str | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    max_memory: int | None = None,
    progress: Report | None = None,
) -> Plan:
    """The plan with another format for each matrix that tensor_types leave open, such that the target is met.

    Texts run through the model, of the calibration (or our mix, for "self"), to measure what each matrix costs: the one
    thing here that reads weights, and takes minutes. Raises QuantizeError where the target cannot be met.
    """
    source, method = plan.source, plan.method if plan.method in METHODS else "rtn"
    tokens = _SENSITIVITY_TEXTS * TEXT_TOKENS
    wish = Calibration(MIX if calibration in (None, SELF) else str(calibration), tokens)
    held = bytes_held(source, tokens)
    if max_memory is not None and resident_bytes()[0] + held > max_memory:
        raise QuantizeError(
            f"--max-memory {max_memory / 1e6:.0f} MB: measuring what each matrix costs takes {held / 1e6:.0f} MB more "
            f"than the {resident_bytes()[0] / 1e6:.0f} MB that are in use; choose formats by --format and --tensor-type"
        )
    about = (source.tokenizer_files(), plan.config(), source.identity["name"], _no_sample, Path())
    texts = read_texts(wish, *about)
    held_out = read_texts(replace(wish, name=str(EVALUATION_TEXT)), *about)
    costs, yardstick = measured_costs(source, texts, held_out, cores(), progress)
    open_ones = {
        name: cost for name, cost in costs.items() if not any(re.search(pattern, name) for pattern, _ in tensor_types)
    }
    fixed = sum(item.spec.payload_bytes for item in plan.tensors if item.spec.name not in open_ones)
    if target.n_bytes is not None:
        widest = [
            _plan_tensor(n, t, "q5nl", None).spec for n, t in source.tensors.items()
        ]  # its codebook is the longest
        fixed += len(header_bytes(widest, dict.fromkeys(source.tensors, "0" * 64), {}))
    found = allocate(open_ones, fixed, plan.n_weights, target, method)
    tensors = tuple(_with_choice(item, found.choices.get(item.spec.name)) for item in plan.tensors)
    summary = _summarize(source, list(tensors), method)
    return replace(
        plan,
        tensors=tensors,
        format=summary.format,
        group=summary.group,
        target=target,
        predicted_kl=found.kl,
        yardstick=yardstick,
    )


def _with_choice(item: Planned, choice: Choice | None) -> Planned:
    return item if choice is None else _plan_tensor(item.spec.name, item.source, *choice)


def _no_sample(folder: Path) -> Path:
    raise AssertionError(f"{folder}: sensitivity does not sample from the model")


def _plan_tensor(name: str, tensor: SourceTensor, wanted: str | None, group_size: int | None) -> Planned:
    if len(tensor.shape) == 1:
        return Planned(tensor, TensorSpec(name, "f32", tensor.shape), "cast")
    grid = tensor.grid
    if grid is not None:
        if wanted is None and grid.info.quantized:
            return Planned(tensor, grid, "repack")
        same_group = not grid.info.quantized or group_size in (None, grid.group)
        if wanted == grid.format and same_group:
            return Planned(tensor, grid, "repack")
    format = wanted or DEFAULT_FORMAT
    if not FORMATS[format].quantized:
        return Planned(tensor, TensorSpec(name, format, tensor.shape), "cast")
    spec = TensorSpec(
        name,
        format,
        tensor.shape,
        group=group_size or DEFAULT_GROUP,
        offset="f16" if FORMATS[format].has_offset else "",
        codebook=CODEBOOKS.get(format, ()),
    )
    return Planned(tensor, spec, "quantize")


def _summarize(source: Source, planned: list[Planned], method: str) -> Plan:
    weights: dict[tuple[str, int], int] = {}
    matrices = [item for item in planned if not item.spec.is_vector]
    for item in matrices:
        kind = (item.spec.format, item.spec.group)
        weights[kind] = weights.get(kind, 0) + item.spec.n_weights
    format, group = max(weights, key=lambda kind: weights[kind])
    hows = {item.how for item in matrices}
    return Plan(
        source, tuple(planned), format, group, method if "quantize" in hows else min(hows, key="repack cast".index)
    )


__all__ = [
    "Plan",
    "Planned",
    "Progress",
    "ProgressFunction",
    "check_request",
    "convert",
    "make_plan",
    "size_text",
    "write_plan",
]
