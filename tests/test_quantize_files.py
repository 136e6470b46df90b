"""Nothing half-written is ever seen, `verify` finds any flipped bit, and the `quantize` command says what it does.

Failures are injected at the system calls (`os.write`, `os.rename`, `os.fsync`), one after the other, so that every
moment of a conversion is interrupted once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama.common.errors import ModelFormatError, QuantizeError
from pyllama.common.model_folder import read_model_folder
from quantize import convert, verify
from quantize.cli import main
from tests import make_sources as make
from tests.make_sources import Shape
from tests.test_quantize import hf_source, listing

ROOT = Path(__file__).resolve().parent.parent
TINY = Shape(dim=32, hidden_dim=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, vocab_size=17)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in a folder of its own, so that the output's surroundings can be compared."""
    return hf_source(tmp_path / "source" / "hf", TINY)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder for outputs."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


# ---- interruptions ---------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    call: str
    error: Callable[[], BaseException]
    seen_as: type[BaseException]


FAULTS = [
    Fault("write", lambda: OSError(errno.ENOSPC, "No space left on device"), QuantizeError),
    Fault("write", KeyboardInterrupt, KeyboardInterrupt),
    Fault("write", lambda: RuntimeError("a defect"), RuntimeError),
    Fault("fsync", lambda: OSError(errno.EIO, "Input/output error"), QuantizeError),
    Fault("rename", lambda: OSError(errno.EACCES, "Permission denied"), QuantizeError),
    Fault("rename", KeyboardInterrupt, KeyboardInterrupt),
    Fault("mkdir", lambda: OSError(errno.EROFS, "Read-only file system"), QuantizeError),
    Fault("open", lambda: OSError(errno.EDQUOT, "Disk quota exceeded"), QuantizeError),
]


def fail_at(patch: pytest.MonkeyPatch, fault: Fault, at: int, where: Path) -> list[int]:
    """Lets the `at`-th call of os.<fault.call> that concerns `where` fail; the list counts those calls."""
    real = getattr(os, fault.call)
    calls = [0]

    def call(*arguments: Any, **options: Any) -> Any:
        target = os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int) else str(arguments[0])
        harmless = fault.call == "open" and not arguments[1] & os.O_CREAT  # reading
        harmless |= fault.call == "fsync" and os.path.isdir(target)  # some file systems cannot
        if target.startswith(str(where)) and not harmless:
            calls[0] += 1
            if calls[0] == at + 1:
                raise fault.error()
        return real(*arguments, **options)

    patch.setattr(os, fault.call, call)
    return calls


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.call}-{type(f.error()).__name__}")
def test_a_failure_at_any_moment_changes_nothing(
    fault: Fault, existing: bool, source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place / "model"
    if existing:
        convert(source, out, format="q8")
    before = listing(place)
    if fault.call == "rename":  # as where the system cannot exchange two names
        monkeypatch.setattr("quantize.writer._exchange", lambda a, b: False)
    with monkeypatch.context() as patch:
        counted = fail_at(patch, fault, -1, place)
        convert(source, place / "other", format="q4")
    shutil.rmtree(place / "other")
    moments = counted[0] + (existing and fault.call == "rename")
    assert moments >= 1
    for at in range(moments):
        with monkeypatch.context() as patch:
            fail_at(patch, fault, at, place)
            with pytest.raises(fault.seen_as):
                convert(source, out, format="q4", overwrite=existing)
        assert listing(place) == before, f"{fault.call} number {at}"
        assert sorted(file.name for file in place.iterdir()) == ["model"] * existing
    convert(source, out, format="q4", overwrite=existing)
    assert read_model_folder(out).config["quantization"]["format"] == "q4"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_exception_between_tensors_changes_nothing(error: type[BaseException], source: Path, place: Path) -> None:
    def progress(step: Any) -> None:
        if step.name == "layers.0.w_up":
            raise error

    with pytest.raises(error):
        convert(source, place / "model", progress=progress)
    assert list(place.iterdir()) == []


def test_a_full_disk_says_so(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, FAULTS[0], 3, place)
    with pytest.raises(QuantizeError, match=r"model: cannot be written: the disk is full; free some space"):
        convert(source, place / "model")


def test_too_little_space_is_seen_before_anything_is_written(
    source: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    with pytest.raises(QuantizeError, match="needs 0 MB, the file system has 0 MB free"):
        convert(source, place / "model")
    assert list(place.iterdir()) == []


def test_short_writes_are_continued(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(source, place / "whole")
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:100]))
        bits = convert(source, place / "bits")
    assert listing(bits) == listing(whole)


