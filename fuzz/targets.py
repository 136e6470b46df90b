"""What is fuzzed: for each kind of foreign file a small sound folder, the file that is damaged, how, and who opens it.

`build` writes them all. An opener raises what its target allows, or returns; what it accepts may have a deeper test,
which also converts, reads back or runs it. Weights are few and texts short, so that a run takes a millisecond or less.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyllama import LLM
from pyllama.chat_template import ChatTemplate, encode_chat
from pyllama.common.errors import ModelFormatError, PyllamaError, QuantizeError
from pyllama.common.model_folder import metadata_sha256
from pyllama.common.named_templates import NAMED_TEMPLATES
from pyllama.open import describe_model, load_folder
from pyllama.tokenizer import Tokenizer
from quantize import convert, make_plan, verify, write_plan
from quantize.families import FAMILIES
from quantize.golden import golden_files
from quantize.lora import merge_adapters
from quantize.readers import open_source
from quantize.readers.gguf_split import part_names
from quantize.readers.pickles import Name, read_pickle
from tests import helpers_tokenizer as words
from tests import make_packed as pack
from tests import make_sources as make
from tests import make_torch as torch
from tests import test_gguf_families as families
from tests.helpers_hostile import SMALL, WEIGHTS

from . import archives, mutate

Opener = Callable[[Path], None]

FEW = make.Shape(dim=8, hidden_dim=8, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=2, vocab_size=10)
FEW_WEIGHTS = make.random_weights(FEW)
PACKED = make.Shape(dim=32, hidden_dim=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, vocab_size=8)
SUPER = make.Shape(dim=256, hidden_dim=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, vocab_size=9)
TEXTS = ["", "Hello wörld 12\n a", "<s>[INST] <|im_start|>"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <s>"}]


@dataclass(frozen=True)
class Target:
    """`path` is opened after `file` was damaged. open: raises `allowed` or accepts; may write in `writes` alone.

    deeper: for what is accepted and takes a new branch; gets the name of a folder that it may write. sound: the
    file's content, put in by `build`; also: other sound ones.
    """

    path: Path
    file: Path
    damage: mutate.Damage
    open: Opener
    allowed: tuple[type[Exception], ...] = (ModelFormatError,)
    deeper: Callable[[Path, Path], None] | None = None
    also: tuple[bytes, ...] = ()
    sound: bytes = b""
    writes: Path | None = None


# ------------------------------------------------------------------------------------------------------------- openers


def open_checkpoint(path: Path) -> None:
    source = open_source(path)
    for tensor in source.tensors.values():
        tensor.read()
        if tensor.grid is not None:
            tensor.read_packed()
    files = source.tokenizer_files()
    with contextlib.suppress(QuantizeError):
        golden_files(files, make_plan(source).config(), "source")
        describe_model(path)


def convert_it(path: Path, out: Path) -> None:
    """What is accepted can be converted, and what was written is sound."""
    with contextlib.suppress(ModelFormatError, QuantizeError):
        written = write_plan(make_plan(open_source(path)), out, threads=1)
        sound(written)


def sound(folder: Path) -> None:
    try:
        verify(folder)
        if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            load_folder(folder, settle_s=0.0)
    except ModelFormatError as error:
        raise AssertionError("what was written is refused") from error


def open_own(path: Path) -> None:
    refused = []
    for check in (lambda: load_folder(path, settle_s=0.0), lambda: verify(path)):
        try:
            check()
        except ModelFormatError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def run_it(path: Path, out: Path) -> None:
    """What is accepted can be run."""
    with contextlib.suppress(PyllamaError, ValueError), LLM(path, device="cpu", n_ctx=16, threads=1) as llm:
        llm.generate("a", max_tokens=2, temperature=0.0)


def open_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.from_folder(path)
    for text in TEXTS:
        for parse in (False, True):
            tokenizer.decode(tokenizer.encode(text, parse_special=parse))
    tokenizer.decode(range(min(tokenizer.vocab_size, 1000)), skip_special=False)
    ChatTemplate.from_folder(path)


def open_template(path: Path) -> None:
    template = ChatTemplate.from_folder(path)
    assert template is not None
    template.render(MESSAGES)


def encode_it(path: Path, out: Path) -> None:
    template = ChatTemplate.from_folder(path)
    assert template is not None
    with contextlib.suppress(ModelFormatError, ValueError):
        encode_chat(Tokenizer.from_folder(path), template, MESSAGES)


def open_pickle(path: Path) -> None:
    plain = {f"torch {name}": Name(f"torch.{name}") for name in ("FloatStorage", "HalfStorage")}
    called = ("collections OrderedDict", "torch._utils _rebuild_tensor_v2")
    read_pickle(
        path.read_bytes(), "pickle", plain | {name: Name(name, lambda a: {}) for name in called}, lambda key: key
    )


def merge(base: Path) -> Opener:
    def open_adapter(path: Path) -> None:
        for tensor in merge_adapters(open_source(base), [(path, 1.0)]).tensors.values():
            tensor.read()

    return open_adapter


# ------------------------------------------------------------------------------------------------------------- folders

_SAFETENSORS = mutate.by(mutate.safetensors)
_JSON = mutate.by(mutate.json_text, 0.85)
_GGUF = mutate.by(archives.gguf)
_ZIP = mutate.by(archives.torch_zip)
_PROTO = mutate.by(mutate.protobuf)


def build(base: Path) -> dict[str, Target]:
    """Writes every target's folder below `base`; name -> target."""
    out: dict[str, Target] = {}
    for group in (_hugging_face, _packed, _gguf, _pytorch, _adapter, _tokenizers, _own, _journal):
        for name, target in group(base):
            out[name] = replace(target, sound=target.file.read_bytes())
    return out


