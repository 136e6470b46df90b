"""Loading any checkpoint opens no socket, starts no process, runs nothing that lies in it, and writes into the cache.

Python's own audit events are the witness, from before the first import of ours to the end of a reply: of every source,
every kind of tokenizer and a chat template that tries. All checkpoints have Python code lying beside their weights, of
the names that other loaders run or that an import might find. Evil pickles: test_hostile_torch.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantize.cli import main as quantize
from tests import make_packed as pack
from tests import make_sources as make
from tests.helpers_tokenizer import train_bpe, train_sentencepiece
from tests.make_torch import meta_params, meta_shards, torch_file, write_meta_folder
from tests.test_gguf_split import write_split
from tests.test_hf_quantized import AWQ, GPTQ, MLX, folder_of
from tests.test_newcomer import adapter
from tests.test_tiktoken_vocab import BYTES, ranks_file

ROOT = Path(__file__).resolve().parent.parent
SHAPE = make.Shape()
WIDE = make.Shape(dim=256, hidden_dim=256, n_heads=4, n_kv_heads=4, head_dim=64)
WEIGHTS = make.random_weights(SHAPE)
KINDS = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q8_0", "F16", "Q4_0")
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if messages[0].content == 'evil' %}{{ cycler.__init__.__globals__.os.system('touch was-here') }}{% endif %}"
)
CODE_FILES = ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "__init__.py", "conftest.py")
CODE_FILES += ("sitecustomize.py", "numpy.py", "tokenizers.py", "sentencepiece.py", "json.py")

WATCHED = """
import os, sys
home, marks = sys.argv[1], []
FORBIDDEN = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pickle.find_class"}
ALLOWED = (os.path.join(home, "cache"), "/dev/shm", os.devnull)

def hook(event, arguments):
    if event.split(".")[0] in ("socket", "subprocess", "urllib", "http", "ftplib", "webbrowser") or event in FORBIDDEN:
        marks.append(f"{event} {arguments!r:.200}")
    elif event == "exec" and hasattr(arguments[0], "co_filename"):
        if os.path.abspath(arguments[0].co_filename).startswith(home):
            marks.append(f"exec {arguments[0].co_filename}")
    elif event == "open" and isinstance(arguments[0], str):
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not os.path.abspath(path).startswith(ALLOWED):
            marks.append(f"write {path}")

sys.addaudithook(hook)
from pyllama import LLM, PyllamaError, SamplingParams
few = SamplingParams(max_tokens=3, temperature=0)
for path in sys.argv[2:]:
    with LLM(path, threads=1) as llm:
        tokens = llm.generate("a a", few).usage.completion_tokens
        said = []
        for text in ("a", "evil"):
            try:
                said.append(llm.chat([{"role": "user", "content": text}], few).usage.completion_tokens > 0)
            except PyllamaError as error:
                said.append(str(error).partition(": ")[2][:40])
        print(os.path.relpath(path, home), tokens > 0, *said)
print(marks)
print([name for name, module in list(sys.modules.items())
       if (getattr(module, "__file__", None) or "").startswith(home)])
import socket  # the witness sees
socket.socket().close()
exec(compile("1", os.path.join(home, "a.py"), "exec"))
open(os.path.join(home, "written"), "w").close()
print([mark.split()[0] for mark in marks])
"""


def finish(folder: Path, tokenizer: str) -> Path:
    """Puts code beside the weights, a config that names it, a tokenizer, and a template that tries."""
    for name in CODE_FILES:
        (folder / name).write_text(f"open({str(folder.parent / 'was-here')!r}, 'w')\n")
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer)
        config = {"tokenizer_class": "EvilTokenizer", "chat_template": TEMPLATE}
        config["auto_map"] = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = folder / "config.json"
    if path.exists():
        named = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))
    return folder


def packed(folder: Path, packer: Any, config: dict[str, Any], **random: Any) -> Path:
    folder_of(folder, packer, config, SHAPE, **random)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each."""
    home = tmp_path_factory.mktemp("quiet")
    bpe = train_bpe("llama-bpe", 300).to_str()
    rows = make.Shape(vocab_size=len(BYTES) + 16)
    finish(make.write_hf_folder(home / "safetensors", SHAPE, WEIGHTS), make.small_tokenizer_json().decode())
    large = make.Shape(vocab_size=320)
    finish(make.write_hf_folder(home / "sharded", large, make.random_weights(large), shards=3), bpe)
    folder = finish(make.write_hf_folder(home / "bin", SHAPE, WEIGHTS), make.small_tokenizer_json().decode())
    (folder / "model.safetensors").unlink()
    named = {make.hf_name(name): values for name, values in WEIGHTS.items()}
    (folder / "pytorch_model.bin").write_bytes(torch_file(named).bytes())
    folder = finish(
        write_meta_folder(
            home / "meta-ranks-instruct", meta_params(rows), meta_shards(rows, make.random_weights(rows))
        ),
        "",
    )
    (folder / "tokenizer.model").write_bytes(ranks_file(BYTES))
    pieces = make.Shape(vocab_size=900)
    shards = meta_shards(pieces, make.random_weights(pieces), 2, 1)
    folder = finish(write_meta_folder(home / "meta-pieces", meta_params(pieces), shards), "")
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(900))
    for kind in KINDS:
        changes = {"tokenizer__chat_template": (make.STRING, TEMPLATE)}
        (home / kind).mkdir()
        make.write_gguf(home / kind / f"{kind}.gguf", WIDE, make.random_weights(WIDE), kind, **changes)
        finish(home / kind, "")
    write_split(home / "split")
    finish(home / "split", "")
    tokens = make.small_tokenizer_json().decode()
    gptq = {"quantization_config": GPTQ}
    finish(packed(home / "gptq", pack.gptq, gptq, zeros=(1, 15)), tokens)
    order = {"quantization_config": GPTQ | {"desc_act": True}}
    finish(packed(home / "gptq-act-order", pack.gptq, order, zeros=(1, 15), act_order=True), tokens)
    finish(packed(home / "awq", pack.awq, {"quantization_config": AWQ}), tokens)
    finish(packed(home / "mlx", pack.mlx, {"quantization": MLX}), tokens)
    lora = finish(adapter(home / "adapter"), "")
    assert quantize([str(home / "safetensors"), "-o", str(home / "merged"), "--lora", str(lora)]) == 0
    return home


def test_every_source_is_loaded_quietly(checkpoints: Path) -> None:
    paths = [path for path in sorted(checkpoints.iterdir()) if path.name != "adapter"]
    environment = os.environ | {"XDG_CACHE_HOME": str(checkpoints / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WATCHED, str(checkpoints), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    *said, marks, imported, seen = done.stdout.splitlines()
    chats = {"meta-pieces": "the model has no chat template;", "split": "the model has no chat template;"}
    chats["meta-ranks-instruct"] = "True True"  # its template is ours
    for path, line in zip(paths, said, strict=True):
        assert line.startswith(f"{path.name} True {chats.get(path.name, 'True chat_template: failed on')}"), line
    assert marks == "[]" and imported == "[]"
    assert seen == "['socket.__new__', 'exec', 'write']"
    assert not list(checkpoints.glob("**/was-here")) and not (ROOT / "was-here").exists()
