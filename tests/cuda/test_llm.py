"""CUDA as a user meets it: `LLM(device=…, gpu_layers=…)` and the commands, on a whole tiny model; plans against what
the library takes.

On the emulated device unless PYLLAMA_CUDA_TESTS says otherwise. The numbers of models are test_models.py's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllama import _C, LLM, DeviceError, PyllamaError, SamplingParams
from pyllama.cli.main import main
from pyllama.open import spec_of
from pyllama.placement import Placement
from pyllama.plan import Planner, Share
from pyllama.speculative import ON_DEVICE, Budget, row_costs
from tests import make_sources as make
from tests.helpers_llm import tiny_llm, tiny_model
from tests.helpers_models import QUANTIZED, Kind, Shape, all_logits, small_model

from .conftest import ON_DEVICE as REAL
from .conftest import Emulated, emulation_only

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=5, ignore_eos=True)
PLACES: list[dict[str, Any]] = [
    {"gpu_layers": "all"},
    {"gpu_layers": "all", "kv_dtype": "q8"},
    {"gpu_layers": 1, "kv_dtype": "q8"},
    {"gpu_layers": 0},
]


@pytest.fixture(autouse=True)
def _library(cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLLAMA_CUDA_LIBRARY", str(cuda_library))


def on_cuda(**options: Any) -> LLM:
    return tiny_llm(**({"device": "cuda"} | options))


# -------------------------------------------------------------------------------- where it runs


def test_what_an_llm_says_of_itself() -> None:
    for wish, n, device in (
        ("auto", 2, "cuda:0"),
        ("all", 2, "cuda:0"),
        (2, 2, "cuda:0"),
        (1, 1, "cuda:0"),
        (0, 0, "cpu"),
    ):
        with on_cuda(gpu_layers=wish) as llm:
            assert (llm.device, llm.gpu_layers) == (device, n)
            assert llm.threads == 1 and llm.isa in _C.isas()
            assert ("cuda:0" in repr(llm)) == (n > 0) and ("1 thread" in llm.runs_on) == (n < 2)
            plan = llm.plan()
            assert (plan.gpu_layers, plan.device, plan.n_ctx) == (n, device, 256)
            assert (plan.on_device is None) == (n == 0) and plan.on_cpu.n_layers == 2 - n
    with tiny_llm(device="cpu") as llm:
        assert llm.plan().device == "cpu" and "cuda" not in repr(llm)
    with pytest.raises(ValueError, match="gpu_layers=3: the model has 2 layers"):
        on_cuda(gpu_layers=3)
    with pytest.raises(DeviceError, match=r'device="cuda:9": there is no device 9'):
        on_cuda(device="cuda:9")


@emulation_only("auto takes a real device")
def test_auto_never_takes_the_emulation() -> None:
    with tiny_llm(device="auto") as llm:
        assert llm.device == "cpu" and llm.gpu_layers == 0
        assert llm.plan().notes == ["no CUDA: PYLLAMA_CUDA_LIBRARY names the emulation, which is for tests"]
    for wish in ("all", 1):  # never ignored
        with pytest.raises(DeviceError, match=r"gpu_layers=.*: no CUDA: .* goes with device=\"cuda\""):
            tiny_llm(device="auto", gpu_layers=wish)


@emulation_only("memory on demand")
def test_as_many_layers_as_fit(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = tiny_model()
    planner = Planner(opened.config, opened.specs, 256, "f16")
    try:
        for n in (1, 2):
            emulated.call("leave_memory", planner.on_device(n, spare=0).total + 5000)
            with on_cuda(n_ctx=256) as llm:
                assert llm.gpu_layers == llm.plan().most_gpu_layers == n
                assert len(llm.generate("abc", GREEDY).token_ids) == 5
        emulated.call("leave_memory", planner.on_device(1, spare=0).total)
        with pytest.raises(DeviceError, match=r"gpu_layers='all': 2 of 2 layers want .*; 1 layer would fit"):
            on_cuda(gpu_layers="all")
        emulated.call("leave_memory", 200_000)
        with pytest.raises(DeviceError, match=r"gpu_layers='auto': a single layer wants .* nothing would fit"):
            on_cuda()
        with on_cuda(gpu_layers=0) as llm:
            assert llm.device == "cpu"
        # "auto" may take the CPU then, and knows why
        monkeypatch.setattr("pyllama.cuda.CudaDevice.__post_init__", lambda self: None, raising=False)
        monkeypatch.setattr("pyllama.placement.choose_device", real_looking)
        with tiny_llm(device="auto") as llm:
            assert llm.device == "cpu" and "not one layer would fit cuda:0" in llm.plan().notes[0]
    finally:
        emulated.call("leave_memory", -1)


def real_looking(device: str, config: Any, n_ctx: int) -> Any:
    """choose_device as if the emulated device were a real one."""
    from pyllama.cuda import find_device

    return find_device(0), None


@emulation_only("memory on demand")
def test_the_prefix_cache_leaves_room_on_the_device(emulated: Emulated) -> None:
    with on_cuda() as llm:
        most = llm._scheduler._cache._most_pages  # type: ignore[union-attr]
        assert most == 4, "a context"
    opened = tiny_model()
    page = 2 * 2 * 64 * 32 * 2  # of two layers: keys and values of 64 tokens, head_dim 16 padded to 32, 2 bytes
    needed = Planner(opened.config, opened.specs, 256, "f16").on_device(2, 64, spare=0)
    try:
        emulated.call("leave_memory", needed.total - needed.cache - needed.upload + 11 * page)
        with on_cuda(gpu_layers="all", n_ctx=256) as llm:
            most = llm._scheduler._cache._most_pages  # type: ignore[union-attr]
            assert most <= 3, "at most a quarter of what is free"
    finally:
        emulated.call("leave_memory", -1)


def test_plans_are_what_the_library_takes() -> None:
    kinds = {"wv": Kind("q8", 32), "w_up": Kind("f16"), "w_down": QUANTIZED[-1]}
    cases: list[tuple[Shape, Kind, dict[str, Kind]]] = [
        *((Shape(vocab_size=67), kind, {}) for kind in QUANTIZED),
        (Shape(tied=True, biases=True), Kind("f32"), {}),
        (Shape(dim=33, hidden_dim=31, n_heads=9, n_kv_heads=3, head_dim=2, tied=True), Kind("bf16"), {}),
        (Shape(biases=True, head_norms=True), Kind("q4", 128), kinds),
    ]
    for shape, kind, others in cases:
        small = small_model(shape, kind, kinds=others)
        specs = [spec_of(weight) for weight in small.weights.values()]
        for kv_dtype in ("f16", "q8"):
            found = _C.cuda.model_sizes(small.config, small.weights, kv_dtype=kv_dtype)
            planner = Planner(small.config, specs, 64, kv_dtype)
            share = planner.on_device(2)
            assert sum(planner.layer_bytes) == share.layers == found["layers"]
            assert max(planner.layer_bytes) == found["largest_layer"]
            assert share.head == found["head"] and share.layers + share.head + share.embedding == found["weights"]
            assert share.buffers == found["buffers"] and share.cache == found["page"]
            assert share.upload == max(0, found["staging"] - found["page"])


# -------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_generate_stream_batch_and_sessions_agree(place: dict[str, Any]) -> None:
    prompts = ["ab", "hi", "z"]  # together and alone in steps of at most eight rows, which have the same bits
    with on_cuda(cache_tok=0, **place) as llm:
        for params in (GREEDY, SEEDED):
            alone = [llm.generate(prompt, params) for prompt in prompts]
            assert [len(out.token_ids) for out in alone] == [5] * 3
            together = llm.generate(prompts, params)
            assert [out.token_ids for out in together] == [out.token_ids for out in alone]
            assert "".join(piece.text for piece in llm.stream("ab", params)) == alone[0].text
            session = llm.session()
            assert "".join(piece.text for piece in session.stream("ab", params)) == alone[0].text
            session.close()
        with pytest.raises(PyllamaError, match="no chat template"):
            llm.chat([{"role": "user", "content": "Hi"}])


def test_the_distributions_are_the_cpus() -> None:
    """KL within the bound that docs/GPU.md gives, over the prompts' and the decoded tokens' rows."""
    text = [2 + i * 37 % 256 for i in range(40)]
    with tiny_llm(kind=Kind("f16")) as llm:
        expected = llm.logits(text).astype(np.float64)
    for gpu_layers in (1, 2):
        with on_cuda(kind=Kind("f16"), gpu_layers=gpu_layers) as llm:
            found = llm.logits(text).astype(np.float64)
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (expected, found))
        assert (np.exp(p) * (p - q)).sum(-1).mean() <= 0.003


@pytest.mark.parametrize("gpu_layers", [1, 2])
def test_lookup_changes_no_token(gpu_layers: int) -> None:
    text = [60, 61, 62, 63, 64, 65, 66, 67] * 3
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logit_bias=dict.fromkeys(text[:8], 30.0))
    with on_cuda(gpu_layers=gpu_layers, cache_tok=0) as llm:
        plain = llm.generate(text, params)
    with on_cuda(gpu_layers=gpu_layers, cache_tok=0, speculative="lookup") as llm:
        guessed = llm.generate(text, params)
    assert guessed.token_ids == plain.token_ids and guessed.timings.draft_n > 0


@pytest.mark.parametrize("gpu_layers", [1, 2])
def test_a_draft_model_is_on_the_same_device(gpu_layers: int) -> None:
    draft = tiny_model()
    params = SamplingParams(seed=3, max_tokens=8, ignore_eos=True)
    with on_cuda(gpu_layers=gpu_layers, cache_tok=0) as llm:
        plain = llm.generate("hello", params)
    with on_cuda(gpu_layers=gpu_layers, cache_tok=0, draft=draft) as llm:
        assert llm._scheduler._drafter._model.backend.startswith("cuda")  # type: ignore[union-attr]
        guessed = llm.generate("hello", params)
    assert guessed.token_ids == plain.token_ids


@emulation_only("memory on demand")
def test_a_draft_model_that_does_not_fit_stays_on_the_cpu(emulated: Emulated) -> None:
    opened = tiny_model()
    planner = Planner(opened.config, opened.specs, 256, "f16")
    try:
        emulated.call("leave_memory", planner.on_device(2, spare=0).total * 3 // 2)
        with on_cuda(draft=tiny_model()) as llm:
            assert llm.gpu_layers == 2
            assert llm._scheduler._drafter._model.backend in _C.isas()  # type: ignore[union-attr]
            assert len(llm.generate("hello", GREEDY).token_ids) == 5
    finally:
        emulated.call("leave_memory", -1)


@emulation_only("memory on demand")
def test_all_contexts_of_a_draft_model_count(emulated: Emulated) -> None:
    """Four requests that are drafted for have four contexts of its keys and values."""
    opened = tiny_model()
    share = Planner(opened.config, opened.specs, 256, "f16").on_device(2, spare=0)
    placement = Placement(opened, 256, "f16", "cuda")
    contexts = max(share.upload + share.cache, 4 * share.cache)  # what loads goes where the cache will be
    needed = share.total - share.upload - share.cache + contexts
    try:
        for missing, device in ((0, "cuda:0"), (1, "")):
            emulated.call("leave_memory", share.cache + needed - missing)
            assert placement.device_for_draft(tiny_model()) == device
    finally:
        emulated.call("leave_memory", -1)


@emulation_only("memory to the byte")
@pytest.mark.parametrize(
    "argv", [["-p", "0", "-n", "2", "--parallel", "8"], ["-n", "0", "-p", "20", "-b", "700"]], ids=" ".join
)
def test_bench_plans_what_it_takes(argv: list[str], cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of all sequences (8: as slabs have them), and buffers for the rows of the largest step."""
    planned: list[Share] = []
    free: list[int] = []

    def look() -> None:
        free.append(int(_C.cuda.devices(str(cuda_library))[0]["free_bytes"]))

    class Watched(_C.Model):
        def step(self, batch: Any) -> Any:
            done = super().step(batch)
            look()
            return done

    def placed(*arguments: Any, **options: Any) -> Placement:
        placement = Placement(*arguments, **options)
        assert placement.plan.on_device is not None
        planned.append(placement.plan.on_device)
        look()
        return placement

    monkeypatch.setattr(_C, "Model", Watched)
    monkeypatch.setattr("pyllama.placement.Placement", placed)
    assert main(["bench", "--synthetic", "tiny", "--device", "cuda", "-t", "1", "-r", "1", *argv]) == 0
    (share,) = planned
    counted = share.total - share.upload - share.spare
    more = free[0] - min(free) - counted
    assert 0 <= more < 100_000, "a step's numbers and attention's room"


