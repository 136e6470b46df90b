"""What people run into first: files named in another way than meant, pointers in place of files, things left out.

Each is opened as it was meant, or refused in one line that says what to do. Damaged files: test_hostile_files.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pyllama import LLM, ModelFormatError
from pyllama.cli.main import build_parser
from pyllama.cli.main import main as pyllama
from pyllama.open import cache_folder
from pyllama.speeds import predict
from pyllama.synthetic import synthetic_config, synthetic_specs
from quantize.cli import main as quantize
from quantize.readers import open_source
from tests import make_sources as make
from tests.make_torch import meta_params, meta_shards, write_meta_folder

SHAPE = make.Shape()
WEIGHTS = make.random_weights(SHAPE)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * b"0" + b"\nsize 4096\n"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def hf_folder(tmp_path: Path, shards: int = 1) -> Path:
    folder = make.write_hf_folder(tmp_path / "hf", SHAPE, WEIGHTS, shards=shards)
    (folder / "tokenizer.json").write_bytes(make.small_tokenizer_json())
    return folder


def adapter(folder: Path) -> Path:
    """A LoRA adapter of each layer's q_proj."""
    sides = {"A": (2, SHAPE.dim), "B": (SHAPE.n_heads * SHAPE.head_dim, 2)}
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight": (
            "F32",
            shape,
            bytes(4 * shape[0] * shape[1]),
        )
        for i in range(SHAPE.n_layers)
        for side, shape in sides.items()
    }
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(make.safetensors_of(tensors, format="pt"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------------------------------------------- what is named


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "other.gguf", "other.bin"])
def test_a_pointer_in_place_of_a_file(tmp_path: Path, name: str, capsys: Captured) -> None:
    """What a clone without git-lfs leaves of large files."""
    folder = hf_folder(tmp_path)
    (folder / name).write_bytes(POINTER)
    named = folder / name if name.startswith("other") else folder
    assert pyllama(["info", str(named)]) == 1
    said = f"{folder / name}: is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
    assert capsys.readouterr().err == f"pyllama: {said}\n"


@pytest.mark.parametrize("shard", [1, 3])
def test_one_of_several_files_means_the_model(tmp_path: Path, shard: int) -> None:
    folder = hf_folder(tmp_path, shards=3)
    named = open_source(folder / f"model-0000{shard}-of-00003.safetensors")
    assert named.identity == open_source(folder).identity and named.config == SHAPE.config()
    (folder / "model.safetensors.index.json").unlink()  # without it there is no telling what belongs together
    with pytest.raises(ModelFormatError, match="is missing"):
        open_source(folder / f"model-0000{shard}-of-00003.safetensors")


def test_a_description_is_named(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, shards=2)
    for name in ("config.json", "model.safetensors.index.json"):
        with pytest.raises(ModelFormatError, match=re.escape(f"name the folder that holds it, {folder}")):
            open_source(folder / name)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    said = re.escape(f"{folder}: holds a LoRA adapter, not a model; `quantize BASE -o OUT --lora {folder}`")
    for named in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(ModelFormatError, match=said):
            open_source(named)
    (folder / "config.json").write_text(json.dumps(make.hf_config(SHAPE)))  # some put their base's beside it
    with pytest.raises(ModelFormatError, match=said):
        open_source(folder)


def test_a_merged_adapter_is_told(tmp_path: Path, capsys: Captured) -> None:
    lora = ["--lora", str(adapter(tmp_path / "mine")), "--lora-scale", "0.5"]
    assert quantize([str(hf_folder(tmp_path)), "-o", str(tmp_path / "out"), *lora]) == 0
    assert pyllama(["info", str(tmp_path / "out")]) == 0
    assert "hf (safetensors), with the adapter mine times 0.5\n" in capsys.readouterr().out


def test_names_that_are_none(capsys: Captured) -> None:
    assert quantize(["", "--dry-run"]) == 1
    assert "the checkpoint's path is empty" in capsys.readouterr().err
    assert quantize(["no-such-owner/model", "--dry-run"]) == 1
    assert "`pyllama download no-such-owner/model` fetches it" in capsys.readouterr().err


