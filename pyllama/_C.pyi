"""The extension's Python surface (csrc/bindings.cpp). One `Model.step` call per step, or for several; GIL released."""

from collections.abc import Sequence as Seq
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

class Weight:
    """A tensor as it lies in a model folder (docs/FORMAT.md): no copy, `data` is kept alive.

    `data`: a 64-byte aligned buffer of uint8. Raises ModelFormatError when size, shape or numbers do not fit together.
    """
    def __init__(
        self, name: str, format: str, shape: Seq[int], data: Any, *, group: int = 0, scale: str = "f16",
        offset: str = "", codebook: Seq[int] = (), input_order: bool = False,
    ) -> None: ...
    name: str
    format: str
    shape: tuple[int, ...]
    group: int
    scale: str
    offset: str
    codebook: tuple[int, ...]
    input_order: bool
    nbytes: int

class Sampler:
    """How the next token is chosen; immutable. Stages in order: logit bias, penalties, temperature, top-k, top-p, min-p."""
    def __init__(
        self, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, presence_penalty: float = 0.0, frequency_penalty: float = 0.0,
        logit_bias: dict[int, float] = ..., logprobs: int = -1, seed: int = 0, end_ids: Seq[int] = (),
    ) -> None: ...   # end_ids: tokens that end a call of several steps
    def sample(self, logits: NDArray[np.float32], tokens: Seq[int], prompt_len: int = 0, isa: str = "") -> StepResult:
        """What a step would sample from these logits [vocab_size] after these tokens (for tests)."""

class Sequence:
    """Tokens of one text and the pages of its key/value cache. Made by Model.sequence(); freed with its last reference."""
    n_past: int                   # tokens whose keys and values are in the cache
    tokens: list[int]             # those tokens, then a sampled one that has not been fed yet is *not* included
    prompt_len: int               # settable: tokens before this count as prompt for presence/frequency penalties
    def truncate(self, n: int) -> None: ...
    def fork(self, n: int) -> Sequence: ...   # a new one with the first n tokens in the same pages; not during a step of this one
    def close(self) -> None: ...  # give the pages back now

class Sample:
    token: int
    logprob: float                             # nan unless logprobs >= 0
    top_logprobs: list[tuple[int, float]]

class StepResult:
    samples: list[Sample]                      # the sampled tokens: one, one more per accepted draft and further pass; [] without sampler
    token: int                                 # the first of them, -1 if there is none
    logprob: float
    top_logprobs: list[tuple[int, float]]
    logits: NDArray[np.float32] | None         # [1, vocab] for "last", [n, vocab] for "all", else None

class Model:
    """Weights and a backend: immutable, shared by all sequences. `step` may be called from one thread at a time (it locks)."""
    def __init__(
        self, config: dict[str, Any], weights: dict[str, Weight], *, threads: int = 0, isa: str = "", max_batch_tok: int = 512,
        kv_dtype: str = "f16", device: str = "", gpu_layers: int = -1,
    ) -> None: ...
    # device: "" for the CPU, "cuda" or "cuda:1"; "cpu" stands in for a device in tests. DeviceError when it cannot be had or
    #         is too small. gpu_layers: the last so many layers and the head go to it, the embedding and the others to the
    #         CPU; -1: all.
    # config: dim hidden_dim n_layers n_heads n_kv_heads head_dim vocab_size max_seq_len norm_eps
    #         rope_inv_freq (float32 [head_dim/2]) rope_attention_factor tied_embeddings; and as docs/FORMAT.md says, absent
    #         or None for none: embedding_scale attention_scale sliding_window sliding_layers
    threads: int
    isa: str                      # of the CPU, also where a device does the work
    backend: str                  # what does the work: an instruction set, "cuda sm_90", "cuda emulated"
    max_batch_tok: int
    PAGE_TOK: int                 # tokens of one key/value page
    page_bytes: int               # memory of one page
    pages_in_use: int             # pages that sequences hold; a page that several share counts once
    def pages_of(self, sequences: Seq[Sequence]) -> int: ...   # that these hold, each counted once
    def sequence(self) -> Sequence: ...
    def step(
        self, batch: Seq[tuple[Sequence, Any, Sampler | None, str] | tuple[Sequence, Any, Sampler | None, str, int]],
        n_more: int = 0,
    ) -> list[StepResult]:
        """Runs the tokens of every item through the model in one pass; then up to n_more passes of the tokens just sampled.

        An item is (sequence, int32 token ids (at least one), sampler or None, logits: "none" | "last" | "all"[, n_draft]):
        the last n_draft ids are guesses. As many of them as equal what is sampled before them stay in the sequence, and
        `samples` are the tokens that as many steps of one token would have given, for every sampler.
        With n_more every item needs a sampler and logits "none"; `samples` are the tokens that as many calls would have
        given. Fewer passes are made after one of a sampler's end_ids, after hurry(), and where one fails: the next call
        then raises why.
        Raises ValueError for a token out of range or more than max_batch_tok tokens in all; KeyboardInterrupt between
        layers when Ctrl-C is pending: then no sequence has changed.
        """
    def hurry(self) -> None: ...  # from any thread: a call of several passes ends after the one it is in
    def profile(self, on: bool) -> dict[str, float]:
        """Times steps from now on, or no more. Seconds of steps since the last call: "products" (the layers' matrices),
        "attention", "head" (norm and output matrix) and "rest" (norms, rounding, RoPE, the cache, SwiGLU).

        The sum is the time inside the backend; sampling is not in it. Waits while a step runs.
        """