def test_guesses_never_make_a_step_longer_than_eight_rows() -> None:
    """Longer ones take other kernels, whose bits are not those of decoding."""
    sure = [1.0] * 16
    for costs in (ON_DEVICE, row_costs(10**9, 0.5), row_costs(10**7, 0.1)):
        assert Budget(1, 0, 100, costs).take(sure, 100) == 7
        assert Budget(5, 0, 100, costs).take(sure, 100) == 3
        assert Budget(1, 4, 100, costs).take(sure, 100) == 3
        assert [Budget(n, 0, 100, costs).take(chances, 100) for n in (8, 9) for chances in (sure, [0.0])] == [0] * 4
    assert row_costs(10**9, 1) == ON_DEVICE and row_costs(10**9) == row_costs(10**9, 0)


@emulation_only("memory on demand")
def test_a_full_device_gives_up_what_it_keeps_of_earlier_prompts(emulated: Emulated) -> None:
    prompts = [[2 + (i * step) % 250 for i in range(65)] for step in (3, 5, 7)]
    with on_cuda(n_ctx=256) as llm:
        expected = [llm.generate(prompt, GREEDY).token_ids for prompt in prompts]
    with on_cuda(n_ctx=256) as llm:
        try:
            found = [llm.generate(prompts[0], GREEDY).token_ids]
            emulated.call("leave_memory", 100)
            found += [llm.generate(prompt, GREEDY).token_ids for prompt in prompts[1:]]
        finally:
            emulated.call("leave_memory", -1)
    assert found == expected


