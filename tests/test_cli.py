"""The commands as people and scripts use them: stdout and stderr, exit codes, pipes, Ctrl-C, a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama import ContextLengthError, Piece, __version__
from pyllama.chat_template import ChatTemplate
from pyllama.cli.chat import Conversation, talk
from pyllama.cli.main import main
from pyllama.cli.terminal import PlainTerminal, Screen, Terminal, history_path, json_text, safe
from pyllama.common.errors import PyllamaError
from pyllama.memory import available_bytes
from pyllama.native import load_native
from pyllama.open import cache_folder, locate
from tests import make_sources as make

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--threads", "1", "--temperature", "0"]
PYTHON = [sys.executable, "-m", "pyllama"]

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _no_debugging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYLLAMA_DEBUG", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("pyllama.cli.bench._PROBE_S", 0.02)
    monkeypatch.setattr("pyllama.doctor._PROBE_S", 0.02)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A small model of nonsense words, quick to open."""
    return make.write_gguf(tmp_path / "small.gguf", make.Shape(), make.random_weights(make.Shape()), "Q4_0")


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
        ["generate", "-p", "x", "--top-p", "7"],
        ["generate", "-p", "x", "--temperature", "nan"],
        ["chat", "--device", "tpu"],
        ["chat", "--speculative", "magic"],
        ["chat", "--speculative", "lookup", "--draft", "demo"],
        ["bench", "-p", "-1"],
        ["bench", "-p", "0", "-n", "0"],
        ["bench", "--format", "q4"],
        ["bench", "demo", "--synthetic", "1b"],
        ["bench", "--synthetic", "3b"],
        ["bench", "--synthetic", "1b", "--group-size", "48"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(argv: list[str], capsys: Captured) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err


@pytest.mark.parametrize("command", [["info"], ["chat", "-p", "x"], ["generate", "-p", "x"], ["bench"]], ids=" ".join)
def test_an_error_is_one_line_and_1(command: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [command[0], "nowhere.gguf", *command[1:]]
    assert main(argv) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "pyllama: nowhere.gguf: no such file or folder; expected a model folder, a .gguf file, a Hugging Face folder, "
        'or "demo"\n'
    )
    monkeypatch.setenv("PYLLAMA_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(argv)


def test_what_is_not_a_user_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllama.cli.info.describe", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


# -------------------------------------------------------------------------------- what reaches a terminal

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


# -------------------------------------------------------------------------------- generate


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


def test_ctrl_c_is_130(demo_model: Path) -> None:
    command = [*PYTHON, "generate", str(demo_model), "-p", "Once", "--ignore-eos", *FAST]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(5)  # it is at work
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read().decode() == "interrupted\n"
        assert process.wait(60) == 130


# -------------------------------------------------------------------------------- chat


def test_one_question(demo_model: Path, capsys: Captured) -> None:
    assert main(["chat", str(demo_model), "-p", "What is the capital of Germany?", *FAST]) == 0
    said = capsys.readouterr()
    assert "Berlin" in said.out and said.out.endswith("\n")
    assert re.fullmatch(r"\[\d+ tokens, [\d.]+ tok/s · prompt \d+ tokens, [\d.]+ tok/s\]\n", said.err)


def test_lines_from_a_pipe(demo_model: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = (
        "What is the \\\ncapital of Germany?\n\nTell me more.\n/stats\n/sing\n/system Talk like a cat.\n/stats\n"
    )
    questions += "/clear\n/help\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(questions))
    assert main(["chat", str(demo_model), "--max-tokens", "24", "--system", "You are helpful.", *FAST]) == 0
    said = capsys.readouterr()
    assert "Berlin" in said.out.splitlines()[0] and len(said.out.splitlines()) >= 2
    assert said.err.count("tok/s]") == 2
    assert "context: " in said.err and "unknown command /sing" in said.err and "forgotten" in said.err
    assert "system prompt set" in said.err and "/clear        forget" in said.err
    assert "tok/s" not in said.out and ">" not in said.out


def test_a_model_without_a_template_says_so(gguf: Path, capsys: Captured) -> None:
    assert main(["chat", str(gguf), "-p", "Hi"]) == 1
    assert "no chat template" in capsys.readouterr().err


class Script(Screen):
    """A screen with prepared questions and answers; remembers everything."""

    def __init__(self, lines: list[Any], confirms: bool = False) -> None:
        self.lines = lines
        self.confirms = confirms
        self.written: list[str] = []
        self.notes: list[str] = []

    def read(self) -> str | None:
        line = self.lines.pop(0) if self.lines else None
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text: str) -> None:
        self.written.append(text)

    def end_reply(self) -> None:
        self.written.append("\n")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def confirm(self, question: str) -> bool:
        self.notes.append(question)
        return self.confirms


@pytest.fixture
def conversation(demo_model: Path) -> Iterator[Conversation]:
    from pyllama import LLM

    with LLM(demo_model, n_ctx=96, threads=1) as llm:
        yield Conversation(llm, "Be brief.", {"temperature": 0, "max_tokens": 12})


def test_turns_reuse_the_cache_and_give_what_chat_gives(conversation: Conversation) -> None:
    first = "".join(conversation.ask("Hello"))
    second = "".join(conversation.ask("Name a color."))
    assert conversation.last is not None
    prompt_tok = conversation.last.usage.prompt_tokens
    assert conversation.last.timings.prompt_tok < prompt_tok / 2
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in conversation.messages[2::2]] == [first, second]
    assert conversation.llm.chat(conversation.messages[:-1], temperature=0, max_tokens=12).text == second


def test_a_full_context_is_said_and_asked(conversation: Conversation) -> None:
    conversation.options["max_tokens"] = 20
    for text in ("Tell me a long story.", "Go on."):
        list(conversation.ask(text))
    before = list(conversation.messages)
    with pytest.raises(ContextLengthError):
        conversation.ask("And then? " * 9)
    assert conversation.messages == before
    screen = Script(["And then? " * 9], confirms=False)
    assert talk(conversation, screen) == 0
    assert any(note.startswith("the context is full") for note in screen.notes)
    assert "not sent; /clear starts over" in screen.notes
    assert conversation.messages == before and not screen.written
    screen = Script(["And then? " * 9], confirms=True)
    assert talk(conversation, screen) == 0
    assert "".join(screen.written).strip()
    assert conversation.messages[0]["role"] == "system" and len(conversation.messages) < len(before) + 2
    talk(conversation, Script(["much too long " * 99], confirms=True))  # dropping everything does not help: it ends


def test_ctrl_c_stops_only_the_reply(conversation: Conversation) -> None:
    class Impatient(Script):
        def write(self, text: str) -> None:
            super().write(text)
            if len(self.written) == 3:
                raise KeyboardInterrupt

    screen = Impatient(["Count to twenty.", KeyboardInterrupt(), "Hello"])
    assert talk(conversation, screen) == 0
    assert "[stopped]" in screen.notes
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[2]["content"] == "".join(screen.written[:3])
    assert any("tok/s" in note for note in screen.notes)


class Strict:
    """A template that refuses the system's role, and shouting."""

    def __init__(self, template: Any) -> None:
        self.template = template

    def __getattr__(self, name: str) -> Any:
        return getattr(self.template, name)

    def render(self, messages: list[dict[str, str]], *arguments: Any, **options: Any) -> str:
        if any(m["role"] == "system" and "cat" in m["content"] for m in messages):
            raise ValueError("the template refuses: no cats")
        if any("!" in m["content"] for m in messages if m["role"] == "user"):
            raise PyllamaError("the template broke: do not shout")
        return str(self.template.render(messages, *arguments, **options))


def test_what_cannot_be_sent_is_said_and_the_chat_goes_on(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation.llm, "_chat_template", Strict(conversation.llm._chat_template))
    list(conversation.ask("Hello"))
    before = list(conversation.messages)
    screen = Script(["Hi!", "lone \udcff", "/system Be a cat.", "/system \udcff", "/stats"])
    assert talk(conversation, screen) == 0
    assert conversation.messages == before and conversation.system == "Be brief." and not screen.written
    refused = [note for note in screen.notes if note.startswith("not s")]
    assert refused[0] == "not sent: the template broke: do not shout"
    assert refused[1].startswith("not sent: ") and "surrogate" in refused[1]
    assert refused[2] == "not set, the system prompt is the old one: the template refuses: no cats"
    assert refused[3].startswith("not set, the system prompt is the old one: ")
    assert len(refused) == 4 and screen.notes[-1].startswith("context: ")
    assert talk(conversation, Script(["Hello"])) == 0
    assert [m["role"] for m in conversation.messages[len(before) :]] == ["user", "assistant"]
    assert talk(conversation, Script(["/system Be kind."])) == 0
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]


