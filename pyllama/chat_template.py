"""From a conversation to the text, and to the token ids, that a model was trained on.

The template comes with the model (chat_template.jinja, or `chat_template` in tokenizer_config.json), is foreign code
and runs in template_sandbox.py. A few well-known ones are kept in named_templates.py, to be asked for by name: nothing
is guessed when a model has none. `encode_chat` keeps what people wrote from turning into control tokens. It keeps no
history and counts no tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from .common.errors import ModelFormatError, printable
from .common.named_templates import NAMED_TEMPLATES
from .common.reader import read_bytes, shown
from .template_sandbox import MAX_SOURCE_CHARS, Account, Environment, LimitError, RefusedError, spending
from .tokenizer import Tokenizer, check_text
from .tokenizer.special import read_object

MAX_OUTPUT_CHARS = 1 << 20
OUTPUT_PER_INPUT = 16
MAX_STEPS = 1_000_000
STEPS_PER_INPUT = 1_000
MAX_SECONDS = 10.0


class ChatTemplate:
    """A compiled template. `bos_token` and `eos_token` are what its variables of these names hold.

    Raises ModelFormatError when the source is no template.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", name: str = "chat template") -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise ModelFormatError(f"{name}: {len(source)} characters, at most {MAX_SOURCE_CHARS} are allowed")
        self.source = source
        self.name = name
        self.bos_token = bos_token
        self.eos_token = eos_token
        try:
            self._template = Environment().compile_counted(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelFormatError(f"{name}: line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise ModelFormatError(f"{name}: cannot be compiled: {_reason(error)}") from None

    @classmethod
    def from_folder(cls, path: str | Path) -> ChatTemplate | None:
        """The template of a model folder, None when it has none. Raises ModelFormatError for a broken one."""
        folder = Path(path)
        config_path, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_object(config_path)
        source, name = _pick(config.get("chat_template"), config_path), f"{config_path}: chat_template"
        if file.is_file():
            raw, name = read_bytes(file, 4 * MAX_SOURCE_CHARS, "chat template"), str(file)
            try:
                source = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ModelFormatError(f"{file}: not valid UTF-8 at byte {error.start}") from None
        if source is None:
            return None
        bos, eos = (_token_text(config.get(key)) for key in ("bos_token", "eos_token"))
        return cls(source, bos_token=bos, eos_token=eos, name=name)

    @classmethod
    def named(cls, name: str, *, bos_token: str = "", eos_token: str = "") -> ChatTemplate:
        """A well-known template: chatml, llama-2, llama-3 or mistral. Raises ValueError for another name."""
        if name not in NAMED_TEMPLATES:
            raise ValueError(f"no chat template is named {name!r}; there are {', '.join(NAMED_TEMPLATES)}")
        return cls(NAMED_TEMPLATES[name], bos_token=bos_token, eos_token=eos_token, name=name)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as one text.

        `messages`: dicts with the strings `role` and `content`. `add_generation_prompt` ends with the opening of a
        reply. `variables` are passed on to the template (`tools`, …). Raises ValueError when messages are malformed or
        the template refuses them, ModelFormatError when it fails.
        """
        check_messages(messages)
        values = {
            "tools": None,
            "documents": None,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        } | variables
        try:
            values |= {"messages": _copied(list(messages)), "add_generation_prompt": add_generation_prompt}
        except RecursionError:
            raise ValueError("messages: too deeply nested, or with a list or dict that holds itself") from None
        size, n_chars = _measure(values)
        max_text = MAX_OUTPUT_CHARS + OUTPUT_PER_INPUT * n_chars
        return self._run(values, Account(MAX_STEPS + STEPS_PER_INPUT * size + n_chars, max_text, MAX_SECONDS))

    def _run(self, values: dict[str, Any], account: Account) -> str:
        parts: list[str] = []
        length = 0
        try:
            with spending(account):
                for part in self._template.generate(values):
                    if not isinstance(part, str):  # what a call block calls may give anything
                        raise TypeError(f"a block gives a {type(part).__name__}, expected a text")
                    parts.append(part)
                    length += len(part)
                    account.limit(length)
                    account.charge(len(part) >> 4)
        except RefusedError as error:
            raise ValueError(
                f"the model's chat template refuses these messages: {printable(str(error.message)[:500])}"
            ) from None
        except LimitError as error:
            raise ModelFormatError(f"{self.name}: stopped: {error.message}") from None
        except Exception as error:
            raise ModelFormatError(f"{self.name}: failed on these messages: {_reason(error)}") from None
        return "".join(parts)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """ValueError unless `messages` is a list of dicts with strings for role and content (or tool calls for content)."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of dicts with role and content, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty; at least one is needed")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{index}] must be a dict with role and content, got {type(message).__name__}")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise ValueError(
                f"messages[{index}]: role must be a string such as 'user', got {message.get('role')!r:.80}"
            )
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise ValueError(f"messages[{index}]: content must be a string, got {type(content).__name__}")
        check_text(content)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """The token ids of a conversation, in which nothing that a message says becomes a control token.

    Where no message spells a control token, these are the ids of the whole rendered text. Where one does, the template
    is rendered a second time with the first character of each such spelling hidden, which tells the template's own
    control tokens from the messages'; the latter are encoded as the ordinary text that they are. Raises as `render`;
    ValueError also when a template changes its mind over the hidden characters, so that the two cannot be told apart.
    """
    text = template.render(messages, add_generation_prompt, **variables)
    starts = tokenizer.control_starts
    values = {"messages": list(messages), **variables}
    if not any(c in starts for c in _letters(values)):
        return tokenizer.encode(text, add_special=False, parse_special=True)
    hidden = _render_hidden(tokenizer, template, values, add_generation_prompt, text)
    spans = tokenizer.control_spans(hidden)
    if spans == tokenizer.control_spans(text):
        return tokenizer.encode(text, add_special=False, parse_special=True)
    return tokenizer.encode_around(text, spans)