def isas() -> list[str]: ...              # instruction sets that this machine runs and this build has, best first
def all_isas() -> list[str]: ...          # those that this build has
def format_table() -> list[dict[str, Any]]: ...
def default_threads() -> int: ...
def build_info() -> dict[str, str]: ...   # compiler, version
def read_bandwidth(threads: int, seconds: float, weights: Seq[Weight] = ()) -> float:
    """GB/s of a streaming read of these weights where they lie, or of a buffer beyond the caches."""
def settle_in_huge_pages(fd: int, mapped: NDArray[np.uint8], seconds: float) -> int:
    """Has a file, mapped whole and as far as it is cached, cached in huge pages: small ones are dropped and read again.

    Returns the number of blocks of 2 MB that were brought; begins none after `seconds`. 0 where the system cannot: it
    takes Linux 6.7, a file system that keeps files in huge pages, and (6.14) a file that is one's own or may be written.
    """
def int8_peak(threads: int, seconds: float, isa: str = "") -> float: ...   # 1e9 operations/s of isa's int8 dot products (amx: tiles); a multiply-add is two

class cuda:
    """A submodule (csrc/bindings_cuda.cpp): what the CUDA library says. Opens the library at `path`; DeviceError says why not."""
    @staticmethod
    def library_path() -> str: ...                         # PYLLAMA_CUDA_LIBRARY, else the file beside this extension
    @staticmethod
    def build(path: str) -> dict[str, Any]: ...            # toolkit (13000: 13.0), emulated, architectures
    @staticmethod
    def driver(path: str) -> int: ...                      # the newest CUDA that the driver runs
    @staticmethod
    def devices(path: str) -> list[dict[str, Any]]: ...    # name compute_capability multiprocessors l2_bytes shared_bytes memory_bytes free_bytes
    @staticmethod
    def read_bandwidth(path: str, device: int, n_bytes: int, repeats: int = 5) -> float: ...   # GB/s, the fastest pass
    @staticmethod
    def model_sizes(
        config: dict[str, Any], weights: dict[str, Weight], *, max_batch_tok: int = 512, kv_dtype: str = "f16",
    ) -> dict[str, int]:
        """Bytes of a device's memory: embedding layers largest_layer head weights (all; a tied matrix once) buffers staging page.

        Of the library at library_path(); needs no driver. `staging` is wanted while the model is opened only.
        """

