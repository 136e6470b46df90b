"""`pyllama chat`: one question, lines from a pipe, a conversation, a person at a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyllama import ContextLengthError, Piece
from pyllama.chat_template import ChatTemplate
from pyllama.cli.chat import Conversation, talk
from pyllama.cli.main import main
from pyllama.cli.terminal import Screen, history_path
from pyllama.common.errors import PyllamaError

from .conftest import FAST, PYTHON, ROOT, Captured


def test_one_question(demo_model: Path, capsys: Captured) -> None:
    assert main(["chat", str(demo_model), "-p", "What is the capital of Germany?", *FAST]) == 0
    said = capsys.readouterr()
    assert "Berlin" in said.out and said.out.endswith("\n")
    assert re.fullmatch(r"\[\d+ tokens, [\d.]+ tok/s · prompt \d+ tokens, [\d.]+ tok/s\]\n", said.err)


def test_lines_from_a_pipe(demo_model: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = (
        "What is the \\\ncapital of Germany?\n\nTell me more.\n/stats\n/sing\n/system Talk like a cat.\n/stats\n"
    )
    questions += "/clear\n/help\n/system\\\nTalk like a dog.\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(questions))
    assert main(["chat", str(demo_model), "--max-tokens", "24", "--system", "You are helpful.", *FAST]) == 0
    said = capsys.readouterr()
    assert "Berlin" in said.out.splitlines()[0] and len(said.out.splitlines()) >= 2
    assert said.err.count("tok/s]") == 2
    assert "context: " in said.err and "unknown command /sing" in said.err and "forgotten" in said.err
    assert said.err.count("system prompt set") == 2 and "/clear        forget" in said.err
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