def test_an_answer_that_breaks_off_is_said(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*arguments: Any, **options: Any) -> Iterator[Piece]:
        yield Piece("So", 1, None, None)
        raise PyllamaError("boom")

    monkeypatch.setattr(conversation.session, "stream", breaks)
    screen = Script(["Hello"])
    assert talk(conversation, screen) == 0
    assert screen.notes[-1] == "the reply broke off: boom" and screen.written == ["So", "\n"]
    assert conversation.messages[-1] == {"role": "assistant", "content": "So"}


def test_a_pipe_that_is_no_utf_8(demo_model: Path) -> None:
    command = [*PYTHON, "chat", str(demo_model), "--max-tokens", "24", *FAST]
    asked = b"\xed\xa0\x80 or \xff?\nWhat is the capital of Germany?\n"
    done = subprocess.run(command, cwd=ROOT, input=asked, capture_output=True)
    assert done.returncode == 0 and b"Berlin" in done.stdout
    assert b"not sent: " in done.stderr and b"Traceback" not in done.stderr


def test_a_system_prompt_that_is_refused_is_an_error_at_once(
    demo_model: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda self, *a, **o: Strict(SimpleNamespace(
        render=lambda *b, **p: render(self, *b, **p))).render(*a, **o))  # fmt: skip
    assert main(["chat", str(demo_model), "--system", "a cat", "-p", "Hi", *FAST]) == 1
    assert capsys.readouterr() == ("", "pyllama: the template refuses: no cats\n")


