"""The token ids of some texts, kept beside a converted model and compared when it is opened.

A model is only as good as its ids: another version of a tokenizer library, a changed file or a defect of ours would
give wrong ones without a word, and the model would answer, worse. Texts are chosen for what tokenizers disagree about.
The file carries its texts, so that later versions may choose others. Says nothing about how ids are made.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..common.errors import ModelFormatError
from ..common.reader import read_json, shown
from . import Tokenizer

GOLDEN_FILE = "golden_ids.json"
MAX_BYTES = 1 << 20
MAX_TEXTS = 1000

TEXTS = (
    "",
    "Hello, world!",
    " two  spaces   and\ttabs\n\n\nlines \r\n end ",
    "\n",
    "   ",
    "▁▁ a ▁b",
    "it's we'll I'D they'Ve don’t",
    "12345 1,234.56 0x1F 3rd ٣٤٥ ²½Ⅷ １２３",
    "CamelCase snake_case kebab-case UPPER lower",
    "def f(x):\n    return {'a': [x ** 2, -1e-3]}  # ok\n",
    "\tfor (int i = 0; i < n; ++i) { a[i] += 1; }\r\n",
    'https://example.org/a?b=c&d=%20#e <p class="x">&nbsp;</p>',
    "!!! ... --- ??? ((())) [[]] {{}} $$ ## @@",
    "naïve façade straße Łódź İstanbul ﬁne",
    "e\u0301 a\u0308 o\u0323\u0302 한국 \u1112\u1161\u11ab",
    "Привет, мир! Καλημέρα κόσμε",
    "שלום עולם مرحبا بالعالم नमस्ते दुनिया",
    "你好，世界。こんにちは世界！ 안녕하세요 สวัสดีชาวโลก",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇺🇸 ❤️ 1️⃣",
    "𝒜𝓁𝑔𝑒𝒷𝓇𝒶 𓀀 𐌲𐌿𐍄",
    "\u00a0\u2003\u3000\u200b\u2028\ufeff\x85",
    "\x00\x01\x7f\x1b[0m",
    "<s> </s> <unk> <0x41> <|endoftext|> <|im_start|>user",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "[INST] hi [/INST] <<SYS>>",
    "a" * 60,
    " " * 40 + "x",
    "The quick brown fox jumps over the lazy dog. " * 2,
)


def golden_bytes(tokenizer: Tokenizer) -> bytes:
    """The contents of the file for a model with this tokenizer."""
    document = {"texts": TEXTS, "ids": [_ids(tokenizer, text) for text in TEXTS]}
    return (json.dumps(document) + "\n").encode()


def check_golden_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """Raises ModelFormatError when the tokenizer gives other ids than when the model was converted.

    A folder without the file, which an older version wrote, is not checked.
    """
    path = folder / GOLDEN_FILE
    if not path.is_file():
        return
    document = read_json(path, MAX_BYTES)
    texts, ids = document.get("texts"), document.get("ids")
    if not isinstance(texts, list) or not isinstance(ids, list) or not 0 < len(texts) == len(ids) <= MAX_TEXTS:
        raise ModelFormatError(f"{path}: expected two lists, texts and ids, of one length of at most {MAX_TEXTS}")
    for text, expected in zip(texts, ids, strict=True):
        try:
            found = _ids(tokenizer, text)
        except ValueError as error:
            raise ModelFormatError(f"{path}: {error}") from None
        if found != expected:
            raise ModelFormatError(
                f"{path}: the tokenizer does not give the ids that the model was converted with: {shown(text, 40)} has"
                f" {shown(found, 60)}, expected {shown(expected, 60)}. Its files, or the library that reads them, are"
                " others now; convert the model again, or install the library's former version"
            )


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=True, parse_special=True)