def _source(path: Path, file: Path, damage: mutate.Damage, also: tuple[bytes, ...] = ()) -> Target:
    return Target(path, file, damage, open_checkpoint, deeper=convert_it, also=also)


def _hugging_face(base: Path) -> Iterator[tuple[str, Target]]:
    for name, file, damage in (("safetensors", "model.safetensors", _SAFETENSORS), ("config", "config.json", _JSON)):
        folder = make.write_hf_folder(base / name, FEW, FEW_WEIGHTS)
        yield name, _source(folder, folder / file, damage)
    folder = make.write_hf_folder(base / "index", FEW, FEW_WEIGHTS, shards=2)
    yield "index", _source(folder, folder / "model.safetensors.index.json", _JSON)
    for model_type in _FIELDS:
        folder = _family(base / model_type, model_type)
        yield model_type, _source(folder, folder / "config.json", _JSON)
    folder = _family(base / "fused", "phi3")
    yield "fused", _source(folder, folder / "model.safetensors", _SAFETENSORS)


_LONG = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 32}},
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 8.0,
        "attention_multiplier": 0.1,
    },
    "mistral": {
        "sliding_window": 16,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "phi3": {"rope_scaling": _LONG, "original_max_position_embeddings": 64},
    "qwen3": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
}


def _family(folder: Path, model_type: str) -> Path:
    """A folder of this family, by the readers' own table of its names."""
    family = next(family for family in FAMILIES if (family.container, family.model_type) == ("safetensors", model_type))
    weights: dict[str, Any] = dict(FEW_WEIGHTS)
    if "q_norm" in family.layer:
        weights |= {f"layers.0.{part}": np.ones(FEW.head_dim, np.float32) for part in ("q_norm", "k_norm")}
    parts: dict[str, list[Any]] = {}
    for name, values in weights.items():
        stored = family.layer[name[9:]].format(i=0) if name.startswith("layers.") else family.outer[name]
        parts.setdefault(stored, []).append(values)
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    tensors = {name: ("F32", values.shape, make.encode_dense(values, "F32")) for name, values in joined.items()}
    changes = {"architectures": [family.architecture], "model_type": model_type} | _FIELDS[model_type]
    make.write_hf_folder(folder, FEW, {}, **changes)
    (folder / "model.safetensors").write_bytes(make.safetensors_of(tensors))
    return folder


_BY_8 = {"bits": 8, "sym": True, "desc_act": False, "group_size": 32}