def test_closing_gives_everything_back() -> None:
    before = _C.cuda.devices(_C.cuda.library_path())[0]["free_bytes"]
    llm = on_cuda(gpu_layers=1)
    stream = llm.stream("abc", GREEDY)
    next(stream)
    assert REAL or _C.cuda.devices(_C.cuda.library_path())[0]["free_bytes"] < before
    llm.close()
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        llm.generate("abc", GREEDY)
    with pytest.raises((ValueError, PyllamaError)):
        list(stream)
    del stream, llm
    assert REAL or _C.cuda.devices(_C.cuda.library_path())[0]["free_bytes"] == before


def test_the_time_of_a_split_model_is_told() -> None:
    small = small_model(Shape(vocab_size=67), Kind("q8", 32))
    model = small.model(device="cuda", gpu_layers=1, max_batch_tok=32)
    model.profile(True)
    all_logits(model, [1, 2, 3, 4])
    found = model.profile(False)
    assert min(found.values()) > 0 and model.backend.endswith("+ cuda emulated" if not REAL else "")


# -------------------------------------------------------------------------------- the commands


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make.write_gguf(tmp_path / "small.gguf", make.Shape(), make.random_weights(make.Shape()), "Q4_0")


def test_generate_and_plan_from_the_command_line(gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", str(gguf), "-p", "ab", "--max-tokens", "4", "--temperature", "0", "--json", "--threads", "1"]
    texts = []
    for place in (["--device", "cuda"], ["--device", "cuda:0", "--gpu-layers", "all"]):
        assert main([*common, *place]) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert main([*common, "--device", "cuda", "--gpu-layers", "1"]) == 0
    assert texts[0] == texts[1] and len(json.loads(capsys.readouterr().out)["token_ids"]) == 4
    assert main(["plan", str(gguf), "--device", "cuda", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["gpu_layers"], found["fits"]) == ("cuda:0", 2, True)
    assert main([*common, "--device", "cpu", "--gpu-layers", "1"]) == 1
    assert "gpu_layers=1" in capsys.readouterr().err


@pytest.mark.parametrize(("layers", "backend"), [("all", "CUDA"), ("1", "CPU+CUDA")])
def test_bench(gguf: Path, layers: str, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["bench", str(gguf), "-p", "2", "-n", "1", "-r", "1", "-t", "1"]
    assert main([*small, "--device", "cuda", "--gpu-layers", layers, "-o", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    for record in records:
        assert (record["backend"], record["device"]) == (backend, "cuda:0")
        assert record["n_gpu_layers"] == (2 if layers == "all" else 1)
        assert ("bandwidth_share" in record) == (backend == "CUDA") and "peak_share" not in record
    if backend == "CUDA":
        assert main([*small, "--device", "cuda"]) == 0
        assert "| cuda:0 | pp2 |" in capsys.readouterr().out