def test_what_the_hub_keeps_is_called_as_there(tmp_path: Path, capsys: Captured) -> None:
    """Its folders have a commit's number for a name."""
    folder = tmp_path / "models--owner--small-model" / "snapshots" / "0123abcd"
    make.write_hf_folder(folder, SHAPE, WEIGHTS)
    assert open_source(folder).identity["name"] == "small-model"
    (folder / "tokenizer.json").write_bytes(make.small_tokenizer_json())
    LLM(folder).close()
    assert all(path.name.startswith("small-model-") for path in cache_folder().iterdir())
    with pytest.raises(SystemExit):
        quantize([str(folder), "-o", ""])
    assert "for example: -o small-model-pyllama" in capsys.readouterr().err


@pytest.mark.parametrize(("old", "new"), [("", "model."), ("model.", "")])
def test_a_model_saved_from_another_class(tmp_path: Path, old: str, new: str) -> None:
    folder = hf_folder(tmp_path)
    named = {new + make.hf_name(name).removeprefix(old): values for name, values in WEIGHTS.items()}
    tensors = {name: ("F32", values.shape, make.encode_dense(values, "F32")) for name, values in named.items()}
    (folder / "model.safetensors").write_bytes(make.safetensors_of(tensors, format="pt"))
    found = f"{new}model.embed_tokens.weight".removeprefix(old)
    with pytest.raises(
        ModelFormatError, match=rf"embeddings\) is missing; it is there as '{found}'; was another class"
    ):
        open_source(folder)


def test_verifying_what_is_not_there(tmp_path: Path, capsys: Captured) -> None:
    assert quantize(["verify", str(tmp_path / "nowhere")]) == 1
    assert f"{tmp_path / 'nowhere'}: no such folder; expected a model folder that" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what is left out


def test_without_a_tokenizer(tmp_path: Path, capsys: Captured) -> None:
    """`quantize` says so and goes on, for one can be put there later; opening says so before it converts."""
    folder, out = hf_folder(tmp_path), tmp_path / "out"
    vocabulary = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").unlink()
    said = "neither tokenizer.json nor tokenizer.model is there; a model needs one, put its own beside the weights"
    with pytest.raises(ModelFormatError, match=f"{folder}: {said}"):
        LLM(folder)
    assert [path.suffix for path in cache_folder().iterdir()] == [".lock"], "nothing was converted"
    assert quantize([str(folder), "-o", str(out)]) == 0
    assert capsys.readouterr().err == f"quantize: note: {said}, or into OUT afterwards\n"
    (out / "tokenizer.json").write_bytes(vocabulary)
    with LLM(out) as llm:
        assert llm.tokenizer.encode("a") == [3]


def test_a_tokenizer_of_hugging_face_in_metas_folder(tmp_path: Path) -> None:
    folder = write_meta_folder(tmp_path / "meta", meta_params(SHAPE), meta_shards(SHAPE, WEIGHTS))
    before = open_source(folder).identity
    (folder / "tokenizer.json").write_bytes(make.small_tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    with LLM(folder) as llm:
        assert (llm.tokenizer.bos_id, llm.tokenizer.eos_ids, llm.tokenizer.encode("aa")[-2:]) == (1, (2,), [3, 3])
    after = open_source(folder).identity
    (folder / "tokenizer_config.json").unlink()  # another tokenizer is another model
    assert len({json.dumps(found) for found in (before, after, open_source(folder).identity)}) == 3


# --------------------------------------------------------------------------------------------------- the commands


def test_a_command_without_arguments_says_what_there_is(capsys: Captured) -> None:
    assert pyllama([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "fetch a model from the Hugging Face hub" in said.err and "exit codes" in said.err


def test_every_report_has_the_same_option_for_json(tmp_path: Path, capsys: Captured) -> None:
    assert pyllama(["plan", str(hf_folder(tmp_path)), "--no-speed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_layers"] == SHAPE.n_layers
    assert build_parser().parse_args(["bench", "--json"]).output == "json"


def test_a_plan_of_matrices_in_input_order() -> None:
    """As those of GPTQ with act-order are."""
    config = synthetic_config("tiny", 64)
    specs = [
        spec if spec.is_vector else type(spec)(spec.name, "q4a", spec.shape, group=32, offset="f16", input_order=True)
        for spec in synthetic_specs(config, "q4a")
    ]
    assert predict(config, specs, n_prompt=8, threads=1).prompt_tok_per_s > 0
