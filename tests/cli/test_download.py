"""`pyllama download` with a hub made here: which files are fetched, where to, what is said; no socket is opened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllama.cli.main import main
from pyllama.common.errors import PyllamaError
from pyllama.hub import choose_files
from quantize.readers import open_source
from tests import make_sources as make

from .conftest import Captured

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOISE = {"README.md", "LICENSE", "modeling_llama.py", "training_args.bin", "onnx/model.onnx", ".gitattributes"}


class RefusedError(Exception):
    pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A repository of a small model, with much beside it; `asked`: what was downloaded from it."""
    repository = make.write_hf_folder(
        tmp_path / "repository", make.Shape(), make.random_weights(make.Shape()), shards=2
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "pytorch_model.bin", *NOISE):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")
    made = SimpleNamespace(folder=repository, asked=[], fail=None)

    class HfApi:
        def model_info(self, repo: str, *, revision: str | None, files_metadata: bool) -> Any:
            assert repo == "owner/small" and files_metadata
            if made.fail == "info":
                raise RefusedError("401: the repository is gated.\n\nLog in first.")
            files = [path for path in repository.rglob("*") if path.is_file()]
            names = [SimpleNamespace(rfilename=str(f.relative_to(repository)), size=f.stat().st_size) for f in files]
            return SimpleNamespace(siblings=names, sha=COMMIT if revision is None else revision)

    def hf_hub_download(repo: str, name: str, *, revision: str, local_dir: str | None = None) -> str:
        if made.fail == name:
            raise OSError("connection lost")
        made.asked.append((name, revision))
        target = Path(local_dir) if local_dir else tmp_path / "cache" / "snapshots" / revision
        target.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(repository / name, target / name))

    module = ModuleType("huggingface_hub")
    module.HfApi, module.hf_hub_download = HfApi, hf_hub_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return made


def test_what_is_fetched_is_a_model(hub: SimpleNamespace, tmp_path: Path, capsys: Captured) -> None:
    assert main(["download", "owner/small", "-o", str(tmp_path / "here")]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'here'}\n"
    assert said.err.startswith(f"owner/small at {COMMIT[:12]}: 6 files, 0.") and str(tmp_path / "here") in said.err
    fetched = {path.name for path in (tmp_path / "here").iterdir()}
    assert fetched == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert {revision for _, revision in hub.asked} == {COMMIT}  # one commit, whatever happens to the branch meanwhile
    assert open_source(tmp_path / "here").config == make.Shape().config()


def test_into_the_hubs_cache(hub: SimpleNamespace, tmp_path: Path, capsys: Captured) -> None:
    assert main(["download", "owner/small", "--revision", "v2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"] == record["folder"] == str(tmp_path / "cache" / "snapshots" / "v2")
    assert record["revision"] == "v2" and len(record["files"]) == 6
    assert record["n_bytes"] == sum((hub.folder / name).stat().st_size for name in record["files"])


def test_a_gguf_is_named_itself(hub: SimpleNamespace, tmp_path: Path, capsys: Captured) -> None:
    for path in hub.folder.glob("*.safetensors*"):
        path.unlink()
    (hub.folder / "small-Q8_0.gguf").write_bytes(b"GGUF")
    assert main(["download", "owner/small", "-o", str(tmp_path / "here")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'here' / 'small-Q8_0.gguf'}\n"
    assert [name for name, _ in hub.asked] == ["small-Q8_0.gguf"]
    (hub.folder / "small-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert main(["download", "owner/small"]) == 1
    expected = "choose by --include PATTERN: small-Q4_K_M.gguf, small-Q8_0.gguf"
    assert capsys.readouterr().err == f"pyllama: owner/small: holds 2 models; {expected}\n"
    assert main(["download", "owner/small", "--include", "*Q4_K*"]) == 0
    assert capsys.readouterr().out.endswith("small-Q4_K_M.gguf\n")


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        ("info", "owner/small: RefusedError: 401: the repository is gated."),
        ("config.json", "owner/small: config.json: OSError: connection lost"),
    ],
)
def test_a_hub_that_refuses(hub: SimpleNamespace, capsys: Captured, fail: str, said: str) -> None:
    hub.fail = fail
    assert main(["download", "owner/small"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"pyllama: {said}"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["download", "owner/small"]) == 1
    assert "needs the package huggingface_hub: pip install huggingface_hub" in capsys.readouterr().err
    for name in ("small", "a/b/c", "../up", "https://host/owner/small"):
        assert main(["download", name]) == 1
        assert "expected the hub's name of a model, as owner/name" in capsys.readouterr().err


def test_the_library_is_not_imported_by_surprise() -> None:
    """Neither by a name that looks like the hub's, nor by any other command's module."""
    code = (
        "import sys, pyllama.cli.main, pyllama.open, pyllama.llm, quantize, quantize.readers\n"
        "try: pyllama.open.locate('owner/small')\n"
        "except FileNotFoundError as error: print(error)\n"
        "print('huggingface_hub' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "`pyllama download owner/small` fetches it" in said[0] and said[-1] == "False"


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["consolidated.safetensors", "params.json"], ["consolidated.safetensors"]),
        (["model.safetensors", "a.gguf", "b.gguf"], ["model.safetensors"]),
        (["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
        (
            ["consolidated.00.pth", "consolidated.01.pth", "params.json", "checklist.chk"],
            ["params.json", "consolidated.00.pth", "consolidated.01.pth"],
        ),
        (["pytorch_model.bin", "optimizer.bin", "tokenizer.model"], ["tokenizer.model", "pytorch_model.bin"]),
        (["adapter_model.safetensors", "adapter_config.json"], ["adapter_config.json", "adapter_model.safetensors"]),
        (["original/consolidated.00.pth", "model.safetensors"], ["model.safetensors"]),
    ],
)
def test_which_files(names: list[str], chosen: list[str]) -> None:
    assert choose_files("o/n", [*names, *NOISE]) == chosen


@given(
    st.lists(st.text(max_size=12) | st.sampled_from(["model.safetensors", "x.gguf", "../x.gguf", "a/x.gguf", "x.py"]))
)
def test_no_list_of_files_leads_out_of_the_folder(names: list[str]) -> None:
    try:
        chosen = choose_files("o/n", names)
    except PyllamaError as error:
        assert str(error).startswith("o/n: ")
        return
    assert chosen and set(chosen) <= set(names)
    assert not any(set("/\\\0") & set(name) or name.startswith(".") or name.endswith(".py") for name in chosen)
