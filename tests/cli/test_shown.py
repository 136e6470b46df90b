"""What a model or a file says is shown without its control characters, whatever the command."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama import Piece
from pyllama.cli.main import main
from pyllama.cli.terminal import PlainTerminal, Screen, Terminal, json_text, safe
from pyllama.open import locate

from .conftest import Captured

EVIL = "a\x1b]0;title\x07b\x9b31mc\x00\x7fd\r\x08\n\te\u00e9\u4e2d"
TAME = "a]0;titleb31mcd\n\te\u00e9\u4e2d"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@given(st.lists(st.text(st.characters(max_codepoint=0x200), max_size=8), max_size=5))
def test_safe_text_is_the_same_however_it_is_cut(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert "".join(map(safe, pieces)) == safe(text)
    allowed = [c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160)]
    assert safe(text) == "".join(allowed)
    encoded = json_text({"text": text})
    assert json.loads(encoded) == {"text": text} and not CONTROLS.search(encoded)


@pytest.mark.parametrize("kind", [Screen, PlainTerminal, Terminal])
def test_screens_obey_nothing_that_a_model_says(
    kind: type[Screen], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is Terminal:
        pytest.importorskip("prompt_toolkit")
        pytest.importorskip("rich")
    screen = kind()
    for piece in (EVIL[:2], EVIL[2:9], EVIL[9:]):  # cut inside a sequence
        screen.write(piece)
    screen.end_reply()
    assert capsys.readouterr().out == TAME + "\n"
    screen.note("note \x1b[2J\x9bm")
    said = capsys.readouterr()
    assert (said.out + said.err).strip() == "note [2Jm"


class EvilLLM:
    """Says EVIL, in two pieces."""

    def __enter__(self) -> EvilLLM:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def stream(self, prompt: Any, **options: Any) -> Iterator[Piece]:
        yield Piece(EVIL[:2], 1, None, None)
        yield Piece(EVIL[2:], 2, "stop", None)

    def encode_chat(self, messages: Any, add_generation_prompt: bool = True) -> list[int]:
        return [1]

    def session(self) -> Any:
        return SimpleNamespace(stream=self.stream, reply=None)


class TerminalText(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_generate_cleans_for_a_terminal_and_not_for_a_pipe(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllama.cli.generate.open_llm", lambda arguments: EvilLLM())
    assert main(["generate", "-p", "x"]) == 0
    assert capsys.readouterr().out == EVIL + "\n"
    terminal = TerminalText()
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(["generate", "-p", "x"]) == 0
    assert terminal.getvalue() == TAME + "\n"


def test_one_question_is_answered_cleanly(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllama.cli.chat.open_llm", lambda arguments: EvilLLM())
    assert main(["chat", "-p", "x"]) == 0
    assert capsys.readouterr().out == TAME + "\n"


def edit_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_info_and_errors_show_files_cleanly(gguf: Path, capsys: Captured) -> None:
    folder = edit_config(locate(gguf), source={"name": "evil\x1b[2J\n\x9bname", "kind": "\x07gguf"})
    capsys.readouterr()
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert not CONTROLS.search(out) and re.search(r"^source +evil\[2J name \(gguf\)$", out, re.MULTILINE)
    assert main(["info", "--json", str(folder)]) == 0
    out = capsys.readouterr().out
    assert not CONTROLS.search(out) and json.loads(out)["config"]["source"]["name"] == "evil\x1b[2J\n\x9bname"
    assert main(["bench", str(folder), "-p", "2", "-n", "0", "-r", "1", "-t", "1"]) == 0
    out = capsys.readouterr().out
    assert not CONTROLS.search(out) and "| evil[2J name |" in out
    for bad in ("evil\x1b[2J\x9b", ["\x1b\x9b"]):
        assert main(["info", str(edit_config(folder, architecture=bad))]) == 1
        assert not CONTROLS.search(capsys.readouterr().err)
    assert main(["info", "no\x1b[2J\x9bwhere"]) == 1
    assert capsys.readouterr().err.startswith("pyllama: no[2Jwhere: no such file")


@pytest.mark.parametrize("key", ["source", "quantization"])
def test_info_and_bench_of_odd_origins(key: str, gguf: Path, capsys: Captured) -> None:
    folder = locate(gguf)
    bench = ["bench", str(folder), "-p", "2", "-n", "0", "-r", "1", "-t", "1"]
    for value in ([1], "x", {"name": 3}):
        edit_config(folder, **{key: value})
        for argv in (["info", str(folder)], bench):
            assert main(argv) == 1
            assert f"config.json: {key} is " in capsys.readouterr().err
    edit_config(folder, **{key: None})
    assert main(["info", str(folder)]) == 0
    assert ("source         unknown" in capsys.readouterr().out) == (key == "source")
    assert main(bench) == 0
    assert (f"| {folder.name} |" in capsys.readouterr().out) == (key == "source")
