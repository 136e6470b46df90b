"""A model over two backends has the bits that it has on one (==), whatever its steps are and wherever it is cut. Each
part sees whole steps and its own pages, also when something fails in the middle.

The bits are those of two CPU backends. Order of calls and failures are seen with backends that only keep a record, in a
program compiled here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllama import _C

from .helpers_models import Kind, Shape, SmallModel, all_logits, random_tokens, small_model

ROOT = Path(__file__).resolve().parent.parent
N_LAYERS = 4


def split_model(small: SmallModel, gpu_layers: int, **options: Any) -> Any:
    """The last `gpu_layers` layers and the head on a second CPU backend."""
    return small.model(**({"threads": 1} | options), device="cpu", gpu_layers=gpu_layers)


@pytest.fixture(scope="module", params=[("f32", 0, False), ("q8", 32, True), ("q4a", 32, False)], ids=lambda p: p[0])
def small(request: pytest.FixtureRequest) -> SmallModel:
    name, group, tied = request.param
    kind = Kind(name, group, "f16", "f16") if name == "q4a" else Kind(name, group)
    return small_model(Shape(n_layers=N_LAYERS, tied=tied, biases=not tied), kind)


@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
@pytest.mark.parametrize("gpu_layers", range(N_LAYERS + 1))
def test_every_cut_has_the_bits_of_one_backend(small: SmallModel, gpu_layers: int, kv_dtype: str) -> None:
    tokens = random_tokens(small, 150)
    whole, split = small.model(kv_dtype=kv_dtype), split_model(small, gpu_layers, kv_dtype=kv_dtype)
    expected = all_logits(whole, tokens)
    for chunks in ([150], [1, 63, 1, 17, 64, 4]):
        assert np.array_equal(all_logits(split, tokens, chunks), expected)
    assert split.page_bytes == whole.page_bytes and split.max_batch_tok == whole.max_batch_tok


SMALL = small_model(Shape(n_layers=3, max_seq_len=1024), Kind("q8", 32))
WHOLE = SMALL.model()
SPLIT = split_model(SMALL, 2)


@settings(max_examples=30)
@given(data=st.data())
def test_any_family_of_sequences(data: st.DataObject) -> None:
    """The same steps, forks, rewinds and deaths on both models: pages that are shared, copied, freed and used again."""
    pools: list[list[Any]] = [[model.sequence() for _ in range(3)] for model in (WHOLE, SPLIT)]
    before = SPLIT.pages_in_use
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(pools[0]) - 1))
        n_past = pools[0][at].n_past
        match data.draw(st.sampled_from(["step", "step", "step", "fork", "truncate", "close"])):
            case "step":
                lengths = data.draw(st.lists(st.integers(0, 90), min_size=len(pools[0]), max_size=len(pools[0])))
                wanted = data.draw(st.sampled_from(["none", "last", "all"]))
                found = []
                for model, pool in zip((WHOLE, SPLIT), pools, strict=True):
                    texts = [random_tokens(SMALL, n, s.n_past) for n, s in zip(lengths, pool, strict=True)]
                    items = [(s, t, None, wanted) for s, t in zip(pool, texts, strict=True) if len(t)]
                    if items and max(s.n_past + len(t) for s, t, *_ in items) <= SMALL.shape.max_seq_len:
                        found.append([result.logits for result in model.step(items)])
                if found and wanted != "none":
                    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
            case "fork":
                n = data.draw(st.integers(0, n_past))
                for pool in pools:
                    pool.append(pool[at].fork(n))
            case "truncate":
                n = data.draw(st.integers(0, n_past))
                for pool in pools:
                    pool[at].truncate(n)
            case "close" if len(pools[0]) > 1:
                for pool in pools:
                    pool.pop(at).close()
        assert SPLIT.pages_of(pools[1]) == WHOLE.pages_of(pools[0])
    for sequence in [s for pool in pools for s in pool]:
        sequence.close()
    assert SPLIT.pages_in_use == before


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"seed": 3, "top_p": 0.9, "logprobs": 2}])
def test_sampling_guesses_and_many_steps_in_a_call(params: dict[str, Any]) -> None:
    sampler, prompt = _C.Sampler(**params), random_tokens(SMALL, 20)
    found = []
    for model in (WHOLE, SPLIT):
        sequence = model.sequence()
        first = model.step([(sequence, prompt, sampler, "none")], 9)[0].samples
        truth = [sample.token for sample in first]
        sequence.truncate(len(prompt))
        guessed = model.step([(sequence, [*truth[:6], (truth[6] + 1) % 131, 7], sampler, "none", 7)])[0].samples
        found.append([(s.token, s.top_logprobs) for s in first + guessed] + [sequence.n_past])
        assert [s.token for s in guessed] == truth[1:7]  # the sixth guess was wrong
    assert found[0] == found[1]


def test_a_token_that_cannot_be_sampled_changes_nothing() -> None:
    sequence = SPLIT.sequence()
    SPLIT.step([(sequence, [1, 2, 3], None, "none")])
    with pytest.raises(ValueError, match="the vocabulary has 131"):
        SPLIT.step([(sequence, [4] * 70, _C.Sampler(logit_bias={999: 1.0}), "none")])
    assert sequence.tokens == [1, 2, 3]
    found = SPLIT.step([(sequence, [4], None, "last")])[0].logits
    assert np.array_equal(found[0], all_logits(WHOLE, [1, 2, 3, 4])[-1])


def test_ctrl_c_between_layers_of_either_part(uncollected: None) -> None:
    shape = Shape(dim=128, hidden_dim=384, n_heads=4, n_kv_heads=4, head_dim=32, n_layers=40, max_seq_len=1024)
    deep = small_model(shape)
    tokens = random_tokens(deep, 480)
    for gpu_layers in (39, 1):  # nearly all the time in the one part, then in the other
        model = split_model(deep, gpu_layers)
        sequence = model.sequence()
        model.step([(sequence, tokens[:5], None, "none")])
        about_to_step = threading.Event()

        def interrupt(ready: threading.Event = about_to_step) -> None:
            ready.wait()
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            about_to_step.set()
            for _ in range(30):
                model.step([(sequence, tokens[5:], None, "none")])
                sequence.truncate(5)
        thread.join()
        assert sequence.tokens == tokens[:5].tolist()
        found = model.step([(sequence, tokens[5:15], None, "all")])[0].logits
        assert np.array_equal(found, all_logits(deep.model(), tokens[:15])[5:])


def test_the_time_of_both_parts_is_told() -> None:
    tokens = random_tokens(SMALL, 200)
    assert not any(SPLIT.profile(True).values())
    expected = all_logits(SPLIT, tokens)
    found = SPLIT.profile(False)
    assert min(found.values()) > 0
    assert np.array_equal(expected, all_logits(WHOLE, tokens))
    assert not any(SPLIT.profile(False).values())


@pytest.mark.parametrize(
    ("device", "gpu_layers", "message"),
    [
        ("", 1, "gpu_layers without a device"),
        ("cpu", 4, "gpu_layers is 4, the model has 3 layers"),
        ("cpu", -2, r"gpu_layers is -2, expected -1 .all. or a number of layers"),
        ("abacus", -1, 'device is "abacus"'),
    ],
)
def test_devices_and_layers_that_make_no_sense(device: str, gpu_layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.model(device=device, gpu_layers=gpu_layers)


# -------------------------------------------------------------------------------- calls and failures

RECORDER = r"""
#include "split_backend.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
using namespace pyllama;