def _render_hidden(
    tokenizer: Tokenizer, template: ChatTemplate, values: dict[str, Any], add_generation_prompt: bool, text: str
) -> str:
    """The rendered text with what people wrote made harmless, character by character in the same places.

    Hides every character with which a control token can begin, which also covers a token that only a message and the
    template together would spell. A template that looks at such characters (</think>) would render differently: then
    only those of whole spellings are hidden.
    """
    mask, back = _mask(tokenizer.control_starts, text, template.source)
    for whole in (False, True):
        masked = _mapped(values, lambda s, whole=whole: _masked(s, mask, tokenizer, whole))
        messages = masked.pop("messages")
        try:
            hidden = template.render(messages, add_generation_prompt, **masked)
        except (ValueError, ModelFormatError):
            continue
        if hidden.translate(back) == text:
            return hidden
    raise ValueError(
        "a message spells a control token of the model, and its chat template treats that text specially, so that it "
        "cannot be kept from becoming one; take it out of the message"
    )


def _mask(starts: frozenset[str], text: str, source: str) -> tuple[dict[int, int], dict[int, int]]:
    """For each of `starts` a private-use character that appears nowhere, and the way back."""
    taken = set(text) | set(source)
    free = (code for code in range(0xF0000, 0xFFFFE) if chr(code) not in taken)
    mask = {ord(start): next(free) for start in sorted(starts)}
    return mask, {there: here for here, there in mask.items()}


def _masked(text: str, mask: dict[int, int], tokenizer: Tokenizer, whole: bool) -> str:
    if not whole:
        return text.translate(mask)
    letters = list(text)
    for start, _ in tokenizer.control_spans(text):
        letters[start] = chr(mask[ord(letters[start])])
    return "".join(letters)


def _mapped(value: Any, change: Any) -> Any:
    """A copy of nested dicts and lists with every string value (no key) changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change) for item in value]
    return value


def _copied(value: Any) -> Any:
    """Plain dicts and lists, so that the template gets nothing with methods of its own."""
    return _mapped(value, lambda text: text)


def _letters(values: Any) -> set[str]:
    letters: set[str] = set()

    def collect(text: str) -> str:
        letters.update(text)
        return text

    _mapped(values, collect)
    return letters


def _measure(values: Any) -> tuple[int, int]:
    """How many values, and how many characters in them, a template is given."""
    size = n_chars = 0
    stack = [values]
    while stack:
        value = stack.pop()
        size += 1
        if isinstance(value, str):
            n_chars += len(value)
        elif isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, (list, tuple)):
            stack += value
    return size, n_chars


def _pick(value: Any, path: Path) -> str | None:
    """The template in `chat_template`: a string, or among a list of named ones the one named "default"."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        templates = {entry["name"]: entry.get("template") for entry in value if isinstance(entry.get("name"), str)}
        source = templates.get("default")
        if isinstance(source, str):
            return source
        raise ModelFormatError(f"{path}: chat_template has no template named default, only {shown(list(templates))}")
    raise ModelFormatError(
        f"{path}: chat_template must be a string or a list of named ones, found {type(value).__name__}"
    )


def _token_text(value: Any) -> str:
    """A token's text: a string, or an object whose `content` is one; "" for none. tokenizer/special.py reports bad
    ones."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {shown(str(error), 300)}"
