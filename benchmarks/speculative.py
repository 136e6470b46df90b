"""Plain decoding against speculation, on work that copies and on work that does not: tokens per step, and the ratio of
speeds with its spread. Sides take turns within one process, on one mapped file; the replies must be equal.

    python benchmarks/speculative.py                     # the demo model, prompt lookup
    python benchmarks/speculative.py MODEL --draft SMALL # a draft model
    python benchmarks/speculative.py --steps             # tokens per step alone: one round, nothing timed
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyllama import LLM, RequestOutput

STORY = (
    "The lighthouse at Corran Point was built in 1871, after three fishing boats were lost in a single winter night. "
    "Its lamp could be seen from nineteen miles away. For the first forty years the keeper was Alasdair Munro, who "
    "lived there with his wife and their four children. Every evening he climbed the 112 steps to the lamp room, "
    "trimmed the wick and wound the clockwork that turned the lens. In 1934 the lamp was changed to electricity, and "
    "in 1988 the last keeper left. Today the tower belongs to the village, which opens it to visitors from May to "
    "September."
)
ERRORS = (
    "Yesterday me and my brother goes to the market for buy some vegetables. The market was very crowded, and we has "
    "to wait in a long line. My brother wanted buy tomatoes, but they was too expensive. In the end we buyed potatoes, "
    "carrots and two onion. When we was coming home it start to rain, and we forgot our umbrella at the shop. We "
    "runned all the way home and arrived completely wet, but we was laughing."
)
CODE = '''def total_price(items, tax_rate):
    """Adds up the prices of all items and the tax on them."""
    tmp = 0.0
    for item in items:
        if item.price < 0:
            raise ValueError("negative price: " + str(item.price))
        tmp = tmp + item.price * item.quantity
    tax = tmp * tax_rate
    return round(tmp + tax, 2)


def average_price(items):
    """The mean price of one piece."""
    tmp = 0.0
    pieces = 0
    for item in items:
        tmp = tmp + item.price * item.quantity
        pieces = pieces + item.quantity
    return tmp / pieces if pieces else 0.0'''
ORDERS = (
    "Order 4471 was placed on 2024-03-02 by Hannah Weiss, 14 Mill Lane, Bristol, for two oak shelves at 79.50 each. "
    "Order 4472 was placed on 2024-03-02 by Tomasz Zielinski, 8 Harbour Road, Cardiff, for one desk lamp at 34.00. "
    "Order 4473 was placed on 2024-03-03 by Amara Okafor, 221 Station Street, Leeds, for four dining chairs at 112.25 "
    "each. Order 4474 was placed on 2024-03-04 by Liam Byrne, 5 Castle Terrace, Edinburgh, for one walnut table at "
    "640.00."
)
COPY = {
    "edit": "Correct the grammar of this text. Change nothing else and answer with the whole text.\n\n" + ERRORS,
    "summary": "Summarise this text in a few points. Quote the sentence that supports each point.\n\n" + STORY,
    "rename": "Rename the variable `tmp` to `subtotal` in this Python code. Answer with the whole code.\n\n" + CODE,
    "extract": "Extract the orders of this text as a JSON list of objects with the fields number, date, customer, "
    "address, product, price.\n\n" + ORDERS,
    "insert": "Repeat this text, and add one sentence about the garden behind the tower at its end.\n\n" + STORY,
}
MILL = (
    "The old mill on the river Tarn was closed in 1962 when the new factory opened in the valley. For almost "
    "twenty years nobody used it, and the roof fell in. In 1981 a group of students from the town bought the mill"
    " for a small sum and began to repair it. They rebuilt the wooden wheel, cleaned the channel and planted "
    "forty apple trees around the yard. Today the mill grinds flour for three bakeries, and every Saturday "
    "visitors can watch the miller at work."
)
LETTER = (
    "dear mister Brown, i am writing you because the washing machine what I buyed in you're shop last week do not"
    " works. It make a loud noise and the water stay in the drum. I has called you three time but nobody answer "
    "the phone. please send somebody to repair it or gives me my money back. I hopes to hear from you soon."
)
STACK = """class Stack:
    def __init__(self):
        self.data = []

    def push(self, x):
        self.data.append(x)

    def pop(self):
        if len(self.data) == 0:
            raise IndexError("pop from empty stack")
        return self.data.pop()

    def size(self):
        return len(self.data)"""
RECORDS = (
    "Name: Maria Lopez; born: 1984-06-12; city: Valencia; phone: 555-0134. Name: Jonas Becker; born: 1990-11-03; "
    "city: Hamburg; phone: 555-0178. Name: Aiko Tanaka; born: 1979-01-25; city: Osaka; phone: 555-0190. Name: "
    "Peter Novak; born: 1988-08-30; city: Brno; phone: 555-0112."
)
BEES = (
    "Bees are insects that live in colonies of up to sixty thousand animals. A colony has one queen, who lays all"
    " the eggs, some hundred drones, and many thousand workers. Workers live only six weeks in summer. They build"
    " the comb, feed the larvae, guard the entrance and collect nectar and pollen. When a worker has found "
    "flowers, she tells the others by a dance in which direction and how far they must fly."
)
# Written down before any of them was run.
MORE_COPY = {
    "fix2": "Correct the spelling and grammar of this letter. Keep the wording otherwise.\n\n" + LETTER,
    "quote": "Which sentences of this text tell about years? Quote them exactly.\n\n" + MILL,
    "past": "Rewrite this text in the past tense.\n\n" + BEES,
    "rename2": "Rename the attribute `data` to `items` in this Python class. Answer with the whole code.\n\n" + STACK,
    "doc": "Add a docstring to every method of this Python class. Answer with the whole code.\n\n" + STACK,
    "table": "Write these records as a Markdown table.\n\n" + RECORDS,
    "json": "Convert these records to a JSON list.\n\n" + RECORDS,
    "list": "Split this text into a numbered list with one sentence for each number.\n\n" + BEES,
    "replace": "Replace the word `mill` by the word `castle` in this text and repeat the whole text.\n\n" + MILL,
    "sum": "Summarise this text in two sentences. Then quote the most important sentence.\n\n" + BEES,
    "names": "Change the name of the river to Aller and the year 1962 to 1971, and write the whole text again.\n\n"
    + MILL,
    "html": "Put this text into HTML, one paragraph for each sentence.\n\n" + MILL,
    "answer": "Read this text and answer: who bought the mill, when, and what did they do? Use the words of the text."
    "\n\n" + MILL,
    "shorten": "Shorten this text a little by leaving out unimportant words.\n\n" + BEES,
}
CHAT = {
    "explain": "Why is the sky blue in the day and red in the evening?",
    "letter": "Write a short letter to my landlord about a broken heater.",
    "story": "Tell me a short story about a fox who wants to learn to swim.",
    "plan": "What should I think of when I plan a three-day walk in the mountains?",
}

# name: prompts and how they are sampled
GROUPS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "copy": (COPY, {"temperature": 0.0}),
    "copy, more": (MORE_COPY, {"temperature": 0.0}),
    "copy, sampled": (COPY, {"temperature": 0.8, "seed": 1}),
    "chat": (CHAT, {"temperature": 0.0}),
    "chat, sampled": (CHAT, {"temperature": 0.8, "seed": 1}),
    "noise": (CHAT, {"temperature": 2.0, "seed": 1, "ignore_eos": True}),  # hardly any guess can come true
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--draft", metavar="MODEL", help="instead of prompt lookup")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-n", "--max-tokens", type=int, default=256)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--steps", action="store_true", help="count steps, time nothing")
    arguments = parser.parse_args()
    how = {"draft": arguments.draft} if arguments.draft else {"speculative": "lookup"}
    options: dict[str, Any] = {"max_tokens": arguments.max_tokens}
    rounds = 0 if arguments.steps else arguments.rounds
    print("| work | tokens | tokens per step | accepted of guessed | speed against plain (lowest–highest) |")
    print("|---|---:|---:|---:|---:|")
    with (
        LLM(arguments.model, threads=arguments.threads) as plain,
        LLM(arguments.model, threads=arguments.threads, **how) as guessing,
    ):
        for group, (prompts, sampling) in GROUPS.items():
            found = {
                name: measure((plain, guessing), text, rounds, options | sampling) for name, text in prompts.items()
            }
            for name, (out, ratios) in found.items():
                print(row(f"{group}: {name}", [out], ratios), flush=True)
            outs, ratios_of_all = zip(*found.values(), strict=True)
            print(row(f"**{group}**", outs, means(ratios_of_all)), flush=True)


def measure(
    sides: tuple[LLM, LLM], text: str, rounds: int, options: dict[str, Any]
) -> tuple[RequestOutput, list[float]]:
    """The reply of the guessing side, and per round how much faster than plain it decoded; sides take turns at going
    first, and a first round is not counted.
    """
    messages = [{"role": "user", "content": text}]
    ratios = []
    for i in range(rounds + 1):
        order = (0, 1) if i % 2 else (1, 0)
        outs = {side: sides[side].chat(messages, **options) for side in order}
        if outs[0].token_ids != outs[1].token_ids:
            raise AssertionError(f"speculation changed the reply to {text[:60]!r}")
        if i and outs[1].timings.decode_tok > 0:
            ratios.append(outs[0].timings.decode_s / outs[1].timings.decode_s)
    return outs[1], ratios


def means(ratios: Sequence[list[float]]) -> list[float]:
    """Per round, the geometric mean over prompts."""
    return [statistics.geometric_mean(of_round) for of_round in zip(*(r for r in ratios if r), strict=False)]


def row(name: str, outs: Sequence[RequestOutput], ratios: list[float]) -> str:
    timings = [out.timings for out in outs]
    n_tok, guessed = sum(t.decode_tok for t in timings), sum(t.draft_n for t in timings)
    accepted = sum(t.draft_n_accepted for t in timings)
    speed = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else "–"
    per_step = n_tok / max(n_tok - accepted, 1)
    return f"| {name} | {n_tok} | {per_step:.2f} | {accepted} of {guessed} | {speed} |"


if __name__ == "__main__":
    main()