def _packed(base: Path) -> Iterator[tuple[str, Target]]:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    mlx = {"group_size": 32, "bits": 4}

    def by_8_bits(packer: Any) -> Any:
        return lambda module, matrix: packer(module, matrix, bits=8)

    def gemv(module: str, matrix: pack.Matrix) -> pack.Tensors:
        return pack.awq_gemv(module, matrix, 4)

    kinds: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
        ("gptq", pack.gptq, {"quantization_config": gptq}, {"zeros": (1, 15), "act_order": True}),
        ("gptq8", by_8_bits(pack.gptq), {"quantization_config": gptq | _BY_8}, {"zeros": (128, 128), "bits": 8}),
        ("awq", pack.awq, {"quantization_config": awq}, {"zeros": (0, 15)}),
        ("gemv", gemv, {"quantization_config": awq | {"version": "GEMV"}}, {"zeros": (0, 15)}),
        ("mlx", pack.mlx, {"quantization": mlx}, {}),
        ("mlx8", by_8_bits(pack.mlx), {"quantization": mlx | {"bits": 8}}, {"bits": 8}),
    ]
    for name, packer, config, random_ in kinds:
        plain, extra = {}, {}
        for i, (tensor, value) in enumerate(make.random_weights(PACKED).items()):
            if value.ndim == 1 or not tensor.startswith("layers."):
                plain[tensor] = value
            else:
                matrix = pack.random_matrix(value.shape, i, **random_)
                extra |= packer(make.hf_name(tensor).removesuffix(".weight"), matrix)
        folder = make.write_hf_folder(base / name, PACKED, plain, dtype="F16", extra=extra, **config)
        yield name, _source(folder, folder / "model.safetensors", _SAFETENSORS)
        again = base / f"{name}_config"
        shutil.copytree(folder, again)
        yield f"{name}_config", _source(again, again / "config.json", _JSON)


def _gguf(base: Path) -> Iterator[tuple[str, Target]]:
    kinds = {
        "tok_embeddings": "Q8_0",
        "layers.0.wq": "Q4_1",
        "layers.0.wk": "Q4_0",
        "layers.0.wo": "F16",
        "layers.0.wv": "Q5_0",
    }
    path = _one_file(base / "gguf")
    make.write_gguf(path, SMALL, WEIGHTS, lambda name: kinds.get(name, "BF16"))
    yield "gguf", _source(path, path, _GGUF, tuple(_architectures()))

    kinds = {
        "wq": "Q4_K",
        "wk": "Q5_K",
        "wv": "Q6_K",
        "w_gate": "Q2_K",
        "w_up": "IQ4_XS",
        "wo": "Q5_1",
        "w_down": "IQ4_NL",
    }
    path = _one_file(base / "kquants")
    make.write_gguf(path, SUPER, make.random_weights(SUPER), lambda name: kinds.get(name.split(".")[-1], "Q3_K"))
    yield "kquants", _source(path, path, _GGUF)

    tensors = make.llama_tensors(SMALL, WEIGHTS, "Q8_0")
    folder = base / "split"
    folder.mkdir()
    for number, name in enumerate(part_names("m-00001-of-00002.gguf")):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)}
        entries = [make.gguf_entry(key, make.U16, value) for key, value in split.items()]
        entries = [*make.llama_entries(SMALL), *entries] if number == 0 else entries
        (folder / name).write_bytes(make.gguf_bytes(entries, tensors[number::2]))
    for number, name in enumerate(part_names("m-00001-of-00002.gguf")):
        again = base / f"split{number}"
        shutil.copytree(folder, again)
        yield f"split{number}", _source(again, again / name, _GGUF)

    path = _one_file(base / "bpe")
    trained = words.bpe_metadata(words.train_bpe("llama-bpe", 280), "llama-bpe")
    shape = make.Shape(**{**vars(SMALL), "vocab_size": len(trained["tokenizer.ggml.tokens"])})
    changes = {key.replace(".", "__"): _typed(value) for key, value in trained.items()}
    changes |= {"tokenizer__ggml__scores": None, "tokenizer__chat_template": (make.STRING, "{{ messages[0].content }}")}
    make.write_gguf(path, shape, make.random_weights(shape), "Q8_0", **changes)
    yield "bpe", _source(path, path, _GGUF)


