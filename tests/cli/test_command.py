"""The command as scripts use it: exit codes, stdout and stderr, pipes, Ctrl-C; `generate`; the examples."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyllama import __version__
from pyllama.cli.main import main
from pyllama.open import locate

from .conftest import FAST, PYTHON, ROOT, Captured


def test_version_and_help(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyllama {__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("chat", "generate", "bench", "info", "doctor", "exit codes", "PYLLAMA_DEBUG"))
    for command in ("chat", "generate", "bench", "info", "doctor"):
        assert main([command, "--help"]) == 0
        assert "MODEL" in capsys.readouterr().out or command == "doctor"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["sing"],
        ["generate"],
        ["generate", "a", "b", "-p", "x"],
        ["generate", "-p", "x", "--threads", "0"],
        ["generate", "-p", "x", "--threads", "99999999999"],
        ["generate", "-p", "x", "--logprobs", "2"],
        ["generate", "-p", "x", "--logprobs", "-1", "--json"],
        ["generate", "-p", "x", "--top-p", "7"],
        ["generate", "-p", "x", "--temperature", "nan"],
        ["chat", "--device", "tpu"],
        ["chat", "--speculative", "magic"],
        ["chat", "--speculative", "lookup", "--draft", "demo"],
        ["bench", "-p", "-1"],
        ["bench", "-p", "1,"],
        ["bench", "-b", "99999999999"],
        ["bench", "-p", "0", "-n", "0"],
        ["bench", "--format", "q4"],
        ["bench", "demo", "--synthetic", "1b"],
        ["bench", "--synthetic", "3b"],
        ["bench", "--synthetic", "1b", "--group-size", "48"],
        ["bench", "--synthetic", "tiny", "--group-size", "0"],
        ["bench", "--synthetic", "tiny", "--format", "f16", "--group-size", "64"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(argv: list[str], capsys: Captured) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err


def test_a_number_that_is_none_says_what_is_expected(capsys: Captured) -> None:
    assert main(["bench", "-t", "two"]) == 2
    assert "-t/--threads: 'two': expected an integer of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["info"], ["chat", "-p", "x"], ["generate", "-p", "x"], ["bench"]], ids=" ".join)
def test_an_error_is_one_line_and_1(command: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [command[0], "nowhere.gguf", *command[1:]]
    assert main(argv) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "pyllama: nowhere.gguf: no such file or folder; expected a model folder, a .gguf file, a Hugging Face folder, "
        'a folder of Meta\'s, or "demo"\n'
    )
    monkeypatch.setenv("PYLLAMA_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(argv)


def test_what_is_not_a_user_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllama.cli.info.describe", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_generate(demo_model: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(demo_model)
    assert main(["generate", model, "-p", "The capital of France is", "--max-tokens", "2", *FAST]) == 0
    assert capsys.readouterr() == (" Paris.\n", "")
    monkeypatch.setattr("sys.stdin", io.StringIO("The capital of France is"))
    arguments = ["--max-tokens", "9", "--stop", ".", "--seed", "5", "--json", "--logprobs", "2"]
    assert main(["generate", model, "-p", "-", *arguments, *FAST]) == 0
    said = capsys.readouterr()
    record = json.loads(said.out)
    assert said.err == ""
    assert (record["text"], record["finish_reason"], record["seed"]) == (" Paris", "stop", 5)
    assert record["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 0, "total_tokens": 7}
    assert record["timings"]["decode_tok_per_s"] > 0
    assert [entry["token"] for entry in record["logprobs"]] == [" Paris", "."]
    assert [len(entry["top"]) for entry in record["logprobs"]] == [2, 2]


@pytest.mark.parametrize("how", ["--speculative lookup", "--draft"])
def test_generate_with_guesses(how: str, demo_model: Path, capsys: Captured) -> None:
    how += f" {demo_model}" if how == "--draft" else ""
    command = ["generate", str(demo_model), "-p", "a b c a b c a b c a b", "--max-tokens", "24", "--json"]
    records = []
    for extra in ([], how.split(maxsplit=1)):
        assert main([*command, *extra, *FAST]) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[0]["token_ids"] == records[1]["token_ids"]
    assert records[0]["timings"]["draft_n"] == 0
    # as dear as the model itself, a draft model is not asked
    assert (records[1]["timings"]["draft_n_accepted"] > 3) == how.endswith("lookup")


def test_a_reader_that_leaves_is_no_error_to_show(gguf: Path) -> None:
    command = [*PYTHON, "generate", str(gguf), "-p", "w3", "--ignore-eos", "--threads", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(5)
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(60) in (0, 1)  # 0: everything was in the pipe already
    assert "Traceback" not in errors and "BrokenPipe" not in errors and "Exception" not in errors


@pytest.mark.parametrize(("ending", "code"), [("-p w3 >&-", 0), ("-p - <&-", 0), ("-p w3 --n-ctx 999 2>&-", 1)])
def test_streams_that_are_closed_are_no_error(ending: str, code: int, gguf: Path) -> None:
    command = " ".join([*PYTHON, "generate", str(gguf), "--max-tokens", "2", "--threads", "1", ending])
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and "Error" not in done.stderr
    assert bool(done.stdout) == ("<" in ending)  # not even an error, which has nowhere to go


def test_what_stdout_cannot_say_is_escaped(gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "caf\u00e9\udcff"
    folder.symlink_to(locate(gguf))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for extra, expected in (([], "caf\\xe9\\udcff"), (["--json"], "caf\\u00e9\\udcff")):
        done = subprocess.run(
            [*PYTHON, "info", str(folder), *extra], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0 and expected in done.stdout


def test_ctrl_c_is_130(demo_model: Path) -> None:
    command = [*PYTHON, "generate", str(demo_model), "-p", "Once", "--ignore-eos", *FAST]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(5)  # it is at work
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith(b"\n")  # what is said next begins a line
        assert process.stderr.read().decode() == "interrupted\n"
        assert process.wait(60) == 130


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples(name: str, demo_model: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / name), str(demo_model)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and not done.stderr
    wanted = {"generate.py": "Paris", "chat.py": "Berlin"}.get(name, "")
    assert wanted in done.stdout
