"""Where an opened model's layers run: decided when an `LLM` starts, by the plan of memory and what was asked for.

What a layer takes is sizes.py's, how many fit is plan.py's, which devices there are is cuda.py's.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from . import sizes
from .common.errors import DeviceError
from .cuda import CudaDevice, check_device, choose_device, free_bytes, measure_bandwidth
from .draft_model import MOST_CONTEXTS
from .memory import available_bytes
from .plan import GpuLayers, Plan, Planner, check_gpu_layers, make_plan

if TYPE_CHECKING:
    from .open import OpenedModel


def check_placement(device: str, gpu_layers: GpuLayers) -> None:
    """Raises ValueError for what makes no sense whatever the model is."""
    check_device(device)
    check_gpu_layers(gpu_layers)
    if device == "cpu" and gpu_layers not in ("auto", 0):
        raise ValueError(f'gpu_layers={gpu_layers!r} and device="cpu": layers go to a GPU with device="cuda" only')


class Placement:
    """The decision. `gpu_layers` of `n_layers` run on `device`, "cpu" if that is none. There is to be room for `n_seqs`
    contexts of `n_ctx` tokens and for steps of `max_batch_tok`.

    Raises DeviceError where CUDA is asked for and cannot be had, or not for so many layers; ValueError for bad
    arguments.
    """

    def __init__(
        self,
        opened: OpenedModel,
        n_ctx: int,
        kv_dtype: str,
        device: str = "cpu",
        gpu_layers: GpuLayers = "auto",
        *,
        n_seqs: int = 1,
        max_batch_tok: int = sizes.MAX_BATCH_TOK,
    ) -> None:
        check_placement(device, gpu_layers)
        self._opened, self._n_ctx, self._kv_dtype = opened, n_ctx, kv_dtype
        self._n_seqs, self._max_batch_tok = n_seqs, max_batch_tok
        self.n_layers = int(opened.config["n_layers"])
        check_gpu_layers(gpu_layers, self.n_layers)
        self._cuda, self._note = choose_device(device, opened.config, n_ctx)
        self.gpu_layers = 0
        if self._cuda is None and gpu_layers not in ("auto", 0):
            raise DeviceError(f'gpu_layers={gpu_layers!r}: {self._note}; gpu_layers goes with device="cuda"')
        if gpu_layers == 0:
            self._cuda = None
        if self._cuda is not None:
            plan = self._plan_for(self._cuda, gpu_layers)
            if device == "auto" and gpu_layers == "auto" and not plan.gpu_layers:
                self._note = f"no CUDA: not one layer would fit {self._cuda.label}, {plan.advice()}"
                self._cuda = None
            else:
                plan.require(gpu_layers)
                self.gpu_layers = plan.gpu_layers
                self.__dict__["plan"] = plan
        self.device = self._cuda.label if self._cuda is not None else "cpu"

    @cached_property
    def plan(self) -> Plan:
        """What the model takes, with what was free before it was loaded; on the CPU when somebody first asks."""
        return self._plan_for(None, "auto")  # with a device it was made when that was chosen

    def _plan_for(self, device: CudaDevice | None, gpu_layers: GpuLayers) -> Plan:
        config = self._opened.config
        name = (config.get("source") or {}).get("name") or self._opened.path.name
        planner = Planner(
            config,
            self._opened.specs,
            self._n_ctx,
            self._kv_dtype,
            n_seqs=self._n_seqs,
            max_batch_tok=self._max_batch_tok,
        )
        return make_plan(planner, name, device, gpu_layers, self._note)

    @property
    def device_share(self) -> float:
        """Of the layers: 0 is all on the CPU, 1 all on the device."""
        return self.gpu_layers / self.n_layers

    @property
    def backend(self) -> str:
        """CPU, CUDA or CPU+CUDA."""
        return "CPU" if not self.gpu_layers else "CUDA" if self.gpu_layers == self.n_layers else "CPU+CUDA"

    @property
    def options(self) -> dict[str, Any]:
        """For `_C.Model`."""
        if not self.gpu_layers:
            return {}
        return {"device": self.device, "gpu_layers": -1 if self.gpu_layers == self.n_layers else self.gpu_layers}

    def rooms(self) -> list[tuple[int | None, int]]:
        """For each memory that has a part of every page of the cache what is free there now, and the part's bytes."""
        config, n_cpu = self._opened.config, self.n_layers - self.gpu_layers
        rooms: list[tuple[int | None, int]] = []
        if n_cpu:
            rooms.append((available_bytes(), n_cpu * sizes.cpu_page_bytes(config, self._kv_dtype)))
        if self._cuda is not None:
            page_bytes = self.gpu_layers * sizes.device_page_bytes(config, self._kv_dtype)
            rooms.append((free_bytes(self._cuda.index), page_bytes))
        return rooms

    def read_bandwidth(self) -> float | None:
        """GB/s of reading the device's memory, measured now; None on the CPU."""
        return None if self._cuda is None else measure_bandwidth(self._cuda)

    def device_for_draft(self, draft: OpenedModel) -> str:
        """Where a draft model runs, for `_C.Model`: on the device, if all of it, with every context that it may keep,
        fits beside this model, which is there already, and its cache, which is to come; else "", the CPU."""
        n_ctx = min(self._n_ctx, int(draft.config["max_seq_len"]))
        if self._cuda is None or sizes.unsupported_on_device(draft.config, n_ctx):
            return ""
        own = self.plan.on_device
        assert own is not None
        guide = Planner(draft.config, draft.specs, n_ctx, n_seqs=MOST_CONTEXTS)
        left = free_bytes(self._cuda.index) - own.cache
        return self.device if guide.on_device(guide.n_layers, spare=own.spare).total <= left else ""

    def describe(self, threads: int, isa: str) -> str:
        """For people: what computes."""
        cpu = f"{threads} {'thread' if threads == 1 else 'threads'} · {isa}"
        if self._cuda is None:
            return cpu
        device = f"{self.device} {self._cuda.name}"
        if self.gpu_layers == self.n_layers:
            return device
        return f"{device} with {self.gpu_layers} of {self.n_layers} layers · {cpu}"