def _architectures() -> Iterator[bytes]:
    """GGUF files of other families and scalings."""
    one = struct.pack("<f", 1.5)
    long_short = [make.GgufTensor(f"rope_factors_{which}.weight", (8,), 0, one * 8) for which in ("long", "short")]
    frequencies = [make.GgufTensor("rope_freqs.weight", (8,), 0, one * 8)]
    yarn = {"type": (make.STRING, "yarn"), "factor": (make.F32, 4.0), "original_context_length": (make.U32, 32)}
    yarn |= {f"yarn_{key}": (make.F32, 1.5) for key in ("attn_factor", "beta_slow")}
    granite = {"embedding_scale": 12.0, "residual_scale": 0.5, "logit_scale": 8.0, "attention.scale": 0.1}
    turns = {
        "tokenizer.chat_template": (make.STRING, "{{ a }}"),
        "tokenizer.chat_template.tool_use": (make.STRING, "b"),
    }
    turns |= {"tokenizer.ggml.eot_token_id": (make.U32, 3), "tokenizer.ggml.add_eos_token": (make.BOOL, 1)}
    window = {"llama.attention.sliding_window": (make.U32, 16)}
    scaled = {f"llama.rope.scaling.{key}": value for key, value in yarn.items()}
    cases: list[tuple[str, list[make.GgufTensor], dict[str, Any]]] = [
        ("llama", frequencies, turns),
        ("qwen2", [], scaled),
        ("qwen3", [], window),
        ("phi3", long_short, {"llama.rope.scaling.original_context_length": (make.U32, 32)}),
        ("granite", [], {f"llama.{key}": (make.F32, value) for key, value in granite.items()}),
        (
            "llama",
            [],
            {f"llama.rope.scaling.{k}": v for k, v in (("type", (make.STRING, "linear")), ("factor", (make.F32, 2.0)))},
        ),
    ]
    for architecture, extra, changes in cases:
        shape = make.Shape(**{**vars(SMALL), "biases": architecture == "qwen2"})
        tensors = families.tensors_of(architecture, families.weights_of(architecture, shape), shape)
        named = {key.replace(".", "__"): value for key, value in changes.items()}
        yield make.gguf_bytes(make.llama_entries(shape, architecture, **named), [*tensors, *extra])


def _one_file(folder: Path) -> Path:
    folder.mkdir()
    return folder / "m.gguf"


def _typed(value: Any) -> tuple[int, Any]:
    if isinstance(value, list):
        return make.ARRAY, (make.STRING if isinstance(value[0], str) else make.I32, value)
    return {str: make.STRING, bool: make.BOOL, int: make.U32}[type(value)], value


def _pytorch(base: Path) -> Iterator[tuple[str, Target]]:
    shards = torch.meta_shards(FEW, FEW_WEIGHTS, 2)
    for name, file, damage in (("meta", "consolidated.01.pth", _ZIP), ("params", "params.json", _JSON)):
        folder = torch.write_meta_folder(base / name, torch.meta_params(FEW), shards, "F16")
        newer = torch.meta_params(FEW, use_scaled_rope=True, rope_theta=500000.0, hidden_dim=FEW.hidden_dim)
        window = torch.meta_params(FEW, sliding_window=64, rope_theta=1e6, model_parallel_size=2)
        also = tuple(json.dumps(params).encode() for params in (newer, window)) if name == "params" else ()
        yield name, _source(folder, folder / file, damage, also)

    folder = make.write_hf_folder(base / "bin", FEW, FEW_WEIGHTS)
    (folder / "model.safetensors").unlink()
    file = torch.torch_file({make.hf_name(name): values for name, values in FEW_WEIGHTS.items()})
    (folder / "pytorch_model.bin").write_bytes(file.bytes())
    yield "bin", _source(folder, folder / "pytorch_model.bin", _ZIP, (_odd_tensors(),))

    folder, halves = make.write_hf_folder(base / "bin_index", FEW, FEW_WEIGHTS, shards=2), {}
    for name in sorted(path.name for path in folder.glob("*.safetensors")):
        (folder / name).unlink()
    for i, name in enumerate(("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")):
        half = {make.hf_name(key): FEW_WEIGHTS[key] for key in list(FEW_WEIGHTS)[i::2]}
        (folder / name).write_bytes(torch.torch_file(half).bytes())
        halves |= dict.fromkeys(half, name)
    (folder / "model.safetensors.index.json").unlink()
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 2208}, "weight_map": halves}))
    yield "bin_index", _source(folder, index, _JSON)

    (base / "pickle").mkdir()
    path = base / "pickle" / "data.pkl"
    path.write_bytes(file.pickle)
    yield "pickle", Target(path, path, mutate.by(archives.opcodes, 0.9), open_pickle)

    special = [f"<|reserved_special_token_{i}|>" for i in range(11)]
    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"abc", b" th", b"the"]
    shape = make.Shape(**{**vars(FEW), "vocab_size": len(tokens) + len(special)})
    params = torch.meta_params(shape, vocab_size=shape.vocab_size)
    folder = torch.write_meta_folder(base / "tiktoken", params, torch.meta_shards(shape, make.random_weights(shape)))
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    yield "tiktoken", _source(folder, folder / "tokenizer.model", mutate.by(mutate.ranks))


