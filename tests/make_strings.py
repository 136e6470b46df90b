"""Strings on which tokenizers go wrong: `strings(n)` is the same list every time, here and in the oracles.

Characters of all planes, combining marks, runs of blanks and line ends, control characters, emoji sequences, code,
numbers, mixed scripts, near misses of special tokens. Special tokens themselves are added by those tests that mean
them.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable

_WORDS = [
    "the",
    "of",
    "and",
    "tokenizer",
    "Hello",
    "WORLD",
    "it's",
    "don't",
    "I'LL",
    "we've",
    "they'd",
    "naïve",
    "façade",
    "über",
    "straße",
    "résumé",
    "Łódź",
    "İstanbul",
    "ﬁne",
    "привет",
    "мир",
    "Καλημέρα",
    "κόσμε",
    "שלום",
    "עולם",
    "مرحبا",
    "بالعالم",
    "नमस्ते",
    "दुनिया",
    "สวัสดีชาวโลก",
    "你好世界",
    "こんにちは世界",
    "안녕하세요",
    "ქართული",
    "Հայերեն",
    "አማርኛ",
    "ᏣᎳᎩ",
    "ᠮᠣᠩᠭᠣᠯ",
    "ဗမာ",
    "ខ្មែរ",
    "བོད་ཡིག",
    "𐌲𐌿𐍄𐌹𐍃𐌺",
    "𓀀𓂀",
    "𝒜𝓁𝑔𝑒𝒷𝓇𝒶",
    "ℵ₀",
    "x²",
    "½",
    "Ⅷ",
    "①",
    "٣٤٥",
    "๑๒๓",
    "一二三",
]
_EMOJI = ["😀", "👍🏽", "👩‍👩‍👧‍👦", "🇺🇸", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "❤️", "✈︎", "1️⃣", "🧑🏿‍🚀", "🤷‍♀️", "🫠", "⌚", "🀄"]
_BLANKS = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\n\n",
    " \n",
    "\n ",
    "\r",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "\u2028",
    "\x85",
    "\x0b",
    "\x0c",
    "\u1680",
    "\ufeff",
    "▁",
    "▁▁",
]
_CODE = [
    "def f(x):\n    return x**2  # ok\n",
    "for (int i=0; i<n; ++i) { a[i] += 1; }",
    '<div class="a">\n\t<p>&nbsp;</p>\n</div>',
    "SELECT * FROM t WHERE a != 'b';",
    "#include <vector>\n",
    '{"key": [1, 2.5e-3, null]}',
    "x = lambda *a, **k: (a, k)",
    "\\frac{1}{2}\\sum_{i=0}^{n}",
    "C:\\Users\\a\\b.txt",
    "https://example.org/a?b=c&d=%20#e",
    '$(ls -la | grep "x")',
    "```py\n```",
    "===---+++***///",
    "if(!(a&&b)||c){}",
    "\t\tfoo();\n\t}\n",
    "@decorator\nclass A: ...",
    "0xDEADBEEF 0b1010 1_000",
]
_NEAR_MISSES = ["<|im_", "|>", "<|", "im_end", "<s", "/s>", "[INST", "INST]", "<0x41>", "<unk", "<0x", "Ġ", "Ċ", "ĠĠ"]
_MARKS = "\u0300\u0301\u0308\u0327\u0338\u20dd\u064e\u0651\u05b8\u094d\u0e47\u1161\u11a8\u3099\ufe0f\u200d\U0001f3fb"


def _any_character(rng: random.Random) -> str:
    """A character of any plane, assigned or not, but no half of a surrogate pair."""
    top = rng.choice([0x80, 0x250, 0x3000, 0xD800, 0x10000, 0x20000, 0x110000])
    code = rng.randrange(top)
    return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"


def _number(rng: random.Random) -> str:
    digits = rng.choice(["0123456789", "0123456789", "٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９", "०१२३४५६७८९", "²³¹½¾Ⅳ①"])
    text = "".join(rng.choices(digits, k=rng.randrange(1, 9)))
    return rng.choice(["{}", "-{}", "{}.5", "1,{}", "${}", "{}%", "a{}b", " {} ", "  {}", "{}th"]).format(text)


def _marked(rng: random.Random) -> str:
    base = "".join(rng.choices("aeinoAEk한가क्ا", k=rng.randrange(1, 5)))
    text = "".join(c + "".join(rng.choices(_MARKS, k=rng.randrange(3))) for c in base)
    return unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKC", "NFKD"]), text)


_PARTS: list[Callable[[random.Random], str]] = [
    lambda rng: rng.choice(_WORDS),
    lambda rng: rng.choice(_WORDS),
    lambda rng: rng.choice(_WORDS).upper(),
    lambda rng: rng.choice(_EMOJI),
    lambda rng: rng.choice(_CODE),
    lambda rng: rng.choice(_NEAR_MISSES),
    _number,
    _marked,
    _any_character,
    lambda rng: "".join(_any_character(rng) for _ in range(rng.randrange(1, 12))),
    lambda rng: chr(rng.randrange(32)) * rng.randrange(1, 3),
    lambda rng: rng.choice("!?.,;:-_'\"()[]{}<>/\\|@#$%^&*+=~`") * rng.randrange(1, 6),
    lambda rng: rng.choice("aA1. \n") * rng.randrange(1, 40),
]


def _string(rng: random.Random) -> str:
    out = []
    for _ in range(rng.randrange(1, 9)):
        if rng.random() < 0.8:
            out.append(rng.choice(_BLANKS[:6] if rng.random() < 0.7 else _BLANKS) * rng.choice([1, 1, 1, 1, 2, 3, 7]))
        out.append(rng.choice(_PARTS)(rng))
    if rng.random() < 0.5:
        out.append(rng.choice(_BLANKS))
    return "".join(out)


def strings(n: int = 10_000, seed: int = 0) -> list[str]:
    """`n` different strings: every listed piece and each character up to U+02FF, then random mixtures."""
    rng = random.Random(seed)
    singles = ["", *_WORDS, *_EMOJI, *_BLANKS, *_CODE, *_NEAR_MISSES, *map(chr, range(0x300))]
    singles += [f"{blank}{word}" for blank in _BLANKS for word in ("a", "1", ".", "é")]
    found = dict.fromkeys(singles)
    if n < len(found):
        return rng.sample(list(found), n // 2) + [_string(rng) for _ in range(n - n // 2)]
    while len(found) < n:
        found.setdefault(_string(rng))
    return list(found)
