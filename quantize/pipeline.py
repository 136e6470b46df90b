"""Carries out a plan: blocks of rows are read, converted and packed by some threads and written in order by the caller.

A block is one piece of work from source to tiles, and only the order in which blocks are written makes the file: the
bytes are the same for any number of threads and any size of blocks. A method that needs statistics gets its blocks in
the order of the layers (calibration.py). `max_memory` bounds what is resident: blocks become
smaller and threads fewer until what they take fits, and pages of the source are let go of as soon as they were read.
What becomes of a tensor was decided before (convert.py); where bytes go is writer.py's affair.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyllama.common.errors import ModelFormatError, QuantizeError
from pyllama.common.formats import TILE_ROWS, Packed, TensorSpec, check_finite, dense, pack, round_up
from pyllama.common.reader import BoundedFile, recorded_files

from . import kernels
from .calibration import Block, LayerByLayer, bytes_needed
from .calibration_texts import Texts, read_texts
from .golden import golden_files
from .methods import METHODS, Statistics
from .sensitivity import divergence
from .writer import GENERATION_FILE, FolderWriter, clear, is_written

if TYPE_CHECKING:
    from .convert import Plan, Planned

_BLOCK_WEIGHTS = 1 << 20
_MAX_THREADS = 8
# What a weight of a block takes at most while a thread works on it: its page of the source, float32 twice (K-quants and
# casts), codes, tiles, and what numpy keeps in between. Blocks that wait to be written hold tiles alone.
_WORK_BYTES, _WAITING_BYTES = 20, 4
_FIXED_BYTES = 24 << 20  # the file's end, digests, threads' stacks, the allocator's slack
_STEP_BYTES = 12 << 20  # what a reader's own steps take in each thread, whatever the block (readers/source.py)


@dataclass(frozen=True)
class Progress:
    """How far a conversion is, in weights; `name` is the tensor at work."""

    done: int
    total: int
    name: str


ProgressFunction = Callable[[Progress], None]


def write_plan(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    max_memory: int | None = None,
    threads: int | None = None,
    progress: ProgressFunction | None = None,
) -> Path:
    """Carries out a plan. Returns the folder; arguments and errors as in `convert`; threads: default one per core."""
    with recorded_files() as read_now:
        files = plan.source.tokenizer_files()  # before the long part, as it may fail
    if plan.source.generation_config and GENERATION_FILE not in files:
        files[GENERATION_FILE] = (json.dumps(plan.source.generation_config, indent=2) + "\n").encode()
    specs, config = [item.spec for item in plan.tensors], plan.config()
    threads = threads or min(_MAX_THREADS, cores())
    target = Path(out).resolve()
    texts = _texts(plan, files, config, target, max_memory, threads)
    files |= golden_files(files, config, plan.source.identity["name"])
    watched = _Watched((*plan.source.files, *read_now))
    if resume and is_written(target, specs, config, files, after=watched.newest):
        clear(target)
        return target
    watched.release(sparing=max_memory is not None)  # what checking has looked at
    work = _Work.within(plan, max_memory, threads)
    writer = FolderWriter(target, specs, config, files, overwrite=overwrite, resume=resume, source=watched.stamp)
    with writer:
        finished = set(writer.finished)
        done = sum(item.spec.n_weights for item in plan.tensors if item.spec.name in finished)
        with closing(_blocks_of(plan, texts, work, writer)) as blocks:
            for item, rows, payload in blocks:
                watched.check(item.spec.name)
                writer.add_rows(item.spec, rows.stop - rows.start, payload)
                done += (rows.stop - rows.start) * (1 if item.spec.is_vector else item.spec.shape[1])
                if max_memory is not None:
                    watched.release()
                if progress is not None:
                    progress(Progress(done, plan.n_weights, item.spec.name))
        watched.check("the end")
        if plan.yardstick is not None:
            found = divergence(plan.source, plan.yardstick, specs, writer.payload, threads)
            config["quantization"]["measured_kl"] = float(f"{found:.3g}")
            writer.set_config(config)
        return writer.finish()


def _texts(
    plan: Plan, files: dict[str, bytes], config: dict[str, Any], target: Path, max_memory: int | None, threads: int
) -> Texts | None:
    """The texts of a plan that calibrates, which its config then tells of. target: the output."""
    if plan.calibration is None:
        return None

    def sample(folder: Path) -> Path:
        from .convert import make_plan

        whole = make_plan(plan.source)
        if max_memory is not None and resident_bytes()[0] + whole.payload_bytes > max_memory:
            raise QuantizeError(
                f"--max-memory {max_memory / 1e6:.0f} MB: to sample from the model it is opened whole, "
                f"{whole.payload_bytes / 1e6:.0f} MB; calibrate with a file"
            )
        # What a killed run has left there is taken if it is whole, else replaced.
        left = folder.exists()
        return write_plan(whole, folder, overwrite=True, resume=left, max_memory=max_memory, threads=threads)

    texts = read_texts(plan.calibration, files, config, plan.source.identity["name"], sample, target)
    config["quantization"]["calibration"] = texts.record()
    return texts


def _blocks_of(plan: Plan, texts: Texts | None, work: _Work, writer: FolderWriter) -> Generator[Block, None, None]:
    """All blocks that are still to be written, in order."""
    finished = set(writer.finished)
    if texts is None:
        return _converted([item for item in plan.tensors if item.spec.name not in finished], plan.method, work)

    def convert(items: Sequence[Planned], statistics: Statistics | None) -> Generator[Block, None, None]:
        return _converted(items, plan.method, work, statistics)

    return LayerByLayer(plan, texts, convert, finished, writer.payload, work.threads).blocks()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- blocks ----------------------------------------------------------------------------------------------------------


def _converted(
    items: Sequence[Planned], method: str, work: _Work, statistics: Statistics | None = None
) -> Generator[Block, None, None]:
    """All blocks in order, each packed as a tensor of its own."""
    waiting: deque[tuple[Planned, slice, Future[NDArray[np.uint8]]]] = deque()

    def next_one() -> Block:
        item, rows, future = waiting.popleft()
        return item, rows, future.result()

    with ThreadPoolExecutor(work.threads, thread_name_prefix="quantize") as pool:
        try:
            for item in items:
                for rows in _blocks(item.spec, work.block_weights):
                    waiting.append((item, rows, pool.submit(_pack_block, item, rows, method, statistics)))
                    if len(waiting) > work.threads:
                        yield next_one()
            while waiting:
                yield next_one()
        finally:
            for _, _, future in waiting:
                future.cancel()


def _blocks(spec: TensorSpec, block_weights: int) -> Iterator[slice]:
    """The rows of a tensor in blocks of whole tiles; a vector at once."""
    n_rows = spec.shape[0]
    step = n_rows if spec.is_vector else round_up(max(1, block_weights // spec.shape[1]), TILE_ROWS)
    for first in range(0, n_rows, step):
        yield slice(first, min(first + step, n_rows))


def _pack_block(item: Planned, rows: slice, method: str, statistics: Statistics | None) -> NDArray[np.uint8]:
    spec, source = item.spec, item.source
    if spec.is_vector:
        return pack(spec, _cast(spec, source.read()))
    if item.how == "repack":
        packed = source.read_packed(rows)
        check_finite(spec, packed)
    elif item.how == "quantize":
        chosen = METHODS["rtn" if METHODS[method].needs and statistics is None else method]
        values = source.read(rows)
        packed = chosen.quantize(values if statistics is None else statistics.corrected(values, rows), spec, statistics)
    else:
        packed = _cast(spec, source.read(rows))
    return pack(replace(spec, shape=(rows.stop - rows.start, spec.shape[1])), packed, kernels.tiles())


def _cast(spec: TensorSpec, values: NDArray[np.float32]) -> Packed:
    packed = dense(spec, values)
    try:
        check_finite(spec, packed)
    except ModelFormatError:
        if not np.isfinite(values).all():
            raise
        raise QuantizeError(
            f"{spec.name}: has values up to {np.abs(values).max():.6g}, beyond {spec.format}; choose f32"
            + (" or bf16" if spec.format == "f16" else "")
        ) from None
    return packed


# ---- the source's files ----------------------------------------------------------------------------------------------


class _Watched:
    """The files that a conversion reads: the same ones, unchanged, from the first byte to the last."""

    def __init__(self, files: Sequence[BoundedFile]) -> None:
        self._all = tuple(files)  # a file may have been opened more than once, and mapped by any of them
        self._files = list({file.path: file for file in reversed(files)}.values())

    @property
    def stamp(self) -> str:
        """Names, sizes and times of last change, for a conversion that goes on later."""
        return json.dumps(sorted((file.path.name, file.size, file.mtime_ns) for file in self._files))

    @property
    def newest(self) -> int:
        """When the last of them was changed, in nanoseconds."""
        return max((file.mtime_ns for file in self._files), default=0)

    def check(self, name: str) -> None:
        for file in self._files:
            change = file.change()
            if change:
                raise QuantizeError(
                    f"{file.path}: {change} while it was being converted (at {name}); convert it when it is at rest"
                )

    def release(self, *, sparing: bool = True) -> None:
        """Lets go of mapped pages. sparing: readers do so too from now on, where they only pass over them."""
        for file in self._all:
            file.sparing = sparing
            file.release()


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """How much is done at a time."""

    threads: int
    block_weights: int

    @classmethod
    def within(cls, plan: Plan, max_memory: int | None, threads: int) -> _Work:
        """The most work that keeps what is resident below `max_memory`; QuantizeError says what would be needed."""
        if max_memory is None:
            return cls(threads, _BLOCK_WEIGHTS)
        kernels.extension()  # loaded now, or it would not be counted
        resident, peak = resident_bytes()
        widest = max((item.spec.shape[1] for item in plan.tensors if not item.spec.is_vector), default=1)
        waiting = max(sum(section.nbytes for section in item.spec.sections[1:]) for item in plan.tensors)
        fixed = (
            resident
            + waiting
            + _FIXED_BYTES
            + bytes_needed(plan)
            + max(item.spec.shape[0] * 16 for item in plan.tensors)
        )
        block = _BLOCK_WEIGHTS
        while True:
            rows = round_up(max(1, block // widest), TILE_ROWS) * widest
            needed = fixed + threads * (_STEP_BYTES + _WORK_BYTES * rows) + 2 * _WAITING_BYTES * rows
            if needed <= max_memory and peak <= max_memory:
                return cls(threads, block)
            if block > TILE_ROWS * widest:
                block = max(block // 2, TILE_ROWS * widest)
            elif threads > 1:
                threads -= 1
            else:
                # With two parts in a hundred more, for the same process never takes the same to the byte.
                least = math.ceil(max(needed, peak) * 1.02 / 1e6)
                raise QuantizeError(f"--max-memory {max_memory / 1e6:.0f} MB: this model needs at least {least} MB")


def resident_bytes() -> tuple[int, int]:
    """What of this process is in memory now, and the most that ever was; mapped files count."""
    try:
        status = Path("/proc/self/status").read_text()
        now, peak = (int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[index]
        return now, peak
    except (OSError, TypeError):
        import resource

        most: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return most, most


def parse_size(text: str) -> int:
    """Bytes of a size as `4GB`, `512MB` or `1.5GiB`; ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(k|M|G|T)?(i)?B?", text.strip())
    if found is None or (found[3] and not found[2]):
        raise ValueError(f"{text!r} is no size, expected one like 4GB or 512MiB")
    unit = (1024 if found[3] else 1000) ** " kMGT".index(found[2] or " ")
    return int(min(float(found[1]) * unit, 2.0**63))