int calls_left = 0;  // this many calls work, the next throws; negative: all work
void call(const char* part, const char* verb, int number) {
  std::printf("%s %s %d\n", part, verb, number);
  if (calls_left-- == 0) throw std::runtime_error("a failure");
}

struct Recorder : Backend {
  Recorder(const char* part, int first_page, const Config& c, const ModelWeights& w) : part(part), next(first_page) {
    call(part, "layers", c.n_layers);
    call(part, "weights", static_cast<int>(w.layers.size()));
    call(part, "embedding", w.tok_embeddings.N);
    call(part, "norm", w.norm.N);
    call(part, "output", w.output.N);
  }
  ~Recorder() override { std::printf("%s gone 0\n", part); }
  const char* name() const override { return part; }
  int max_batch_tok() const override { return part[0] == 'f' ? 64 : 32; }
  size_t page_bytes() const override { return part[0] == 'f' ? 100 : 10; }
  int new_page() override { call(part, "new_page", next); return next++; }
  void free_page(int page) override { std::printf("%s free_page %d\n", part, page); }
  void copy_page(int from, int to) override { call(part, "copy_page", 1000 * from + to); }
  void begin(const Step& s) override {
    call(part, "begin", s.n_out);
    for (int i = 0; i < s.n_spans; ++i)
      for (int p = 0; p * kPageTok < s.spans[i].pos + s.spans[i].n_tok; ++p) call(part, "page", s.spans[i].pages[p]);
  }
  void embed() override { call(part, "embed", 0); }
  void attention_in(int layer) override { call(part, "attention_in", layer); }
  void attention(int layer) override { call(part, "attention", layer); }
  void attention_out(int layer) override { call(part, "attention_out", layer); }
  void mlp_in(int layer) override { call(part, "mlp_in", layer); }
  void mlp_out(int layer) override { call(part, "mlp_out", layer); }
  void head() override { call(part, "head", 0); }
  const float* logits() override { call(part, "logits", 0); return nullptr; }
  void end() override { std::printf("%s end 0\n", part); }
  void load_x(const float* x) override { call(part, "load_x", static_cast<int>(x[0] + x[7])); }
  void store_x(float* x) override { x[0] = 40; x[7] = 2; call(part, "store_x", 0); }
  const char* part;
  int next;
};

