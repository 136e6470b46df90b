"""The harness of `make bench-peers`, without a peer and without a clock: what is chosen, asked, computed and kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, judge, models
from benchmarks.report import Results, table
from benchmarks.rows import ROWS, Row, Work, tokens_for
from benchmarks.side_peer import VARIANTS
from benchmarks.workers import WorkerError

AGAINST = Row("a", "decode", "1b-q4", "1b-q4_0", Work("decode", 10), 1.5, floor="read", share_goal=0.9)
ITSELF = Row("i", "step", "1b-q4", "1b-q4_0", Work("step", 4), 1.2, "itself", base=Work("step", 1), at_most=True)
INFO = {"weight_bytes": 1000, "cache_bytes_per_tok": 10, "layer_macs": 50, "head_macs": 7}


def test_rows_are_well_formed() -> None:
    assert len({row.key for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.ours in models.FOLDERS and (not row.peer or row.peer in models.GGUFS), row.key
        assert (row.kind == "itself") == (row.base is not None), row.key
        short = compare.shortened(row)
        assert short.ours in models.FOLDERS and (not row.peer or short.peer in models.GGUFS), row.key


def test_choosing_rows() -> None:
    assert compare.choose("all") == list(ROWS)
    assert [row.key for row in compare.choose("prefill-1b,decode-1b")] == ["decode-1b", "prefill-1b"]
    assert {row.key for row in compare.choose("deep-*")} == {"deep-decode-1b", "deep-prefill-1b", "deep-decode-1b-q8"}
    with pytest.raises(SystemExit, match="no row 'decode-70b'; there are decode-demo "):
        compare.choose("decode-1b,decode-70b")


# -------------------------------------------------------------------------------- from samples to a verdict


def test_bytes_and_operations_of_a_work() -> None:
    # Step i of three reads all weights once, and for each of two sequences the 100 + i tokens in its cache.
    by_hand = sum(1000 + 2 * (100 + i) * 10 for i in (1, 2, 3))
    assert judge.needed(Work("decode", 3, depth=100, parallel=2), "read", INFO) == by_hand
    assert judge.needed(Work("prefill", 512), "int8", INFO) == 2 * (512 * 50 + 7)
    assert judge.needed(Work("matmuls", 512), "int8", INFO) == 2 * 512 * 50


def test_ratio_is_taken_within_rounds() -> None:
    ours = [1.0, 2.0, 4.0]  # the machine slows down; in each round the peer takes 2, 2 and 1 times as long
    peer = {"slow": [9.0, 9.0, 9.0], "fast": [2.0, 4.0, 4.0]}
    record = judge.judge(AGAINST, ours, peer, [1e-6, 1e-6, 1e-6, 1e-6], INFO)
    assert record["ratio"]["samples"] == [2.0, 2.0, 1.0] and record["ratio"]["median"] == 2.0
    assert record["peer"]["setting"] == "fast" and record["peer"]["median"] == 10 / 4
    assert (record["ours"]["median"], record["ours"]["min"], record["ours"]["max"]) == (5.0, 2.5, 10.0)
    assert [c["ok"] for c in record["checks"]] == [True, True]


def test_share_is_taken_against_the_probes_around_a_round() -> None:
    needed = judge.needed(AGAINST.work, "read", INFO) / 1e9
    found = judge.shares(AGAINST, [1.0, 2.0], [1.0, 3.0, 1.0], INFO)
    assert found == [needed / 2, needed / 2 / 2]


def test_the_memory_where_the_weights_lie_has_a_share_of_its_own() -> None:
    record = judge.judge(AGAINST, [2.0, 2.0], {"x": [3.0, 3.0]}, [4.0] * 3, INFO, own_probes=[2.0] * 2)
    assert record["own_share"]["median"] == 2 * record["share"]["median"]
    assert record["own_floor"]["median"] == 2.0
    assert "where the weights lie" in table({"a": record}, (AGAINST,))


@pytest.mark.parametrize(("value", "ok"), [(1.5, True), (1.49, False)])
def test_marks_at_least(value: float, ok: bool) -> None:
    record = judge.judge(replace(AGAINST, floor="", share_goal=None), [1.0], {"x": [value]}, [], INFO)
    assert [c["ok"] for c in record["checks"]] == [ok]


def test_rows_that_compare_a_side_with_itself() -> None:
    record = judge.judge(
        ITSELF, [1.1, 1.3, 1.2], {"x": [3.0, 3.0, 3.0]}, [], INFO, [1.0, 1.0, 1.0], {"x": [1.0, 1.5, 2.0]}
    )
    assert record["ours"]["median"] == 1.2 and record["peer"]["samples"] == [3.0, 2.0, 1.5]
    assert record["checks"][0]["ok"]
    parallel = replace(ITSELF, work=Work("decode", 16, parallel=8), base=Work("decode", 16), at_most=False, goal=4.5)
    record = judge.judge(parallel, [2.0], {"x": [8.0]}, [], INFO, [1.0], {"x": [1.0]})
    assert (
        record["ours"]["median"] == 4.0 and record["peer"]["median"] == 1.0
    )  # eight times the tokens in twice the time
    assert not record["checks"][0]["ok"]


def test_rows_of_ours_alone() -> None:
    python = next(row for row in ROWS if row.key == "python")
    record = judge.judge(python, [9e-6, 12e-6, 8e-6], {}, [], INFO)
    assert record["ours"]["median"] == pytest.approx(9) and record["checks"][0]["ok"] and "peer" not in record
    start = next(row for row in ROWS if row.key == "start-7b")
    ours = [
        {"seconds": 0.3, "extra_bytes": 6.0},
        {"seconds": 0.5, "extra_bytes": 4.0},
        {"seconds": 0.35, "extra_bytes": 4.0},
    ]
    record = judge.judge_start(start, ours, {"repacked": [{"seconds": 8.0, "extra_bytes": 90.0}]}, 100)
    assert record["ours"]["median"] == 0.35 and record["ours"]["extra"] == 0.06
    assert [c["ok"] for c in record["checks"]] == [True, False]  # 6 % of the file, 5 % allowed


# -------------------------------------------------------------------------------- a run with made-up engines


class FakeWorker:
    """An engine whose speed depends on variant and setting, and a log of what it was asked."""

    log: list[tuple[str, str, int]]

    def __init__(self, python: str, side: str, words: list[str], environment: dict[str, str]) -> None:
        self.side = side
        self.variant = words[words.index("--variant") + 1] if side == "peer" else ""
        self.settings = ["default"] if side == "ours" else ["flash attention", "no flash attention"]
        self.info = dict(INFO)
        if "q8" in words:
            raise WorkerError("this build has no cache of type q8")

    def time(self, setting: str, work: Work) -> float:
        FakeWorker.log.append((self.side, setting, work.n))
        if self.side == "ours":
            return 1.0
        return 2.0 * (1.0 if self.variant == "as in the file" else 1.5) * (1.0 if setting == "flash attention" else 1.2)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        return {"value": 1.0} if do == "probe" else {"logits": [1.0, 2.0, 4.0]}

    def close(self) -> None:
        pass


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[argparse.Namespace]:
    monkeypatch.setattr(compare, "Worker", FakeWorker)
    monkeypatch.setattr(models, "folder_path", lambda name, cache: cache / name)
    monkeypatch.setattr(models, "gguf_path", lambda name, cache: cache / name)
    FakeWorker.log = []
    yield compare.parse_arguments(["--rounds", "3", "--pause", "0", "--cache", str(tmp_path), "--threads", "2"])


def test_rounds_alternate_and_the_peer_is_at_its_best(arguments: argparse.Namespace, tmp_path: Path) -> None:
    results = Results(tmp_path / "out.json", {"must_match": {}}, resume=False)
    record = compare.Comparison(arguments, results).measure(AGAINST)
    assert record["ratio"]["samples"] == [2.0, 2.0, 2.0]  # the warming round is not counted
    assert record["peer"]["setting"] == "as in the file, flash attention"
    assert len(record["floor"]["samples"]) == 4  # before the first round and after each
    rounds = [side for side, _, n in FakeWorker.log if n == 10]
    assert rounds == ["peer", "ours", "ours", "peer", "peer", "ours", "ours", "peer"]
    tried = results.data["scouts"]["1b-q4_0, 2 threads, decode"]
    assert set(tried) == set(VARIANTS) and set(tried["as in the file"]) == {"flash attention", "no flash attention"}
    n_asked = len(FakeWorker.log)
    compare.Comparison(arguments, results).measure(AGAINST)
    assert len(FakeWorker.log) == n_asked + 8  # the settings are not tried again


def test_a_large_file_tries_what_was_good_with_a_small_one(arguments: argparse.Namespace, tmp_path: Path) -> None:
    results = Results(tmp_path / "out.json", {"must_match": {}}, resume=False)
    comparison = compare.Comparison(arguments, results)
    comparison.measure(AGAINST)
    comparison.measure(replace(AGAINST, ours="7b-q4", peer="7b-q4_0"))
    assert len(results.data["scouts"]["7b-q4_0, 2 threads, decode"]) == 2


def test_a_row_that_cannot_be_measured_says_so(arguments: argparse.Namespace, tmp_path: Path) -> None:
    results = Results(tmp_path / "out.json", {"must_match": {}}, resume=False)
    row = replace(AGAINST, kv_dtype="q8")
    results.rows["a"] = compare.Comparison(arguments, results).measure(row)
    assert results.rows["a"] == {"skipped": "this build has no cache of type q8"}
    assert "not measured: this build has no cache of type q8" in table(results.rows, (row,))


def test_different_models_are_not_timed(
    arguments: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(self: FakeWorker, do: str, **rest: Any) -> dict[str, Any]:
        return {"value": 1.0} if do == "probe" else {"logits": [1.0, 2.0] if self.side == "ours" else [2.0, -1.0]}

    monkeypatch.setattr(FakeWorker, "ask", ask)
    results = Results(tmp_path / "out.json", {"must_match": {}}, resume=False)
    with pytest.raises(SystemExit, match="not the same model"):
        compare.Comparison(arguments, results).measure(AGAINST)
    other = replace(AGAINST, ours="1b-q4nl")  # weights of its own: nothing to agree on
    assert "ratio" in compare.Comparison(arguments, results).measure(other)


# -------------------------------------------------------------------------------- what is kept


def test_a_run_is_resumed_only_when_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    first = Results(path, {"must_match": {"threads": 2}}, resume=False)
    first.rows["a"] = {"skipped": "x"}
    first.save()
    assert Results(path, {"must_match": {"threads": 2}}, resume=True).rows == {"a": {"skipped": "x"}}
    assert Results(path, {"must_match": {"threads": 2}}, resume=False).rows == {}
    with pytest.raises(SystemExit, match="another threads; run without --resume"):
        Results(path, {"must_match": {"threads": 1}}, resume=True)
    path.write_text(json.dumps({"version": 1}))
    with pytest.raises(SystemExit, match="of another version"):
        Results(path, {"must_match": {}}, resume=True)


def test_main_keeps_rows_and_goes_on_after_them(
    arguments: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [
        "--rounds",
        "1",
        "--pause",
        "0",
        "--cache",
        str(tmp_path),
        "--threads",
        "2",
        "--rows",
        "decode-1b,prefill-1b",
    ]
    monkeypatch.setattr("sys.argv", ["compare.py", *argv])

    def interrupted(self: compare.Comparison, row: Row) -> dict[str, Any]:
        if row.key == "prefill-1b":
            raise KeyboardInterrupt
        return real(self, row)

    real = compare.Comparison.measure
    with monkeypatch.context() as patched:
        patched.setattr(compare.Comparison, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare.main()
    assert set(json.loads((tmp_path / "compare.json").read_text())["rows"]) == {"decode-1b"}
    FakeWorker.log.clear()
    monkeypatch.setattr("sys.argv", ["compare.py", *argv, "--resume"])
    compare.main()
    assert {n for side, _, n in FakeWorker.log if side == "ours"} == {512}  # decode-1b was not measured again
    out = capsys.readouterr().out
    assert "| decode 128, 1B, q4 g32 | ≥ 1.08×, ≥ 95% | **2.00×** | 128 (128–128) |" in out
    assert "| prefill 512, 1B, q4 g32 | ≥ 2.3×, ≥ 62% | **2.00×** |" in out


# -------------------------------------------------------------------------------- our side


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.folder_path("tiny-q4nl", tmp_path_factory.mktemp("bench"))


def test_our_side_times_every_kind_of_work(tiny: Path) -> None:
    pytest.importorskip("pyllama._C")
    from benchmarks.side_ours import Ours

    ours = Ours(str(tiny), threads=1)
    before = ours.logits("default", [5, 6, 7])
    for work in (
        Work("decode", 2),
        Work("decode", 2, depth=70),
        Work("decode", 2, depth=3, parallel=3),
        Work("prefill", 600),
        Work("prefill", 4, depth=70),
        Work("step", 4, depth=5, repeat=2),
        Work("matmuls", 3),
    ):
        assert ours.time("default", work) > 0, work
    assert ours.logits("default", [5, 6, 7]) == before
    # By hand: dim 256, 2 layers, 4 heads and 2 kv heads of 64, hidden 512, vocabulary 1,024, tied.
    per_layer = 256 * 256 + 2 * 128 * 256 + 256 * 256 + 3 * 256 * 512
    assert ours.info()["layer_macs"] == 2 * per_layer and ours.info()["head_macs"] == 1024 * 256
    assert ours.info()["cache_bytes_per_tok"] == 2 * 2 * 2 * 64 * 2
    payload = (2 * per_layer + 1024 * 256) * (4 + 16 / 64) / 8  # 4 bits and an f16 scale per 64
    assert payload + 4 * 4 * 256 <= ours.info()["weight_bytes"] <= payload * 1.01 + 4 * 4 * 256


def test_our_side_settles_folders_without_a_tokenizer_too(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyllama._C")
    from benchmarks.side_ours import Ours

    settled: list[set[str]] = []
    monkeypatch.setattr("pyllama.open.settle", lambda folder, seconds: settled.append(set(folder.tensors)))
    Ours(str(tiny), threads=1)
    (names,) = settled
    assert "tok_embeddings" in names and not any(tiny.glob("tokenizer*"))


def test_tokens_are_the_same_in_every_process() -> None:
    assert tokens_for(1000, 3) == tokens_for(1000, 3) and all(3 <= t < 1000 for t in tokens_for(1000, 50))