def _odd_tensors() -> bytes:
    """A file whose tensors are transposed, parameters, of other types and in storages that they share."""
    items: dict[str, Any] = {}
    storages = {"64": make.encode_dense(FEW_WEIGHTS["tok_embeddings"], "F64")}
    for i, (name, values) in enumerate(FEW_WEIGHTS.items()):
        kind, key = (("HalfStorage", "F16"), ("BFloat16Storage", "BF16"), ("FloatStorage", "F32"))[i % 3]
        shape = values.shape
        storages[str(i)] = make.encode_dense(values.T if i % 2 else values, key)
        strides = [1, shape[0]] if i % 2 and len(shape) == 2 else None
        tensor = torch.tensor(torch.storage(str(i), values.size, kind), shape, strides)
        rebuilt = torch.Call(
            torch.Global("torch._utils _rebuild_parameter"), (tensor, True, torch.Call(torch.ORDERED_DICT, ()))
        )
        items[make.hf_name(name)] = rebuilt if i % 4 == 0 else tensor
    shared = torch.storage("64", FEW_WEIGHTS["tok_embeddings"].size, "DoubleStorage")
    for name in ("tok_embeddings", "output"):
        items[make.hf_name(name)] = torch.tensor(shared, FEW_WEIGHTS[name].shape)
    state = {"_metadata": torch.Call(torch.ORDERED_DICT, (), {"": {"version": 1}})}
    return torch.TorchFile(torch.pickled(torch.Call(torch.ORDERED_DICT, (), items, state)), storages).bytes()


def _adapter(base: Path) -> Iterator[tuple[str, Target]]:
    model = make.write_hf_folder(base / "lora_base", FEW, FEW_WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj", "down_proj"]}
    config |= {"use_dora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "modules_to_save": ["lm_head"]}
    entries: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        stem = f"base_model.model.model.layers.0.{module}"
        parts = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2), "lora_magnitude_vector": (8,)}
        for part, shape in parts.items():
            size = mutate.sized(shape, 4)
            entries[f"{stem}.{part}"] = ("F32", shape, mutate.filled(struct.pack("<2f", 0.5, 0.25), size))
    entries["base_model.model.lm_head.weight"] = ("F32", (10, 8), mutate.filled(struct.pack("<f", 0.5), 4 * 10 * 8))
    for name, damage in (("adapter_model.safetensors", _SAFETENSORS), ("adapter_config.json", _JSON)):
        folder = base / f"lora_{'weights' if damage is _SAFETENSORS else 'config'}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(make.safetensors_of(entries))
        yield folder.name, Target(folder, folder / name, damage, merge(model))


def _tokenizers(base: Path) -> Iterator[tuple[str, Target]]:
    bpe, proto = words.train_bpe("llama-bpe", 280).to_str(), words.train_sentencepiece(500)
    config = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True}
    config["chat_template"] = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "x"}]
    added = {"300": {"content": "<|x|>", "special": True}, "1": {"content": "<|im_start|>", "special": True}}
    files: list[tuple[str, str, bytes, mutate.Damage]] = [
        ("tokenizer_json", "tokenizer.json", bpe.encode(), _JSON),
        ("sentencepiece", "tokenizer.model", proto, _PROTO),
        ("tokenizer_config", "tokenizer_config.json", json.dumps(config).encode(), _JSON),
        ("added_tokens", "added_tokens.json", json.dumps({"<x>": 500, "<y>": 501}).encode(), _JSON),
    ]
    for name, file, content, damage in files:
        folder = base / name
        folder.mkdir()
        if name in ("tokenizer_json", "tokenizer_config"):
            (folder / "tokenizer.json").write_text(bpe)
            with_added = config | {"added_tokens_decoder": added} if name == "tokenizer_json" else config
            (folder / "tokenizer_config.json").write_text(json.dumps(with_added))
        else:
            (folder / "tokenizer.model").write_bytes(proto)
        (folder / file).write_bytes(content)
        also = tuple(_other_decoders()) if name == "tokenizer_json" else ()
        yield name, Target(folder, folder / file, damage, open_tokenizer, also=also)

    for name in ("llama-3", "mistral"):
        folder = base / f"template_{name}"
        folder.mkdir()
        (folder / "tokenizer.json").write_text(bpe)
        (folder / "chat_template.jinja").write_text(NAMED_TEMPLATES[name])
        damage = mutate.by(mutate.template, 0.9)
        allowed = (ModelFormatError, ValueError)
        yield folder.name, Target(folder, folder / "chat_template.jinja", damage, open_template, allowed, encode_it)


