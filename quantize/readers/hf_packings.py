"""Matrices as other quantizers pack them: codes in words of 32 bits, and a scale and an offset per group of columns.

GPTQ (auto-gptq, gptqmodel), AWQ (AutoAWQ's gemm and gemv) and MLX's affine mode differ in where a code lies in a word
and which way words run; all of them are little-endian bit streams. What a config says about them is hf_quantized.py's
affair. Nothing here rounds: `read_packed` hands over codes, scales and offsets as they are stored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError
from pyllama.common.formats import GROUPS, Packed, from_bf16
from pyllama.common.reader import shown

from .source import NUMBERS, Grid, Index, Rows, StoredTensor, consecutive, copy_columns

Array = NDArray[Any]

# Of the eight columns in one of AWQ's words, column c lies at nibble _AWQ_NIBBLES[c]: even ones below, odd ones above.
_AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]
_STEP_WEIGHTS = 1 << 19  # decoded at a time, with as many scales and offsets beside them: some 5 MiB


class Grouped(Rows):
    """[N, K] codes of `bits` bits; group g of row n has scale s and a zero point z, or a minimum m.

    A weight is s · (code − z), or s · code + m. `of_column`: the group of each column where it is not column // group
    (GPTQ's g_idx with act-order), int [K]. zero_points: whether offsets are zero points.
    """

    method = ""
    zero_points = True

    def __init__(
        self, module: str, parts: Mapping[str, StoredTensor], shape: tuple[int, int], bits: int, group: int
    ) -> None:
        self.name = f"{module}.weight"
        self.type_name = f"{self.method}{bits}"
        self.shape = shape
        self.n_bytes = sum(part.n_bytes for part in parts.values())
        self.bits, self.group = bits, min(group, shape[1])
        self.n_groups = -(-shape[1] // self.group)
        self.parts = parts

    @property
    def of_column(self) -> Array | None:
        return None

    @property
    def where(self) -> str:
        return next(iter(self.parts.values())).where

    @property
    def grid(self) -> Grid | None:
        scale = {"F16": "f16", "BF16": "bf16"}.get(self.parts["scales"].type_name)
        group = self._our_group()
        order = self.input_order
        if scale is None or not group or self.bits > 4 or (order is None) != (self.of_column is None):
            return None
        return Grid("q4a", group, scale, "u8" if self.zero_points else scale, input_order=order is not None)

    @property
    def input_order(self) -> Array | None:
        """The columns group by group, int32 [K]; None where they lie so, or where groups have other sizes than ours."""
        of_column = self.of_column
        if of_column is None:
            return None
        sizes = np.bincount(of_column, minlength=self.n_groups)
        if (sizes[:-1] != self.group).any() or sizes[-1] != self.shape[1] - self.group * (self.n_groups - 1):
            return None
        return np.argsort(of_column, kind="stable").astype(np.int32)

    def read(self, index: Index) -> NDArray[np.float32]:
        out = np.empty((len(index), self.shape[1]), np.float32)
        step = max(1, _STEP_WEIGHTS // self.shape[1])
        for first in range(0, len(index), step):
            out[first : first + step] = self._values(index[first : first + step])
        return out

    def _values(self, index: Index) -> NDArray[np.float32]:
        of_column = self.of_column
        scales, offsets = (self._per_column(part, of_column) for part in (self.scales(index), self.offsets(index)))
        values = self.codes(index).astype(np.float32)
        if self.zero_points:
            values -= offsets
            values *= scales
        else:
            values *= scales
            values += offsets
        return values

    def read_packed(self, index: Index) -> Packed:
        grid = self.grid
        if grid is None:
            return super().read_packed(index)
        order = self.input_order
        codes = self.codes(index)
        n_groups = -(-self.shape[1] // grid.group)
        repeats = n_groups if self.n_groups == 1 else self.group // grid.group  # theirs may be several of ours
        scales, offsets = (
            np.ascontiguousarray(np.repeat(part, repeats, axis=1)[:, :n_groups]) if repeats > 1 else part
            for part in (self.scales(index), self.offsets(index))
        )
        return Packed(codes if order is None else codes[:, order], scales, offsets, order)

    def release(self) -> None:
        for part in self.parts.values():
            part.release()

    @abstractmethod
    def codes(self, index: Index) -> Array:
        """uint8 [len(index), K], contiguous."""

    @abstractmethod
    def scales(self, index: Index) -> Array:
        """[len(index), G] as stored: float16, float32, or uint16 that holds bf16."""

    @abstractmethod
    def offsets(self, index: Index) -> Array:
        """[len(index), G]: zero points uint8, or minima as stored."""

    def _our_group(self) -> int:
        """Our largest group that theirs is made of; 0 if there is none."""
        if self.n_groups == 1 and self.of_column is None:
            return max(GROUPS)
        return next((group for group in sorted(GROUPS, reverse=True) if self.group % group == 0), 0)

    def _per_column(self, part: Array, of_column: Array | None) -> NDArray[np.float32]:
        numbers = from_bf16(part) if part.dtype == np.uint16 else part.astype(np.float32)
        if of_column is not None:
            return numbers[:, of_column]
        return np.repeat(numbers, self.group, axis=1)[:, : self.shape[1]]

    def columns(self, part: str, index: Index) -> Array:
        """Columns of a part that is stored transposed: words, or numbers as stored."""
        matrix = self.numbers(part) if self.parts[part].type_name in NUMBERS else self.words(part)
        return copy_columns(self.parts[part].file, matrix, index)

    def words(self, part: str) -> Array:
        """A packed part as uint32, mapped."""
        return self.parts[part].data().view("<u4").reshape(self.parts[part].shape)

    def numbers(self, part: str) -> Array:
        """Scales or minima as stored, mapped."""
        stored = self.parts[part]
        return stored.data().view(NUMBERS[stored.type_name]).reshape(stored.shape)


class GptqRows(Grouped):
    """auto-gptq's and gptqmodel's form: words run down the columns of the transposed matrix.

    qweight I32 [K·bits/32, N]; qzeros I32 [G, N·bits/32], a word holding neighbouring n; scales [G, N]; g_idx I32 [K].
    plus_one: zero points are stored less one (checkpoint_format gptq). Then one is added in every field of a word at
    once, as gptqmodel does: where it stored the zero point 0, the borrow of its subtraction comes back as the carry.
    auto-gptq and auto-round put ones over the rest of the word there instead, and what stood in it is lost; so it is
    looked for, unless `borrows` says that the writer is known to do otherwise.
    """

    method = "GPTQ"

    def __init__(
        self,
        module: str,
        parts: Mapping[str, StoredTensor],
        shape: tuple[int, int],
        bits: int,
        group: int,
        *,
        plus_one: bool,
        symmetric: bool,
        borrows: bool,
    ) -> None:
        super().__init__(module, parts, shape, bits, group)
        self.plus_one, self.symmetric, self.borrows = plus_one, symmetric, borrows
        of_column = np.arange(shape[1]) // self.group
        self._in_order = "g_idx" not in parts or np.array_equal(self._stored_groups(), of_column)

    @property
    def of_column(self) -> Array | None:
        """Read anew each time: kept, those of a large model's matrices would take as much as the conversion."""
        return None if self._in_order else self._stored_groups()

    def _stored_groups(self) -> Array:
        stored = self.parts["g_idx"]
        of_column = np.frombuffer(stored.file.read_at(stored.start, stored.n_bytes), "<i4").astype(np.intp)
        if of_column.min() < 0 or of_column.max() >= self.n_groups:
            wrong = of_column[(of_column < 0) | (of_column >= self.n_groups)][0]
            raise ModelFormatError(
                f"{self.where}: tensor {shown(stored.name)} names group {wrong}, expected 0 to {self.n_groups - 1};"
                " damaged?"
            )
        return of_column

    @property
    def grid(self) -> Grid | None:
        """Symmetric codes of 8 bits are q8 less 128."""
        if self.bits != 8:
            return super().grid
        half = self.parts["scales"].type_name == "F16" and self._our_group()
        return Grid("q8", self._our_group()) if half and self.symmetric and self.of_column is None else None

    def read_packed(self, index: Index) -> Packed:
        packed = super().read_packed(index)
        if self.bits == 8 and packed.offsets is not None:
            if (packed.offsets != 128).any():
                raise ModelFormatError(
                    f"{self.where}: tensor {shown(self.parts['qzeros'].name)} holds other zero points than 128, though"
                    " quantization_config says sym; set sym to false there to have the values rounded to q8"
                )
            return Packed((packed.codes ^ 0x80).view(np.int8), packed.scales)
        return packed

    def codes(self, index: Index) -> Array:
        words = self.columns("qweight", index)
        stream = words.view(np.uint8).reshape(len(words), len(index), 4).transpose(1, 0, 2)
        return unpack_bits(np.ascontiguousarray(stream).reshape(len(index), -1), self.bits)

    def scales(self, index: Index) -> Array:
        return np.ascontiguousarray(self.columns("scales", index).T)

    def offsets(self, index: Index) -> Array:
        span, here = _word_span(index, 32 // self.bits)
        words = self.columns("qzeros", span)
        if self.plus_one:
            words = words + np.uint32(0x11111111 if self.bits == 4 else 0x01010101)
        zeros = unpack_bits(np.ascontiguousarray(words).view(np.uint8), self.bits)
        if self.plus_one:
            self._check_zero_points(zeros)
        return np.ascontiguousarray(zeros[:, consecutive(here)].T)

    def _check_zero_points(self, zeros: Array) -> None:
        """Raises where the stored zero points show that they were not written as the description says."""
        wrong = ""
        if self.symmetric and (zeros == (1 << self.bits >> 1) + 1).all():
            wrong = "zero points as they are, not less one; set checkpoint_format to gptq_v2 in the description"
        elif not self.symmetric and not self.borrows and self._overwritten:
            wrong = (
                f"{self._overwritten} zero points that were lost when it was written: beside one of 0 in their word,"
                " only ones are left; take an export by gptqmodel, an AWQ export, or the original"
            )
        if wrong:
            raise ModelFormatError(f"{self.where}: tensor {shown(self.parts['qzeros'].name)} holds {wrong}")

    @cached_property
    def _overwritten(self) -> int:
        """How many fields lie above one of all ones in words whose every such field has but ones above it.

        A borrow leaves that only where all zero points above it are 1; one such field elsewhere acquits the tensor.
        """
        words, step, count = self.words("qzeros").reshape(-1, 1), 1 << 16, 0
        for first in range(0, len(words), step):
            fields = unpack_bits(np.ascontiguousarray(words[first : first + step]).view(np.uint8), self.bits)
            ones = fields == (1 << self.bits) - 1
            below, above = ones[:, :-1], ones[:, 1:]
            if (below > above).any():
                return 0
            count += int(np.count_nonzero(below))
        return count


class AwqRows(Grouped):
    """AutoAWQ's gemm form: qweight I32 [K, N/8], qzeros I32 [G, N/8], scales [G, N]; a word holds 8 neighbouring n."""

    method = "AWQ"

    def codes(self, index: Index) -> Array:
        return self._unpack("qweight", index)

    def scales(self, index: Index) -> Array:
        return np.ascontiguousarray(self.columns("scales", index).T)

    def offsets(self, index: Index) -> Array:
        return self._unpack("qzeros", index)

    def _unpack(self, part: str, index: Index) -> Array:
        span, here = _word_span(index, 8)
        words = self.columns(part, span)
        nibbles = unpack_bits(words.view(np.uint8), 4).reshape(len(words), -1, 8)[:, :, _AWQ_NIBBLES]
        return np.ascontiguousarray(nibbles.reshape(len(words), -1)[:, consecutive(here)].T)


class AwqGemvRows(Grouped):
    """AutoAWQ's gemv form: qweight I32 [N, K/8], qzeros I32 [N, Z], scales [N, 8 Z]; groups beyond G are padding."""

    method = "AWQ"

    def codes(self, index: Index) -> Array:
        return unpack_bits(_take(self.words("qweight"), index).view(np.uint8), 4)

    def scales(self, index: Index) -> Array:
        return np.ascontiguousarray(_take(self.numbers("scales"), index)[:, : self.n_groups])

    def offsets(self, index: Index) -> Array:
        zeros = unpack_bits(_take(self.words("qzeros"), index).view(np.uint8), 4)
        return np.ascontiguousarray(zeros[:, : self.n_groups])


class MlxRows(Grouped):
    """MLX's affine mode: weight U32 [N, K·bits/32], a bit stream along k; scales and biases [N, G], of one type."""

    method = "MLX"
    zero_points = False

    def codes(self, index: Index) -> Array:
        return unpack_bits(_take(self.words("weight"), index).view(np.uint8), self.bits)

    def scales(self, index: Index) -> Array:
        return _take(self.numbers("scales"), index)

    def offsets(self, index: Index) -> Array:
        return _take(self.numbers("biases"), index)


def unpack_bits(stream: Array, bits: int) -> Array:
    """uint8 [n, bytes] as a little-endian stream of codes of 2 to 8 bits: uint8 [n, bytes·8/bits]."""
    n = len(stream)
    if bits == 8:
        return stream.copy()
    if bits == 4:
        return np.stack([stream & 15, stream >> 4], axis=2).reshape(n, -1)
    octets = np.zeros((n, stream.shape[1] // bits, 8), np.uint8)  # eight codes lie in `bits` bytes
    octets[:, :, :bits] = stream.reshape(n, -1, bits)
    shifts = np.arange(0, 8 * bits, bits, dtype=np.uint64)
    codes = (octets.view("<u8") >> shifts) & np.uint64((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(n, -1)


def _word_span(index: Index, per_word: int) -> tuple[Index, Index]:
    """The words that hold the columns `index`, and where those columns are among the words' own."""
    first, last = int(index.min()) // per_word, int(index.max()) // per_word + 1
    return np.arange(first, last), index - first * per_word


def _take(rows: Array, index: Index) -> Array:
    return np.ascontiguousarray(rows[consecutive(index)])
