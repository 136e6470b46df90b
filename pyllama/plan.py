"""What a model will take of memory, and how many of its layers fit a CUDA device: decided before anything is loaded.

Layers go to the device from the last one on, with the head; the embedding follows when all of them are there
(csrc/split_backend.h). The bytes are sizes.py's, the devices cuda.py's; printing is cli/plan.py's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import sizes, speeds
from .common.errors import DeviceError
from .common.formats import TensorSpec
from .cuda import CudaDevice, check_device, choose_device
from .memory import available_bytes
from .speeds import Speeds

# Left free on a device: what CUDA and graphs take, attention's buffers over long contexts, the last slab of pages.
SPARE_BYTES = 256 << 20

GpuLayers = str | int


@dataclass(frozen=True)
class Share:
    """Bytes that one side takes. `upload`: what loading takes beyond what the cache will fill later."""

    n_layers: int
    layers: int
    embedding: int
    head: int
    cache: int
    buffers: int
    upload: int = 0
    spare: int = 0

    @property
    def total(self) -> int:
        return self.layers + self.embedding + self.head + self.cache + self.buffers + self.upload + self.spare


@dataclass(frozen=True)
class Plan:
    """Where a model's layers go and what they take, in bytes. `device`: "cpu" or "cuda:N".

    `layer_bytes`: each layer's weights on the device, the first layer first. `most_gpu_layers`: how many fit there
    with `n_seqs` contexts of `n_ctx` tokens, None where it is not known what is free. `n_ctx_of_all`: the longest
    context with which all layers would fit; 0 where none is that short.
    """

    model: str
    n_layers: int
    n_ctx: int
    n_seqs: int
    kv_dtype: str
    device: str
    device_name: str | None
    gpu_layers: int
    most_gpu_layers: int | None
    n_ctx_of_all: int | None
    layer_bytes: list[int]
    cache_bytes_per_tok: int
    on_device: Share | None
    on_cpu: Share
    device_free: int | None
    device_memory: int | None
    cpu_free: int | None
    notes: list[str] = field(default_factory=list)
    speeds: Speeds | None = None  # predicted, where the CPU does everything

    @property
    def fits(self) -> bool:
        """False when the device is known to have less than what is wanted."""
        return self.most_gpu_layers is None or self.gpu_layers <= self.most_gpu_layers

    @property
    def contexts(self) -> str:
        """In words: what the cache has room for."""
        return f"{'a context' if self.n_seqs == 1 else f'{self.n_seqs} contexts'} of {self.n_ctx} tokens"

    @property
    def depths(self) -> list[int]:
        """Tokens in the cache that decoding is predicted for: none, and 4,096 or the whole context."""
        return [0, min(4096, self.n_ctx)]

    def record(self) -> dict[str, Any]:
        """As plain JSON values, with the sums."""
        record = asdict(self) | {"fits": self.fits}
        if self.speeds is not None:
            depths = {f"decode_tok_per_s_d{n}": self.speeds.decode_tok_per_s(n) for n in self.depths}
            record["speeds"] |= depths
        for side, share in (("on_device", self.on_device), ("on_cpu", self.on_cpu)):
            if share is not None:
                record[side]["total"] = share.total
        return record

    def require(self, wish: GpuLayers) -> None:
        """Raises DeviceError that says what would fit, unless the plan fits its device."""
        if self.on_device is None or (self.fits and self.gpu_layers):
            return
        wanted, free = self.on_device.total, self.device_free or 0
        wanted_of = f"{self.gpu_layers} of {self.n_layers} layers want" if self.gpu_layers else "a single layer wants"
        raise DeviceError(
            f"gpu_layers={wish!r}: {wanted_of} {_gib(wanted)} of {self.device} with {self.contexts}, "
            f"{_gib(free)} are free; {self.advice()}"
        )

    def advice(self) -> str:
        """What would fit, where not everything does."""
        ways = []
        if self.most_gpu_layers:
            layers = "layer" if self.most_gpu_layers == 1 else "layers"
            ways.append(f"{self.most_gpu_layers} {layers} would fit (gpu_layers={self.most_gpu_layers})")
        if self.n_ctx_of_all:
            ways.append(f"all would fit with n_ctx={self.n_ctx_of_all}")
        return ", or ".join(ways) if ways else 'nothing would fit, use device="cpu"'


class Planner:
    """Counts for one model and one kind of cache: `n_seqs` contexts of `n_ctx` tokens, steps of `max_batch_tok`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        specs: Iterable[TensorSpec],
        n_ctx: int | None = None,
        kv_dtype: str = "f16",
        *,
        n_seqs: int = 1,
        max_batch_tok: int = sizes.MAX_BATCH_TOK,
    ) -> None:
        longest = int(config["max_seq_len"])
        if n_ctx is not None and not 0 < n_ctx <= longest:
            raise ValueError(f"n_ctx={n_ctx}: this model was made for at most {longest} tokens")
        self.config = config
        self.tensors = {spec.name: spec for spec in specs}
        self.n_ctx = n_ctx or longest
        self.kv_dtype = kv_dtype
        self.n_seqs = n_seqs
        self.max_batch_tok = max_batch_tok
        self.n_layers = int(config["n_layers"])
        self.layer_bytes = [sizes.device_layer_bytes(config, self.tensors, i) for i in range(self.n_layers)]

    def on_device(self, gpu_layers: int, n_ctx: int | None = None, spare: int = SPARE_BYTES) -> Share:
        """The share of a device that has the last `gpu_layers` layers and the head, of contexts of n_ctx tokens."""
        layers = range(self.n_layers - gpu_layers, self.n_layers)
        whole = gpu_layers == self.n_layers
        own_embedding = whole and not self.config["tied_embeddings"]
        cache = gpu_layers * self._pages(n_ctx or self.n_ctx) * sizes.device_page_bytes(self.config, self.kv_dtype)
        staging = sizes.device_staging_bytes(self.config, self.tensors, layers, embedding=whole)
        return Share(
            n_layers=gpu_layers,
            layers=sum(self.layer_bytes[i] for i in layers),
            embedding=sizes.device_embedding_bytes(self.tensors) if own_embedding else 0,
            head=sizes.device_head_bytes(self.config, self.tensors),
            cache=cache,
            buffers=sizes.device_buffer_bytes(self.config, self.tensors, layers, self.max_batch_tok),
            upload=max(0, staging - cache),
            spare=spare,
        )

    def on_cpu(self, gpu_layers: int) -> Share:
        """The CPU's share then. Weights are bytes of the file; where it is mapped, they take memory as they are read.
        A head that is the embedding counts as the embedding."""
        n_layers = self.n_layers - gpu_layers
        if not n_layers:
            return Share(0, 0, 0, 0, 0, 0)
        own_head = gpu_layers == 0 and not self.config["tied_embeddings"]
        return Share(
            n_layers=n_layers,
            layers=sum(s.payload_bytes for name, s in self.tensors.items() if _layer_of(name, n_layers) < n_layers),
            embedding=self.tensors["tok_embeddings"].payload_bytes,
            head=(self.tensors["output"].payload_bytes if own_head else 0)
            + (self.tensors["norm"].payload_bytes if gpu_layers == 0 else 0),
            cache=n_layers * self._pages(self.n_ctx) * sizes.cpu_page_bytes(self.config, self.kv_dtype),
            buffers=sizes.cpu_buffer_bytes(self.config, self.max_batch_tok),
        )

    def _pages(self, n_ctx: int) -> int:
        return self.n_seqs * -(-n_ctx // sizes.PAGE_TOK)

    def most_layers(self, free: int, n_ctx: int | None = None, spare: int = SPARE_BYTES) -> int:
        """How many layers fit a device with so many bytes free; 0 also where not even the head does."""
        for n in range(self.n_layers, 0, -1):
            if self.on_device(n, n_ctx, spare).total <= free:
                return n
        return 0

    def longest_context_of_all(self, free: int, spare: int = SPARE_BYTES) -> int:
        """The longest context, in whole pages, with which all layers fit; 0 for none."""
        page = self.n_seqs * self.n_layers * sizes.device_page_bytes(self.config, self.kv_dtype)
        one = self.on_device(self.n_layers, 1, spare)
        room = free - (one.total - one.cache - one.upload)
        pages = room // page if self.on_device(self.n_layers, 1, spare).total <= free else 0
        return min(pages * sizes.PAGE_TOK, self.n_ctx)


def _layer_of(name: str, otherwise: int) -> int:
    return int(name.split(".")[1]) if name.startswith("layers.") else otherwise


def make_plan(
    planner: Planner, model: str, device: CudaDevice | None, gpu_layers: GpuLayers = "auto", note: str | None = None
) -> Plan:
    """The plan for a device, or for the CPU alone. `note`: why there is none, say. ValueError for bad `gpu_layers`.

    No layers at all are asked of no device: the plan is the CPU's.
    """
    check_gpu_layers(gpu_layers, planner.n_layers)
    if gpu_layers == 0:
        device = None
    spare = 0 if device is not None and device.emulated else SPARE_BYTES
    free = device.free_bytes if device is not None else None
    most = planner.most_layers(free, spare=spare) if free is not None else None
    n = 0
    if device is not None:
        n = gpu_layers if isinstance(gpu_layers, int) else planner.n_layers
        if gpu_layers == "auto" and most is not None:
            n = most
    of_all = None
    if free is not None and most is not None and most < planner.n_layers:
        of_all = planner.longest_context_of_all(free, spare)
    # What a single layer would want, to be told where not even that fits.
    shown = 1 if device is not None and not n and gpu_layers == "auto" else n
    return Plan(
        model=model,
        n_layers=planner.n_layers,
        n_ctx=planner.n_ctx,
        n_seqs=planner.n_seqs,
        kv_dtype=planner.kv_dtype,
        device=device.label if device is not None else "cpu",
        device_name=device.name if device is not None else None,
        gpu_layers=n,
        most_gpu_layers=most,
        n_ctx_of_all=of_all,
        layer_bytes=planner.layer_bytes,
        cache_bytes_per_tok=planner.n_layers * _page_bytes(planner, device) // sizes.PAGE_TOK,
        on_device=planner.on_device(shown, spare=spare) if shown else None,
        on_cpu=planner.on_cpu(n),
        device_free=free,
        device_memory=device.memory_bytes if device is not None else None,
        cpu_free=available_bytes(),
        notes=[note] if note else [],
    )


def _page_bytes(planner: Planner, device: CudaDevice | None) -> int:
    count = sizes.cpu_page_bytes if device is None else sizes.device_page_bytes
    return count(planner.config, planner.kv_dtype)


def check_gpu_layers(gpu_layers: GpuLayers, n_layers: int | None = None) -> None:
    """Raises ValueError unless it is "auto", "all" or a number of layers; of `n_layers` at most, if that is known."""
    number = isinstance(gpu_layers, int) and not isinstance(gpu_layers, bool)
    if gpu_layers not in ("auto", "all") and not (number and int(gpu_layers) >= 0):
        raise ValueError(f'gpu_layers={gpu_layers!r}: expected "auto", "all" or a number of layers')
    if n_layers is not None and number and int(gpu_layers) > n_layers:
        raise ValueError(f"gpu_layers={gpu_layers}: the model has {n_layers} layers")


def plan_model(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    n_ctx: int | None = None,
    kv_dtype: str = "f16",
    gpu_layers: GpuLayers = "auto",
    device_free: int | None = None,
    measure: bool = False,
) -> Plan:
    """The plan for a model that is not opened, from its headers alone; arguments are those of `LLM`.

    `measure`: predict speeds too, by a rehearsal of about two seconds (speeds.py).

    `device_free`: for a device that is not here, with so many bytes free. Raises as `LLM` does, but plans also what
    does not fit.
    """
    from .open import describe_model

    check_gpu_layers(gpu_layers)
    check_device(device)
    if device == "cpu" and (device_free is not None or gpu_layers not in ("auto", 0)):
        raise ValueError('device="cpu" has no layers on a device: leave gpu_layers and device_free away')
    described = describe_model(path)
    planner = Planner(described.config, described.specs, n_ctx, kv_dtype)
    name = (described.config.get("source") or {}).get("name") or described.path.name
    chosen, note = choose_device(device, described.config, planner.n_ctx) if device_free is None else (None, None)
    if device_free is not None:
        trouble = sizes.unsupported_on_device(described.config, planner.n_ctx)
        if trouble is not None:
            raise DeviceError(f'device="{device}": {trouble}')
        chosen = CudaDevice(0, "not here", device_free, device_free)
    plan = make_plan(planner, name, chosen, gpu_layers, note)
    if not measure or plan.on_device is not None or not _has_room(plan):
        return plan
    n_prompt = max(1, min(speeds.N_PROMPT, plan.n_ctx))
    predicted = speeds.predict(described.config, described.specs, n_prompt=n_prompt, kv_dtype=kv_dtype)
    return replace(plan, speeds=predicted)


def _has_room(plan: Plan) -> bool:
    """Whether a rehearsal's weights fit beside what is here."""
    layer = plan.on_cpu.layers // plan.n_layers
    return plan.cpu_free is None or 2 * max(layer, speeds.REHEARSED_BYTES) < plan.cpu_free


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