# Makes the terminal at stdin the session's own, so that Ctrl-C reaches the command, and becomes the command.
ON_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Person:
    """Types into a command that runs on a terminal, and reads what it shows."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.side, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *command],
            cwd=ROOT,
            stdin=other,
            stdout=other,
            stderr=other,
            env=environment,
            start_new_session=True,
        )
        os.close(other)
        self.seen = ""

    def see(self, pattern: str) -> str:
        """Reads until the pattern is there; returns what came up to it."""
        end = time.monotonic() + 60
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"never saw {pattern!r} in {self.seen!r}"
            if select.select([self.side], [], [], 1)[0]:
                try:
                    self.seen += re.sub(
                        r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(self.side, 4096).decode(errors="replace")
                    )
                except OSError:  # the other side is closed
                    assert re.search(pattern, self.seen), f"ended without {pattern!r}: {self.seen!r}"
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.side, text.encode())

    def __enter__(self) -> Person:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.side)


def test_a_person_at_a_terminal(demo_model: Path, tmp_path: Path) -> None:
    environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = [*PYTHON, "chat", str(demo_model), "--ignore-eos", "--max-tokens", "900", *FAST]
    with Person(command, environment) as person:
        person.see("/help for help")
        person.see(">")
        person.type("Write a poem about\x1b\rthe sea.\r")  # Alt-Enter goes on in the next line
        person.see(r"the sea\.")
        person.see(r"[a-z]{3,} [a-z]{2,} ")  # it answers
        person.type("\x03")
        person.see(r"\[stopped\]")
        person.see(">")
        person.type("/stats\r")
        person.see("context: ")
        person.see(">")
        person.type("\x04")
        assert person.process.wait(60) == 0
    history = (tmp_path / "state" / "pyllama" / "chat_history").read_text()
    assert "Write a poem about" in history and "the sea." in history and "/stats" in history


def test_a_history_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert history_path() is None


# -------------------------------------------------------------------------------- bench, info, doctor


def test_bench_json(capsys: Captured) -> None:
    argv = ["bench", "--synthetic", "135m", "--format", "q8", "-p", "4,8", "-n", "2", "-d", "64", "-r", "2", "-t", "1"]
    assert main([*argv, "--parallel", "3", "-o", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["test"] for record in records] == ["pp4 @ d64", "pp8 @ d64", "tg2 @ d64"]
    for record in records:
        assert record["backend"] == "CPU" and record["n_threads"] == 1 and record["n_batch"] == 512
        assert len(record["samples_ts"]) == 2 and record["avg_ts"] == pytest.approx(sum(record["samples_ts"]) / 2)
        assert record["model_n_params"] == 134_515_008
        assert record["model_size"] == pytest.approx(134.5e6 * 8.5 / 8, rel=0.001)
        assert record["n_depth"] == 64
        assert record["bandwidth_share"] == pytest.approx(record["gb_per_s"] / record["read_gb_per_s"])
        assert record["peak_share"] == pytest.approx(record["gop_per_s"] / record["int8_gop_per_s"])
    assert [(record["n_prompt"], record["n_gen"]) for record in records] == [(4, 0), (8, 0), (0, 2)]
    four, _, parallel = records
    cache_per_tok = 2 * 30 * 3 * 64 * 2  # keys and values, layers, heads, their size, bytes of f16
    # Four tokens are one step after 64; two steps of three sequences have 65 and 66 in the cache.
    step_bytes = four["model_size"] + 68 * cache_per_tok
    assert four["gb_per_s"] == pytest.approx(four["avg_ts"] / 4 * step_bytes / 1e9)
    step_bytes = parallel["model_size"] + 3 * 65.5 * cache_per_tok
    assert parallel["gb_per_s"] == pytest.approx(parallel["avg_ts"] / 3 * step_bytes / 1e9)
    layer_macs = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
    assert four["gop_per_s"] == pytest.approx(four["avg_ts"] * 2 * layer_macs / 1e9)


def test_bench_feeds_the_cache_once_and_steps_as_asked(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[int]] = []

    native = load_native()

    class Watched(native.Model):
        def step(self, batch: Any) -> Any:
            steps.append([len(tokens) for _, tokens, _, _ in batch])
            return super().step(batch)

    monkeypatch.setattr(native, "Model", Watched)
    argv = ["bench", "--synthetic", "tiny", "-t", "1", "-r", "2", "-b", "16", "-d", "20"]
    assert main([*argv, "-p", "4", "-n", "0"]) == 0
    assert steps == [[16], [4], [4], [4], [4]]  # the depth in chunks, a run to warm up, two that count
    steps.clear()
    assert main([*argv, "-p", "0", "-n", "2", "--parallel", "3"]) == 0
    assert steps == 3 * [[16], [4]] + 6 * [[1, 1, 1]]
    assert "| tg2 @ d20 |" in capsys.readouterr().out


def test_bench_table_of_a_file(gguf: Path, capsys: Captured) -> None:
    assert main(["bench", str(gguf), "-p", "8", "-n", "3", "-r", "1", "-t", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("| model | size | params | threads")
    share = r"\d+(\.\d)?, \d+ % of \d+"
    assert re.search(rf"\| pp8 \| .* \| {share} \| {share} \(\w+\) \|$", lines[2])
    assert re.search(rf"\| tg3 \| .* \| {share} \| {share} \(\w+\) \|$", lines[3])
    assert main(["bench", str(gguf), "-p", "8", "-n", "0", "-r", "1", "--profile"]) == 0
    title, line, row = capsys.readouterr().out.splitlines()
    assert title.endswith("| attention | head | products | rest |")
    assert title.count("|") == line.count("|") == row.count("|")
    assert sum(int(share) for share in re.findall(r"(\d+) % \|", row)) == pytest.approx(100, abs=2)
    assert main(["bench", str(gguf), "-p", "1000"]) == 1
    assert "needs a context of 1000 tokens, the model has 128" in capsys.readouterr().err


def test_info(demo_model: Path, gguf: Path, capsys: Captured) -> None:
    assert main(["info", str(demo_model)]) == 0
    text = capsys.readouterr().out
    assert "134,515,008" in text and "8192 tokens" in text and "tokenizer.json" in text
    assert re.search(r"chat template +yes", text) and re.search(r"q4a g32 +210 +106,168,320", text)
    assert main(["info", str(gguf), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["dim"] == 64 and record["chat_template"] is False and record["foreign"] is True
    assert record["tokenizer"] == "tokenizer.model" and not list(cache_folder().glob("small-*"))
    assert main(["info", str(gguf)]) == 0
    assert "a foreign checkpoint" in capsys.readouterr().out
    assert sum(row["params"] for row in record["formats"].values()) == record["n_params"]
    assert record["bits_per_weight"] == pytest.approx(8 * record["n_bytes"] / record["n_params"])


def test_doctor(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYLLAMA_ISA", raising=False)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"{__version__}" in text and "GB/s read with" in text and "everything runs on the CPU" in text
    assert "scalar" in text and "[BAD]" not in text
    monkeypatch.setenv("PYLLAMA_ISA", "mmx")
    assert main(["doctor"]) == 1
    assert "[BAD] PYLLAMA_ISA=mmx: no such kernels in this build" in capsys.readouterr().out


def test_doctor_measures_only_where_there_is_memory(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYLLAMA_ISA", raising=False)
    native = load_native()

    def no_memory(threads: int, seconds: float) -> float:
        raise MemoryError

    fake = SimpleNamespace(**{name: getattr(native, name) for name in dir(native) if not name.startswith("__")})
    fake.read_bandwidth = no_memory
    monkeypatch.setattr("pyllama.doctor.load_native", lambda: fake)
    monkeypatch.setattr("pyllama.doctor.available_bytes", lambda: None)
    assert main(["doctor"]) == 0
    assert re.search(r"bandwidth +\[missing\] not measured: out of memory\n", capsys.readouterr().out)
    fake.read_bandwidth = lambda threads, seconds: pytest.fail("measured all the same")
    monkeypatch.setattr("pyllama.doctor.available_bytes", lambda: (2 << 30) - 1)
    assert main(["doctor"]) == 0
    assert "not measured: 2.0 GiB of memory are free, measuring takes 2" in capsys.readouterr().out
    fake.read_bandwidth = lambda threads, seconds: 12.5
    monkeypatch.setattr("pyllama.doctor.available_bytes", lambda: 2 << 30)
    assert main(["doctor"]) == 0
    assert "12.5 GB/s read with" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no /proc/meminfo here")
def test_doctor_knows_the_free_memory() -> None:
    free = available_bytes()
    assert free is not None and 1 << 20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_doctor_without_the_extension(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("the C++ extension pyllama._C is not built; run `pip install .`")

    monkeypatch.setattr("pyllama.doctor.load_native", missing)
    assert main(["doctor"]) == 1
    assert "[BAD] the C++ extension pyllama._C is not built" in capsys.readouterr().out


# -------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_examples(name: str, demo_model: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / name), str(demo_model)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and not done.stderr
    wanted = {"generate.py": "Paris", "chat.py": "Berlin"}.get(name, "")
    assert wanted in done.stdout