def test_weights_are_written_in_whole_huge_pages(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(source, place / "whole")
    writes: list[tuple[int, int]] = []  # where, how many bytes; the descriptor of the weights is the last one opened

    def write(fd: int, data: Any) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("model.safetensors"):
            writes.append((os.lseek(fd, 0, os.SEEK_CUR), len(data)))
        return real(fd, data)

    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr("quantize.writer._HUGE_PAGE_BYTES", 4096)
        patch.setattr(os, "write", write)
        pages = convert(source, place / "pages")
    assert listing(pages) == listing(whole)
    size = (pages / "model.safetensors").stat().st_size
    first = next(i for i, (at, n) in enumerate(writes) if at == 0 and n == 4096)
    of_weights = [w for w in writes[first:-1] if w[1]]  # the last write is the header with its checksums
    assert [at for at, _ in of_weights] == [sum(n for _, n in of_weights[:i]) for i in range(len(of_weights))]
    assert sum(n for _, n in of_weights) == size
    assert all(n % 4096 == 0 for _, n in of_weights[:-1])


# ---- what may be replaced --------------------------------------------------------------------------------------------


def test_an_existing_model_is_replaced_only_when_asked(source: Path, place: Path) -> None:
    out = convert(source, place / "model", format="q8")
    before = listing(place)
    with pytest.raises(QuantizeError, match="exists already; choose another output or pass --overwrite"):
        convert(source, out, format="q4")
    assert listing(place) == before
    opened = read_model_folder(out)  # a running engine has the old files mapped
    old = {name: tensor.payload().tobytes() for name, tensor in opened.tensors.items()}
    convert(source, out, format="q4", overwrite=True)
    assert read_model_folder(out).config["quantization"]["format"] == "q4"
    assert {name: tensor.payload().tobytes() for name, tensor in opened.tensors.items()} == old
    assert [file.name for file in place.iterdir()] == ["model"]


def test_an_empty_folder_is_as_good_as_none(source: Path, place: Path) -> None:
    (place / "model").mkdir()
    verify(convert(source, place / "model"))


@pytest.mark.parametrize("foreign", ["notes.txt", "checkpoints/a", "model.bin"])
def test_foreign_files_are_never_deleted(foreign: str, source: Path, place: Path) -> None:
    out = convert(source, place / "model")
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("precious")
    with pytest.raises(QuantizeError, match=rf"holds '{foreign.split('/')[0]}', which quantize did not write"):
        convert(source, out, overwrite=True)
    assert (out / foreign).read_text() == "precious"


def test_a_checkpoint_is_never_deleted(source: Path, place: Path) -> None:
    other = make.write_hf_folder(place / "hf", TINY, make.random_weights(TINY))
    before = listing(other)
    with pytest.raises(QuantizeError, match="is no model that quantize wrote; it is not overwritten"):
        convert(source, other, overwrite=True)
    assert listing(other) == before


def test_outputs_that_cannot_be(source: Path, place: Path) -> None:
    (place / "file").write_text("precious")
    with pytest.raises(QuantizeError, match="file: is a file, expected the name of a new folder"):
        convert(source, place / "file", overwrite=True)
    with pytest.raises(QuantizeError, match=r"the folder .*missing does not exist; make it first"):
        convert(source, place / "missing" / "model")
    (place / "loop").symlink_to(place / "loop")
    with pytest.raises(QuantizeError, match="loop: is a link that leads back to itself"):
        convert(source, place / "loop")
    with pytest.raises(QuantizeError, match="cannot be written: File name too long"):
        convert(source, place / ("x" * 300))
    assert (place / "file").read_text() == "precious"


def test_a_link_is_followed(source: Path, place: Path) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    assert convert(source, place / "link") == place / "real"
    assert (place / "link").is_symlink()


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder of a few kilobytes."""
    base = tmp_path_factory.mktemp("verify")
    return convert(hf_source(base / "hf", TINY), base / "model", format="q4nl")


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


FILES = [
    "config.json",
    "generation_config.json",
    "golden_ids.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@given(st.data())
@settings(max_examples=300)
def test_verify_finds_any_flipped_bit(
    model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["model.safetensors"] * 5 + FILES))
    bit = data.draw(st.integers(0, (model / name).stat().st_size * 8 - 1))
    folder = tmp_path_factory.getbasetemp() / "flipped"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model, folder)
    flip(folder / name, bit)
    with pytest.raises(ModelFormatError):
        verify(folder)


def test_verify_names_the_tensor(model: Path, tmp_path: Path) -> None:
    for name, tensor in read_model_folder(model).tensors.items():
        folder = shutil.copytree(model, tmp_path / name)
        flip(folder / "model.safetensors", tensor.file.tensors[name].start * 8 + 3)
        with pytest.raises(ModelFormatError, match=rf"model\.safetensors: {re.escape(name)}: sha256 of its payload is"):
            verify(folder)


def test_verify_misses_files(model: Path, tmp_path: Path) -> None:
    for name in FILES:
        folder = shutil.copytree(model, tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(ModelFormatError, match=re.escape(name.replace("model.safe", "model*.safe"))):
            verify(folder)


def test_verify_finds_files_put_beside(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "chat_template.jinja"):
        folder = shutil.copytree(model, tmp_path / name)
        (folder / name).write_text("{{ 1 }}")
        with pytest.raises(ModelFormatError, match=rf"{re.escape(name)}: has no checksum; it was put there after"):
            verify(folder)


def test_every_byte_of_the_header_counts(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(8), *range(8, size, 11), size - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.unlink()  # a new file: the old one may be mapped
        path.write_bytes(damaged)
        with pytest.raises(ModelFormatError):
            verify(folder)


def test_verify_wants_checksums(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'\\"sha256\\"', b'\\"sha257\\"', 1))
    with pytest.raises(ModelFormatError, match="the header's checksum differs"):
        verify(folder)


def test_verify_looks_at_values_and_padding_behind_a_right_checksum(model: Path, tmp_path: Path) -> None:
    folder_module = import_module("pyllama.common.model_folder")
    whole = read_model_folder(model)

    def rewritten(name: str, at: int, value: bytes) -> Path:
        folder = tmp_path / f"{name}-{at}"
        shutil.copytree(model, folder)
        specs = [tensor.spec for tensor in whole.tensors.values()]
        payloads = {key: bytearray(tensor.payload().tobytes()) for key, tensor in whole.tensors.items()}
        payloads[name][at : at + len(value)] = value
        sums = {key: import_module("hashlib").sha256(payload).hexdigest() for key, payload in payloads.items()}
        metadata = whole.tensors["norm"].file.metadata
        files = {key[7:]: value for key, value in metadata.items() if key.startswith("sha256.")}
        head = folder_module.header_bytes(specs, sums, files)
        (folder / "model.safetensors").write_bytes(head + b"".join(payloads[spec.name] for spec in specs))
        return folder

    scales = whole.tensors["output"].spec.sections[1].start
    with pytest.raises(ModelFormatError, match="output: NaN or infinite value in row 0, group 0"):
        verify(rewritten("output", scales, b"\x00\x7e"))
    with pytest.raises(ModelFormatError, match="output: padding is not zero"):
        verify(rewritten("output", scales + 2 * 17, b"\x00\x3c"))  # row 17 of 17, in the second tile
    with pytest.raises(ModelFormatError, match=r"norm: NaN or infinite value at \[1\]"):
        verify(rewritten("norm", 4, b"\x00\x00\x80\x7f"))


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_convert_and_verify(source: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, "-o", place / "model", "--format", "q4nl", "--group-size", 64, "--tensor-type", "w.=q8") == 0
    shown = capsys.readouterr()
    assert "F32 -> q4nl g64" in shown.out and "F32 -> q8 g64" in shown.out and "bits per weight in" in shown.out
    assert shown.err == ""
    assert run("verify", place / "model") == 0
    assert "12 tensors" in capsys.readouterr().out


def test_results_as_json(source: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, "-o", place / "model", "--format", "q4", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    config = json.loads((place / "model" / "config.json").read_text())
    assert {key: result[key] for key in config["quantization"]} == config["quantization"]
    assert result["output_bytes"] == sum(file.stat().st_size for file in (place / "model").iterdir())
    assert result["n_weights"] == sum(make.random_weights(TINY)[name].size for name in TINY.tensors())
    assert result["output"] == str(place / "model") and result["dry_run"] is False and result["seconds"] >= 0
    assert sum(kind["count"] for kind in result["tensors"]) == len(TINY.tensors())
    assert run("verify", place / "model", "--json") == 0
    assert json.loads(capsys.readouterr().out)["n_weights"] == result["n_weights"]


def test_a_second_rounding_is_mentioned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make.write_gguf(place / "m.gguf", TINY, make.random_weights(TINY), "Q4_0")
    for harmless in ((), ("--format", "q8"), ("--format", "q4"), ("--format", "f16")):
        assert run(source, "--dry-run", *harmless) == 0
        assert capsys.readouterr().err == ""
    assert run(source, "--dry-run", "--format", "q4nl") == 0
    assert capsys.readouterr().err.startswith("quantize: note: Q4_0 matrices are rounded a second time")


@pytest.mark.parametrize("with_output", [False, True])
def test_dry_run_writes_nothing(
    with_output: bool, source: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(place.parent)
    output = ("-o", place / "model") if with_output else ()
    assert run(source, "--format", "q4", "--dry-run", "--json", *output) == 0
    planned = json.loads(capsys.readouterr().out)
    assert listing(place.parent) == before and list(place.iterdir()) == []
    assert planned["dry_run"] is True and planned["output"] is None
    assert run(source, "--format", "q4", "--json", "-o", place / "model") == 0
    done = json.loads(capsys.readouterr().out)
    assert {key: planned[key] for key in ("tensors", "bits_per_weight", "n_weights", "source_bytes")} == {
        key: done[key] for key in ("tensors", "bits_per_weight", "n_weights", "source_bytes")
    }
    assert run(source, "--dry-run") == 0
    assert "dry run, nothing written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SRC"),
        (["src"], "say where to put the model folder, for example: -o src-pyllama"),
        (["a/b.Q4_0.gguf", "--format", "q4"], "for example: -o b.Q4_0-q4"),
        (["src", "-o", "out", "--format", "q5"], "invalid choice: 'q5'"),
        (["src", "-o", "out", "--group-size", "16"], "invalid choice: 16"),
        (["src", "-o", "out", "--method", "best"], "invalid choice: 'best'"),
        (["src", "-o", "out", "--tensor-type", "wq"], "'wq' is not REGEX=FORMAT"),
        (["src", "-o", "out", "--tensor-type", "wq=q5"], "'wq=q5' is not REGEX=FORMAT"),
        (["src", "-o", "out", "--tensor-type", "=q4"], "'=q4' is not REGEX=FORMAT"),
        (["src", "-o", "out", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["verify"], "the following arguments are required: OUT"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_broken_expression_exits_with_2(source: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, "-o", place / "model", "--tensor-type", "(=q4") == 2
    assert capsys.readouterr().err.startswith("quantize: regular expression '('")


def test_failures_are_one_line_and_exit_with_1(
    source: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def complains(code: int, *words: str) -> None:
        shown = capsys.readouterr()
        assert code == 1 and shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("quantize: ")
        for word in words:
            assert word in shown.err

    complains(run(place / "missing", "-o", place / "model"), "missing", "no such file or folder")
    complains(run("verify", place / "missing"), "missing")
    complains(run(source, "-o", place / "a" / "b"), "does not exist; make it first")
    (source / "model.safetensors").write_bytes(b"\xff" * 100)
    complains(run(source, "-o", place / "model"), "model.safetensors")
    for error, word in ((MemoryError(), "memory"), (OSError(errno.EIO, "Input/output error", "x"), "Input/output")):
        with monkeypatch.context() as patch:
            patch.setattr("quantize.cli.open_source", lambda path, error=error: (_ for _ in ()).throw(error))
            complains(run(source, "-o", place / "model"), word)
    assert list(place.iterdir()) == []


def in_the_middle(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    real = import_module("quantize.pipeline")._pack_block

    def pack_block(item: Any, *arguments: Any) -> Any:
        if item.spec.name == "layers.0.w_up":
            act()
        return real(item, *arguments)

    monkeypatch.setattr(import_module("quantize.pipeline"), "_pack_block", pack_block)


def test_ctrl_c_exits_with_130(
    source: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_middle(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    assert run(source, "-o", place / "model") == 130
    assert capsys.readouterr().err == "quantize: interrupted; nothing was changed\n"
    assert list(place.iterdir()) == []


def test_termination_cleans_up(source: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    in_the_middle(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as exit_:
        run(source, "-o", place / "model")
    assert exit_.value.code == 143
    assert list(place.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_progress_without_a_terminal_is_a_line_now_and_then(
    source: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("quantize.cli.time.monotonic", lambda: float(next(clock)))
    assert run(source, "-o", place / "model") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # twelve tensors, two seconds each, a line when five have passed
    assert all(re.fullmatch(r"converting: +\d+% of [\d,]+ weights, [a-z_0-9.]+(, \d+ s left)?", line) for line in lines)


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_progress_on_a_terminal(
    with_tqdm: bool, source: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    if not with_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run(source, "-o", place / "model", "--format", "q8") == 0
    shown = capsys.readouterr()
    assert ("converting:" in shown.err) == with_tqdm  # too short for a plain line
    assert "bits per weight" in shown.out


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    shown = capsys.readouterr().out
    assert exit_.value.code == 0
    for word in (
        ("--format", "--dry-run", "q4nl", "quantize verify", "exit codes") if len(arguments) == 1 else ("--json",)
    ):
        assert word in shown


def test_needs_numpy_alone(source: Path, place: Path) -> None:
    """The command runs where the extension is not built and nothing but numpy is installed."""
    script = """
import sys
for name in ("tqdm", "torch", "transformers", "safetensors", "tokenizers", "sentencepiece", "jinja2", "pyllama._C"):
    sys.modules[name] = None
from quantize.cli import main
sys.exit(main(sys.argv[1:]))
"""
    for arguments in ([source, "-o", place / "hf"], [place / "m.gguf", "-o", place / "gguf"], ["verify", place / "hf"]):
        make.write_gguf(place / "m.gguf", TINY, make.random_weights(TINY), "Q4_0")
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""


def test_runs_as_a_module(source: Path, place: Path) -> None:
    command = [sys.executable, "-m", "quantize", str(place / "none"), "-o", str(place / "model")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("quantize: ") and "Traceback" not in done.stderr