def _other_decoders() -> Iterator[bytes]:
    """tokenizer.json as those have it that were SentencePiece models."""
    vocab = {"<unk>": 0, "<|endoftext|>": 1, "<|im_end|>": 2, "<0x41>": 3, "▁": 4, "a": 5, "b": 6, "ab": 7}
    vocab |= {f"w{i}": i for i in range(8, 300)}
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b"], "byte_fallback": True, "unk_token": "<unk>"}
    meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    sequence = {"type": "Sequence", "decoders": [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    flags = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": True, "special": True}
    added = [{"id": 1, "content": "<|endoftext|>", **flags}]
    parts = [(None, meta, meta), ({"type": "Sequence", "normalizers": prepend}, None, sequence)]
    for normalizer, cutter, decoder in parts:
        document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "model": model}
        document |= {"normalizer": normalizer, "pre_tokenizer": cutter, "decoder": decoder, "post_processor": None}
        yield json.dumps(document).encode()


def _own(base: Path) -> Iterator[tuple[str, Target]]:
    bpe = words.train_bpe("gpt-2", 280)
    shape = make.Shape(**{**vars(SMALL), "vocab_size": bpe.get_vocab_size()})
    folder = make.write_hf_folder(base / "own_source", shape, make.random_weights(shape))
    (folder / "tokenizer.json").write_text(bpe.to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"})
    )
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": [2, 1]}))
    whole = convert(folder, base / "own", tensor_types=[("wq", "q4"), ("wk", "q4a"), ("wv", "q4nl"), ("wo", "f16")])
    for file, damage in (
        ("model.safetensors", mutate.by(_own_weights)),
        ("config.json", _JSON),
        ("generation_config.json", _JSON),
        ("golden_ids.json", _JSON),
    ):
        again = base / f"own_{file.split('.')[0].split('_')[0]}"
        shutil.copytree(whole, again)
        yield again.name, Target(again, again / file, damage, open_own, deeper=run_it)


def _own_weights(content: bytes, rng: random.Random) -> bytes:
    """Mostly with checksums that fit again."""
    content = mutate.safetensors(content, rng)
    if rng.random() < 0.3:
        return content
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header["__metadata__"]
    for name, entry in header.items():
        if f"tensor.{name}" in metadata:
            first, end = entry["data_offsets"]
            about = json.loads(metadata[f"tensor.{name}"])
            about["sha256"] = hashlib.sha256(data[first:end]).hexdigest()
            metadata[f"tensor.{name}"] = json.dumps(about)
    metadata["sha256"] = metadata_sha256(metadata)
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text + data


def _journal(base: Path) -> Iterator[tuple[str, Target]]:
    """A conversion that was stopped goes on to the same bytes whatever its journal says, or is refused."""
    source = make.write_hf_folder(base / "journal_source", FEW, FEW_WEIGHTS)
    whole = {path.name: path.read_bytes() for path in convert(source, base / "whole").iterdir()}

    def stop(step: Any) -> None:
        if step.name == "layers.0.wk":
            raise KeyboardInterrupt

    for which in ("journal", "partial"):
        place = base / f"{which}_place"
        place.mkdir()
        with contextlib.suppress(KeyboardInterrupt):
            convert(source, place / "m", resume=True, progress=stop)
        state = {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        file = place / (".m.journal" if which == "journal" else ".m.partial/model.safetensors")
        damage = mutate.by(mutate.json_lines) if which == "journal" else mutate.plain
        yield which, Target(place, file, damage, _resume(source, file, state, whole), (QuantizeError,), writes=place)


def _resume(source: Path, file: Path, state: dict[Path, bytes], whole: dict[str, bytes]) -> Opener:
    def resume(place: Path) -> None:
        for name, content in state.items():
            if place / name != file:
                (place / name).parent.mkdir(exist_ok=True)
                (place / name).write_bytes(content)
        try:
            written = convert(source, place / "m", resume=True)
            assert {path.name: path.read_bytes() for path in written.iterdir()} == whole, "other bytes were written"
            assert [path.name for path in place.iterdir()] == ["m"], "something was left behind"
        finally:
            shutil.rmtree(place, ignore_errors=True)
            file.parent.mkdir(parents=True, exist_ok=True)

    return resume