class ops:
    """A submodule (csrc/bindings_ops.cpp): single CPU kernels, for tests and benchmarks; and the sampler's arithmetic.

    `isa`: one of isas(), "" for the best. ValueError for shapes that do not fit together and for an unknown `isa`.
    """
    @staticmethod
    def matmul(weight: Weight, x: ArrayLike, isa: str = "", threads: int = 1) -> NDArray[np.float32]:
        """x float32 [M, K] times the transposed weight [N, K] -> [M, N]; x goes to int8 where the weight is quantized."""
    @staticmethod
    def quantize_activations(
        x: ArrayLike, isa: str = "",
    ) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]:
        """x float32 [M, K] -> int8 [M, Kp], scale [M, Kp/32] and sum [M, Kp/32]; Kp is K rounded up to 32."""
    @staticmethod
    def rmsnorm(x: ArrayLike, w: ArrayLike, eps: float, isa: str = "") -> NDArray[np.float32]: ...   # x, w: [dim]
    @staticmethod
    def rope(head: ArrayLike, cos: ArrayLike, sin: ArrayLike, isa: str = "") -> NDArray[np.float32]:
        """head [head_dim] rotated; cos and sin [head_dim/2]."""
    @staticmethod
    def swiglu(gate: ArrayLike, up: ArrayLike, isa: str = "") -> NDArray[np.float32]: ...   # silu(gate) * up, [n]
    @staticmethod
    def exp(x: ArrayLike, isa: str = "") -> NDArray[np.float32]: ...   # [n]
    @staticmethod
    def largest_logits(logits: ArrayLike, isa: str = "") -> tuple[float, bool, NDArray[np.float32]]:
        """The largest of [n], whether all are finite, the largest of each 64."""
    @staticmethod
    def weigh(
        logits: ArrayLike, scale: float, lowest: float, isa: str = "",
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """2^(44 + (logits - max)·scale), rounded: [n, made a multiple of 64], and sums of each 64; 0 where all are below `lowest`."""
    @staticmethod
    def dequantize_row(weight: Weight, row: int) -> NDArray[np.float32]: ...   # [K]
    @staticmethod
    def attention(
        q: ArrayLike, k: ArrayLike, v: ArrayLike, pos: int, isa: str = "", threads: int = 1, kv_dtype: str = "f16",
        window: int = 0,
    ) -> NDArray[np.float32]:
        """Causal: q [n_tok, n_heads, head_dim] at positions pos…, k and v [pos + n_tok, n_kv_heads, head_dim].

        `window`: of how many keys each sees the last; 0: of all.
        """
    @overload
    @staticmethod
    def portable_log(x: float) -> float: ...   # positive normal float64, without libm
    @overload
    @staticmethod
    def portable_log(x: NDArray[Any]) -> NDArray[np.float64]: ...
    @staticmethod
    def philox4x32(counter: Seq[int], key: Seq[int]) -> list[int]: ...   # Philox4x32-10: four words and two -> four
    @staticmethod
    def uniform_bits(seed: int, position: int) -> int: ...   # the sampler's 53 random bits

class convert:
    """The inner loops of `quantize`, without the GIL; numpy twins define them. `isa`: one of isas(), "" = the best."""
    @staticmethod
    def isas() -> list[str]: ...
    @staticmethod
    def search_scale(
        weights: NDArray[np.float32], group: int, levels: tuple[float, float], bias: float, places: ArrayLike,
        level_of_half: ArrayLike | None = None, code_of_half: ArrayLike | None = None,
        counts: NDArray[np.float32] | None = None, isa: str = "",
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        """[N, K] -> codes [N, K], f16 bits of scales [N, G]. counts: [K] by what a column's squared error counts."""
    @staticmethod
    def search_affine(
        weights: NDArray[np.float32], group: int, trials: ArrayLike, counts: NDArray[np.float32] | None = None,
        isa: str = "",
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint16]]:
        """[N, K] -> codes [N, K], f16 bits of scales and of minimums [N, G]; trials [n, 2]."""
    @staticmethod
    def push_group(
        block: NDArray[np.float32], scales: NDArray[np.float32], offsets: NDArray[np.float32],
        factor: NDArray[np.float32], levels: tuple[float, float], level_of_half: ArrayLike | None = None,
        code_of_half: ArrayLike | None = None, isa: str = "",
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int8]]:
        """GPTQ through a group [width, n] under scales [trials, n]: levels, errors [width, n], which [n], -1 for none."""
    @staticmethod
    def move_codes(
        found: NDArray[np.float32], slope: NDArray[np.float32], scale: NDArray[np.float32], gram: NDArray[np.float32],
        levels: tuple[float, float], level_of_half: ArrayLike | None = None, code_of_half: ArrayLike | None = None,
        isa: str = "",
    ) -> None: ...   # coordinate descent through a group's levels [width, n]; these and the slope in place
    @staticmethod
    def largest(values: NDArray[np.float32], isa: str = "") -> float: ...   # magnitude; infinite if one is not finite
    @staticmethod
    def from_f16(halves: NDArray[np.uint16], isa: str = "") -> NDArray[np.float32]: ...
    @staticmethod
    def put_codes(codes: NDArray[np.uint8], tiles: NDArray[np.uint8], bits: int) -> None:
        """Codes [N, K] into [tiles, blocks, 16, 4], in place."""
    @staticmethod
    def put_columns(values: NDArray[Any], tiles: NDArray[Any]) -> None:
        """Numbers [N, width] of 1, 2 or 4 bytes into [tiles, columns, 16], in place."""
    # The parts of a layer, of which each gives what the next product reads; `isa` and `threads` as of Model.
    @staticmethod
    def norm(
        weight: Weight, eps: float, x: NDArray[np.float32], isa: str = "", threads: int = 0,
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def attention(
        config: dict[str, Any], layer: int, weights: dict[str, Weight], x: NDArray[np.float32], lengths: list[int],
        isa: str = "", threads: int = 0,
    ) -> NDArray[np.float32]:
        """x [n, dim], texts of these lengths from position 0 -> [n, q_dim]. weights: attn_norm wq wk wv (bq … k_norm)."""
    @staticmethod
    def mlp(
        config: dict[str, Any], weights: dict[str, Weight], x: NDArray[np.float32], isa: str = "", threads: int = 0,
    ) -> NDArray[np.float32]:
        """x [n, dim] -> [n, hidden_dim]. weights: mlp_norm w_gate w_up."""
    @staticmethod
    def add_product(
        weight: Weight, x: NDArray[np.float32], y: NDArray[np.float32], isa: str = "", threads: int = 0,
    ) -> None:
        """y [n, N] += weight·x [n, K], in place."""
