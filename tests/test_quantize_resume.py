"""Killed, stopped and resumed conversions, two at once, sources that change, and how much memory a conversion takes.

Exceptions at any moment are in test_quantize_files.py; 200 kills are `make check-crash`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama.common.errors import QuantizeError
from quantize import convert, verify
from quantize.cli import main
from quantize.pipeline import parse_size, resident_bytes
from tests.helpers_crash import FORMAT, ROOT, crash
from tests.make_sources import Shape
from tests.test_quantize import hf_source, listing

TINY = Shape(dim=32, hidden_dim=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, vocab_size=17)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_source(tmp_path_factory.mktemp("source") / "hf", TINY)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return listing(convert(source, tmp_path_factory.mktemp("whole") / "model", format=FORMAT))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stopped_at(name: str) -> Callable[[Any], None]:
    def progress(step: Any) -> None:
        if step.name == name:
            raise KeyboardInterrupt

    return progress


# ---- killed and resumed ----------------------------------------------------------------------------------------------


def test_killed_at_any_moment(source: Path, whole: dict[str, bytes], place: Path) -> None:
    out = place / "model"
    done = crash(source, place / "counted", "at", -1, resume=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place / "counted")
    n_calls = int(done.stdout.split()[0])
    assert n_calls > 30
    convert(source, out, format="q8")
    old = listing(out)
    for at in [1, 2, *range(4, n_calls, max(1, n_calls // 6)), n_calls - 2, n_calls - 1, n_calls]:
        ended = crash(source, out, "at", at, resume=at % 2 == 0)
        assert ended.returncode == -9, (at, ended.stderr)
        assert listing(out) in (old, whole), f"call {at} of {n_calls}"
        verify(out)
        convert(source, out, format=FORMAT, overwrite=True, resume=True)
        assert listing(out) == whole and names(place) == ["model"], f"call {at} of {n_calls}"
        convert(source, out, format="q8", overwrite=True)


@pytest.mark.parametrize("pages", [64, 4096, 1 << 21])
@pytest.mark.parametrize("stop", ["tok_embeddings", "layers.0.wq", "layers.0.w_down", "norm", "output"])
def test_a_stopped_conversion_goes_on_to_the_same_bytes(
    stop: str, pages: int, source: Path, whole: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.writer._HUGE_PAGE_BYTES", pages)
    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "model", format=FORMAT, resume=True, progress=stopped_at(stop))
    assert names(place) == [".model.journal", ".model.partial"]
    seen: list[str] = []
    out = convert(source, place / "model", format=FORMAT, resume=True, progress=lambda step: seen.append(step.name))
    assert listing(out) == whole and names(place) == ["model"]
    order = list(TINY.tensors())
    assert seen == order[order.index(stop) + 1 :]


def test_what_the_journal_claims_is_compared_with_the_bytes(source: Path, whole: dict[str, bytes], place: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "model", format=FORMAT, resume=True, progress=stopped_at("layers.0.w_down"))
    weights = place / ".model.partial" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-600] ^= 1
    weights.write_bytes(raw)
    with open(place / ".model.journal", "ab") as journal:
        journal.write(b'{"tensor": "norm", "sha256": "00"}\n{"tensor": "outp')
    assert listing(convert(source, place / "model", format=FORMAT, resume=True)) == whole


def test_another_conversion_is_not_gone_on_with(source: Path, place: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "model", format=FORMAT, resume=True, progress=stopped_at("norm"))
    before = listing(place / ".model.partial")
    with pytest.raises(QuantizeError, match="had another source or other options; repeat those, or start anew without"):
        convert(source, place / "model", format="q8", resume=True)
    assert listing(place / ".model.partial") == before and names(place) == [".model.journal", ".model.partial"]
    verify(convert(source, place / "model", format="q8"))
    assert names(place) == ["model"]


@pytest.mark.parametrize("call", ["fsync", "ftruncate", "lseek", "pread"])
def test_going_on_that_fails_loses_nothing(
    call: str, source: Path, whole: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "model", format=FORMAT, resume=True, progress=stopped_at("layers.0.w_down"))
    real = getattr(os, call)
    for at in range(1, 99):
        calls = [0]

        def failing(*arguments: Any, calls: list[int] = calls, at: int = at) -> Any:
            here = str(place) in os.readlink(f"/proc/self/fd/{arguments[0]}")
            calls[0] += here
            if here and calls[0] == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch, pytest.raises((QuantizeError, KeyboardInterrupt)) as stopped:
            patch.setattr(os, call, failing)
            convert(source, place / "model", format=FORMAT, resume=True, progress=stopped_at("norm"))
        assert names(place) == [".model.journal", ".model.partial"], at
        if stopped.type is KeyboardInterrupt:
            break
        assert "the disk is full" in str(stopped.value) and "What is done is kept for --resume" in str(stopped.value)
    assert at > 1 and listing(convert(source, place / "model", format=FORMAT, resume=True)) == whole


def test_a_journal_of_brackets(source: Path, whole: dict[str, bytes], place: Path) -> None:
    (place / ".model.journal").write_bytes(b"[" * 200_000 + b"\n")
    assert listing(convert(source, place / "model", format=FORMAT, resume=True)) == whole


def test_a_file_system_without_locks(
    source: Path, whole: dict[str, bytes], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("quantize.journal.fcntl.flock", flock)
    assert listing(convert(source, place / "model", format=FORMAT)) == whole


@pytest.mark.parametrize("beside", [".model.old", ".model.partial"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_strangers_folder_beside_the_output(beside: str, existing: bool, source: Path, place: Path) -> None:
    if existing:
        convert(source, place / "model", format="q8")
    (place / beside).mkdir()
    (place / beside / "thesis.txt").write_text("precious")
    if beside == ".model.old":
        verify(convert(source, place / "model", format=FORMAT, overwrite=existing))
    else:
        with pytest.raises(QuantizeError, match="is in the way, and quantize did not write it"):
            convert(source, place / "model", format=FORMAT, overwrite=existing)
    assert (place / beside / "thesis.txt").read_text() == "precious" and ".model.journal" not in names(place)


def test_resuming_what_is_done_changes_nothing(source: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(source), "-o", str(place / "model"), "--format", FORMAT, "--resume"]
    assert main(arguments) == 0
    before = [(path, path.stat().st_mtime_ns) for path in sorted((place / "model").iterdir())]
    assert main(arguments) == 0
    assert [(path, path.stat().st_mtime_ns) for path in sorted((place / "model").iterdir())] == before
    assert main([*arguments, "--format", "q8"]) == 1
    assert "exists already; choose another output or pass --overwrite" in capsys.readouterr().err


def test_what_is_done_is_not_taken_for_a_later_source(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Changed so far behind its start that the output's header, which knows that alone, is the same."""
    shape = Shape(
        dim=512, hidden_dim=512, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=512, vocab_size=17, max_seq_len=8
    )
    hf = hf_source(tmp_path / "hf", shape)
    arguments = [str(hf), "-o", str(place / "model"), "--format", "q8", "--resume"]
    assert main(arguments) == 0
    before = listing(place / "model")
    with open(hf / "model.safetensors", "r+b") as file:
        file.seek(-200_000, os.SEEK_END)
        file.write(bytes(100_000))
    later = (place / "model" / "model.safetensors").stat().st_mtime_ns + 1
    os.utime(hf / "model.safetensors", ns=(later, later))
    assert main(arguments) == 1
    assert "exists already; choose another output or pass --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert listing(place / "model") != before


