"""`make check-crash`: conversions killed at every call that changes a file, then at random moments, 200 in all.

After each the output is the old one or the new one, whole; going on gives the very bytes of a conversion that nobody
stopped, and nothing stays beside it. Says how many kills hit. The rule itself is in tests/test_quantize_resume.py.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quantize import convert, verify
from tests.helpers_crash import FORMAT, crash
from tests.test_quantize import hf_source, listing
from tests.test_quantize_resume import TINY

KILLS = 200


def main() -> int:
    rng = random.Random(5)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "place").mkdir()
        source, out = hf_source(base / "hf", TINY), base / "place" / "model"
        whole = listing(convert(source, base / "whole", format=FORMAT))
        counted = crash(source, base / "counted", "at", -1, resume=False).stdout.split()
        n_calls, seconds = int(counted[0]), float(counted[1])
        convert(source, out, format="q8")
        old, hit = listing(out), 0
        for kill in range(KILLS):
            how, when = ("at", kill // 2 + 1) if kill < 2 * n_calls else ("after", rng.uniform(0, seconds))
            ended = crash(source, out, how, when, resume=kill % 2 == 0)
            hit += ended.returncode == -9
            if listing(out) not in (old, whole):
                print(f"kill {how} {when}: the output is neither the old nor the new one")
                return 1
            verify(out)
            convert(source, out, format=FORMAT, overwrite=True, resume=True)
            if listing(out) != whole or [path.name for path in out.parent.iterdir()] != ["model"]:
                print(f"kill {how} {when}: going on did not give the same bytes")
                return 1
            convert(source, out, format="q8", overwrite=True)
    at_calls = min(2 * n_calls, KILLS)
    print(f"{hit} of {KILLS} conversions were killed, {at_calls} at a call of their own; none left a broken output")
    return 0 if hit > KILLS // 2 else 1


if __name__ == "__main__":
    sys.exit(main())