void run_step(Backend& b, const int* pages) {
  const int32_t tokens[2] = {1, 2}, pos[2] = {64, 0}, out_rows[1] = {1};
  const Span spans[2] = {{0, 1, 64, pages}, {1, 1, 0, pages + 2}};
  Step step;
  step.n_tok = 2, step.tokens = tokens, step.pos = pos, step.n_spans = 2, step.spans = spans, step.n_out = 1;
  step.out_rows = out_rows;
  std::printf("step\n");
  try {
    b.begin(step);
    b.embed();
    for (int layer = 0; layer < 3; ++layer) {
      b.attention_in(layer), b.attention(layer), b.attention_out(layer), b.mlp_in(layer), b.mlp_out(layer);
    }
    b.head();
    b.logits();
  } catch (const std::exception& error) {
    std::printf("failed %s\n", error.what());
  }
  b.end();
  std::printf("ended\n");
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  calls_left = std::strcmp(argv[1], "opening") == 0 ? std::atoi(argv[2]) : -1;
  Config config;
  config.dim = 4, config.n_layers = 3;
  ModelWeights weights;
  weights.layers.resize(3);
  weights.tok_embeddings.N = weights.output.N = 9, weights.norm.N = 4;
  const auto maker = [](const char* part, int first_page) {
    return [=](const Config& c, const ModelWeights& w) { return std::make_unique<Recorder>(part, first_page, c, w); };
  };
  try {
    const auto b = make_split_backend(config, weights, 2, maker("front", 10), maker("back", 500));
    std::printf("%s, %d, %zu\n", b->name(), b->max_batch_tok(), b->page_bytes());
    calls_left = std::strcmp(argv[1], "pages") == 0 ? std::atoi(argv[2]) : -1;
    int pages[3];
    for (int i = 0; i < 3;) try { pages[i] = b->new_page(); ++i; } catch (const std::exception&) { std::puts("none"); }
    b->free_page(pages[1]);
    pages[1] = b->new_page();
    b->copy_page(pages[1], pages[0]);
    std::printf("pages %d %d %d\n", pages[0], pages[1], pages[2]);
    for (int round = 0; round < 2; ++round) {
      calls_left = round == 0 && std::strcmp(argv[1], "step") == 0 ? std::atoi(argv[2]) : -1;
      run_step(*b, pages);
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}
"""

Record = Callable[[str, int], list[str]]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """record(phase, n) -> what the parts were asked, if in that phase the call after n others fails (-1: none does)."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("recorder")
    (folder / "main.cpp").write_text(RECORDER)
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-fsanitize=address,undefined", f"-I{ROOT / 'csrc'}"]
    sources = [folder / "main.cpp", ROOT / "csrc" / "split_backend.cpp"]
    subprocess.run([*command, *map(str, sources), "-o", str(folder / "main")], check=True)

    def run(phase: str, n: int) -> list[str]:
        done = subprocess.run([str(folder / "main"), phase, str(n)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def steps_of(lines: list[str]) -> list[list[str]]:
    """What was asked in each step."""
    steps, found = "\n".join(lines).split("\nstep\n")[1:], []
    for step in steps:
        inside, _, _ = step.partition("\nended")
        found.append(inside.splitlines())
    return found


LAYER = ["attention_in", "attention", "attention_out", "mlp_in", "mlp_out"]
WHOLE_STEP = [
    *["front begin 0", "front page 10", "front page 13", "front page 12", "front embed 0"],
    *[f"front {verb} {layer}" for layer in (0, 1) for verb in LAYER],
    *["front store_x 0", "front end 0", "back begin 1", "back page 500", "back page 503", "back page 502"],
    *["back load_x 42", *(f"back {verb} 0" for verb in LAYER), "back head 0", "back logits 0", "back end 0"],
]


def test_what_the_parts_are_asked(record: Record) -> None:
    lines = record("step", -1)
    parts = [("front", 2, 9, 0, 0), ("back", 1, 0, 4, 9)]
    for i, (part, n, embedding, norm, output) in enumerate(parts):
        made = [f"layers {n}", f"weights {n}", f"embedding {embedding}", f"norm {norm}", f"output {output}"]
        assert lines[5 * i : 5 * i + 5] == [f"{part} {line}" for line in made]
    assert "front + back, 32, 110" in lines
    assert "pages 0 1 2" in lines  # the one that was freed is given again
    assert [line for line in lines if "free_page" in line] == ["front free_page 11", "back free_page 501"]
    assert "front copy_page 13010" in lines and "back copy_page 503500" in lines
    assert steps_of(lines) == [WHOLE_STEP, WHOLE_STEP]


def test_a_failure_anywhere_in_a_step_ends_it_in_the_part_that_runs(record: Record) -> None:
    asked = [line for line in WHOLE_STEP if not line.endswith("end 0")]
    for n in range(len(asked)):
        first, second = steps_of(record("step", n))
        reached = WHOLE_STEP[: WHOLE_STEP.index(asked[n]) + 1]
        running = asked[n].split()[0]
        assert first == [*reached, "failed a failure", f"{running} end 0"]
        assert second == WHOLE_STEP, "the next step knows nothing of it"


def test_a_page_that_one_part_has_not_is_no_page(record: Record) -> None:
    for n in range(8):
        lines = record("pages", n)
        taken = {
            part: [line.split()[2] for line in lines if line.startswith(f"{part} new_page")]
            for part in ("front", "back")
        }
        given_back = [line for line in lines if line.startswith("front free_page")]
        failed = lines.count("none")
        if n < 6:
            assert failed == 1 and len(given_back) == 1 + n % 2
            assert len(taken["front"]) + len(taken["back"]) == 9 + n % 2
        assert "pages 0 1 2" in lines or n >= 6


def test_a_part_that_cannot_be_made_takes_the_other_with_it(record: Record) -> None:
    for n in range(10):
        lines = record("opening", n)
        assert lines[-1] == "a failure"
        assert ("front gone 0" in lines) == (n >= 5)