def test_the_left_overs_of_a_dead_run_are_replaced(source: Path, whole: dict[str, bytes], place: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(source, place / "model", format=FORMAT, resume=True, progress=stopped_at("norm"))
    assert listing(convert(source, place / "model", format=FORMAT)) == whole
    assert names(place) == ["model"]


def test_a_death_between_two_renames(source: Path, whole: dict[str, bytes], place: Path) -> None:
    convert(source, place / "model", format=FORMAT)
    (place / "model").rename(place / ".model.old")
    with pytest.raises(QuantizeError, match="exists already"):  # at once, not after the long part
        convert(source, place / "model", format="q8", progress=lambda step: pytest.fail("began"))
    assert listing(place / "model") == whole


def test_two_at_once(source: Path, place: Path) -> None:
    def progress(step: Any) -> None:
        if step.name == "norm":
            with pytest.raises(QuantizeError, match="model: is being written by another process"):
                convert(source, place / "model", format=FORMAT)

    verify(convert(source, place / "model", format=FORMAT, progress=progress))
    assert names(place) == ["model"]


def test_threads_and_blocks_do_not_change_a_byte(source: Path, whole: dict[str, bytes], place: Path) -> None:
    convert_module, pipeline = import_module("quantize.convert"), import_module("quantize.pipeline")
    plan = convert_module.make_plan(import_module("quantize.readers").open_source(source), format=FORMAT)
    for threads in (1, 2, 5):
        assert listing(pipeline.write_plan(plan, place / f"{threads}", threads=threads)) == whole


# ---- what happens to source and disk ---------------------------------------------------------------------------------


def appended(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def replaced(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (appended, r"changed its size from \d+ to \d+ bytes"),
    (replaced, "was replaced by another file"),
    (lambda path: os.utime(path, ns=(1, 1)), "was written to"),
    (Path.unlink, "cannot be looked at any more"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=["appended", "replaced", "written", "removed"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_source_that_changes(change: Callable[[Path], None], words: str, file: str, tmp_path: Path) -> None:
    hf = hf_source(tmp_path / "hf", TINY)

    def progress(step: Any) -> None:
        if step.name == "layers.0.wq":
            change(hf / file)

    (tmp_path / "place").mkdir()
    expected = rf"{re.escape(file)}: {words}.* while it was being converted \(at layers\.0\.w"
    with pytest.raises(QuantizeError, match=expected):
        convert(hf, tmp_path / "place" / "model", format=FORMAT, progress=progress)
    assert names(tmp_path / "place") == []


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from quantize.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_limit_on_file_sizes(source: Path, place: Path) -> None:
    words = [sys.executable, "-c", LIMITED, str(source), "-o", str(place / "model"), "--format", "f32"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "files may not grow that large there; lift the limit" in ended.stderr
    assert names(place) == []


def test_bytes_that_read_back_otherwise(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, n, at).replace(b"\x12", b"\x13"))
    with pytest.raises(QuantizeError, match="reads back other bytes than were written; check the disk"):
        convert(source, place / "model", format=FORMAT)
    assert names(place) == []


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("1.5GiB", 3 << 29), ("512MB", 512 * 10**6), ("7", 7), ("2 kB", 2000), ("3M", 3 * 10**6)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4XB", "4 i", "1e9", "4GBB", "4iB"])
def test_what_is_no_size(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["src", "-o", "out", f"--max-memory={text}"])
    assert "is no size, expected one like 4GB" in capsys.readouterr().err


def test_too_little_memory_says_what_is_needed(
    source: Path, whole: dict[str, bytes], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(source), "-o", str(place / "model"), "--max-memory", "10MB"]) == 1
    said = capsys.readouterr().err
    needed = re.search(r"--max-memory 10 MB: this model needs at least (\d+) MB", said)
    assert needed and names(place) == [] and said.count("\n") == 1
    enough = (int(needed[1]) + 40) * 10**6  # a little more: this process grows meanwhile
    assert listing(convert(source, place / "model", format=FORMAT, max_memory=enough)) == whole


def test_a_size_beyond_all_numbers() -> None:
    assert parse_size("9" * 400) == 1 << 63


def test_resident_bytes_sees_memory() -> None:
    before = resident_bytes()[0]
    block = np.ones(64 << 20, np.uint8)
    now, peak = resident_bytes()
    assert now >= before + (48 << 20) and peak >= now - (4 << 20) and block[0] == 1
