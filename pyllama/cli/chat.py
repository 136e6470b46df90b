"""`pyllama chat`: a conversation on a terminal, line by line from a pipe, or a single question with -p.

What is said here is the same in all three: `Conversation` keeps the messages and one session, so that each turn costs
only what is new. Reading lines and colours are in terminal.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from .options import add_model, add_sampling, open_llm, sampling_options

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import Piece, RequestOutput
    from .terminal import Screen

HELP = """\
/help         this text
/clear        forget the conversation (the system prompt stays)
/system TEXT  set the system prompt and start over; without TEXT: remove it
/stats        tokens and speed of the last reply, and how full the context is
/exit         leave (also Ctrl-D)
Enter sends; Alt-Enter, or a backslash at the end of a line, goes on in the next line. Ctrl-C stops a reply."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat", help="talk with a model", description="Talk with a model.", epilog="In the chat:\n" + HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="ask this one thing, print the answer and leave")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    add_sampling(parser)
    parser.set_defaults(run=run)


class Conversation:
    """Messages so far and the session that has them in its cache."""

    def __init__(self, llm: LLM, system: str | None, options: dict[str, Any]) -> None:
        self.llm = llm
        self.options = options
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.session = llm.session()
        self.last: RequestOutput | None = None
        self.clear()

    def clear(self) -> None:
        """Back to the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.last = None

    def ask(self, text: str) -> Generator[str, None, None]:
        """Adds the user's turn and yields the answer's pieces; the answer, or what was written of it, becomes a turn.

        Raises at once, with the conversation as it was: ContextLengthError when the turn does not fit, PyllamaError
        when the template refuses it, ValueError for text that cannot be encoded.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        stream = self.session.stream(self.llm.encode_chat(messages), **self.options)
        self.messages = messages
        return self._answer(stream)

    def _answer(self, stream: Generator[Piece, None, None]) -> Generator[str, None, None]:
        written: list[str] = []
        try:
            for piece in stream:
                written.append(piece.text)
                yield piece.text
            if self.session.reply is not None:
                self.last = self.session.reply.output()
        finally:  # also when it is left in the middle: user and assistant take turns
            stream.close()
            self.messages.append({"role": "assistant", "content": "".join(written)})

    def n_tok(self) -> int:
        """Tokens of the conversation as the model would read it now."""
        return len(self.llm.encode_chat(self.messages, add_generation_prompt=False)) if self.messages else 0

    def drop_oldest_turn(self) -> bool:
        """Forgets the oldest question and its answer; False when there is none."""
        first = 1 if self.system else 0
        if len(self.messages) - first < 2:
            return False
        del self.messages[first : first + 2]
        return True

    def speed(self) -> str:
        """The last reply in one line."""
        if self.last is None:
            return "no reply yet"
        usage, timings = self.last.usage, self.last.timings
        guesses = f" · {timings.draft_n_accepted} of {timings.draft_n} guesses right" if timings.draft_n else ""
        return (
            f"{usage.completion_tokens} tokens, {timings.decode_tok_per_s:.1f} tok/s · "
            f"prompt {timings.prompt_tok} tokens, {timings.prompt_tok_per_s:.1f} tok/s{guesses}"
        )


def run(arguments: argparse.Namespace) -> int:
    from .terminal import Screen, make_screen

    options = sampling_options(arguments)
    with open_llm(arguments) as llm:
        check_system(llm, arguments.system)  # a model that cannot chat says so before the first question
        conversation = Conversation(llm, arguments.system, options)
        if arguments.prompt is not None:
            return _ask_once(conversation, Screen(), arguments.prompt)
        return talk(conversation, make_screen())


def check_system(llm: LLM, system: str | None) -> None:
    """Raises PyllamaError or ValueError when the model cannot chat, or not with this system prompt."""
    opening = [{"role": "system", "content": system}] if system else []
    llm.encode_chat([*opening, {"role": "user", "content": "?"}])


def _ask_once(conversation: Conversation, screen: Screen, prompt: str) -> int:
    text = sys.stdin.read() if prompt == "-" else prompt
    for piece in conversation.ask(text):
        screen.write(piece)
    screen.end_reply()
    screen.note(f"[{conversation.speed()}]")
    return 0


def talk(conversation: Conversation, screen: Screen) -> int:
    """The loop of questions, commands and answers, until the input ends."""
    llm = conversation.llm
    screen.note(f"{llm.path.name} · {llm.runs_on} · context {llm.n_ctx} · /help for help")
    while True:
        try:
            line = screen.read()
        except KeyboardInterrupt:  # at the prompt it only clears the line
            continue
        if line is None:
            return 0
        text = line.strip()
        if text.startswith("/"):
            if not _command(conversation, screen, text):
                return 0
        elif text:
            _answer(conversation, screen, text)


def _command(conversation: Conversation, screen: Screen, text: str) -> bool:
    """Carries out a /command; False to leave."""
    from ..common.errors import PyllamaError

    name, *rest = text.split(maxsplit=1)
    if name in ("/exit", "/quit"):
        return False
    if name == "/clear":
        conversation.clear()
        screen.note("forgotten")
    elif name == "/system":
        system = rest[0] if rest else None
        try:
            check_system(conversation.llm, system)
        except (PyllamaError, ValueError) as error:
            screen.note(f"not set, the system prompt is the old one: {error}")
            return True
        conversation.system = system
        conversation.clear()
        screen.note("system prompt set, conversation started over" if conversation.system else "no system prompt")
    elif name == "/stats":
        screen.note(conversation.speed())
        screen.note(f"context: {conversation.n_tok()} of {conversation.llm.n_ctx} tokens")
    elif name == "/help":
        screen.note(HELP)
    else:
        screen.note(f"unknown command {name}; /help lists them")
    return True


def _answer(conversation: Conversation, screen: Screen, text: str) -> None:
    from ..common.errors import ContextLengthError, PyllamaError

    while True:
        try:
            pieces = conversation.ask(text)
        except ContextLengthError as error:
            screen.note(f"the context is full: {error}")
            if not screen.confirm("drop the oldest turns?") or not conversation.drop_oldest_turn():
                screen.note("not sent; /clear starts over")
                return
            continue
        except (PyllamaError, ValueError) as error:  # the template's refusal, say, or text that is no text
            screen.note(f"not sent: {error}")
            return
        break
    try:
        stopped = _print_reply(screen, pieces)
    except (PyllamaError, ValueError) as error:
        screen.note(f"the reply broke off: {error}")
        return
    if stopped:
        screen.note("[stopped]")
        return
    screen.note(f"[{conversation.speed()}]")
    full = conversation.last is not None and conversation.last.usage.total_tokens >= conversation.llm.n_ctx
    if full:
        screen.note("the context is full: the reply was cut there")


def _print_reply(screen: Screen, pieces: Generator[str, None, None]) -> bool:
    """Prints the answer as it comes; True when Ctrl-C stopped it."""
    try:
        for piece in pieces:
            screen.write(piece)
    except KeyboardInterrupt:
        return True
    finally:
        pieces.close()
        screen.end_reply()
    return False
