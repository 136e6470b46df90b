"""What CUDA can do here, in words, and which device is meant: for `LLM(device=…)`, `pyllama plan` and `pyllama doctor`.

Opens the CUDA library (csrc/cuda_library.h) when called and never at import. Runs no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .common.errors import DeviceError
from .native import load_native
from .sizes import unsupported_on_device

# Whether `make gpu-check` has passed on a device. Until then nobody gets CUDA without asking for it.
PROVEN_ON_A_GPU = False

_PROBE_BYTES = 1 << 16
_MEASURED_BYTES = 1 << 30


@dataclass(frozen=True)
class CudaDevice:
    """One device. `emulated`: none at all, but the CPU running CUDA kernels, for tests."""

    index: int
    name: str
    free_bytes: int
    memory_bytes: int
    emulated: bool = False

    @property
    def label(self) -> str:
        """As `device=` names it."""
        return f"cuda:{self.index}"


@dataclass(frozen=True)
class DeviceLine:
    """A device in words; `trouble`: why it runs no kernels, or None."""

    text: str
    trouble: str | None


@dataclass(frozen=True)
class CudaReport:
    """`library`: how it was built, None if it cannot be opened; `trouble`: why there are no devices, or None."""

    library: str | None
    emulated: bool
    devices: list[DeviceLine]
    trouble: str | None


def check_device(device: str) -> None:
    """Raises ValueError unless it is "auto", "cpu", "cuda" or "cuda:N"."""
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", device):
        raise ValueError(f'device={device!r}: expected "auto", "cpu", "cuda" or "cuda:N"')


def choose_device(
    device: str, config: Mapping[str, Any] | None = None, n_ctx: int | None = None
) -> tuple[CudaDevice | None, str | None]:
    """The device that is meant, None for the CPU; and why "auto" means the CPU. config: of the model that is to run
    there, in contexts of `n_ctx` tokens.

    "auto": the first CUDA device, where there is one that runs kernels and this model; never an emulated one, and none
    before PROVEN_ON_A_GPU. Raises DeviceError with the reasons where CUDA is asked for and cannot be had.
    """
    check_device(device)
    if device == "cpu":
        return None, None
    try:
        found = find_device(int(device.partition(":")[2] or 0))
        trouble = unsupported_on_device(config, n_ctx) if config is not None else None
        if trouble is not None:
            raise DeviceError(trouble)
        if device == "auto" and found.emulated:
            raise DeviceError("PYLLAMA_CUDA_LIBRARY names the emulation, which is for tests")
        if device == "auto" and not PROVEN_ON_A_GPU:
            raise DeviceError(f'no model of this version has run on a GPU yet; device="cuda" takes {found.name}')
        return found, None
    except DeviceError as error:
        if device == "auto":
            return None, f"no CUDA: {error}"
        raise DeviceError(f'device="{device}": {error}; use device="cpu" or "auto"') from None


def find_device(index: int) -> CudaDevice:
    """A device that runs a kernel. Raises DeviceError with the reason where there is none of this number."""
    native = load_native().cuda
    path = native.library_path()
    emulated = bool(native.build(path)["emulated"])
    devices = native.devices(path)
    if index >= len(devices):
        numbers = "only cuda:0" if len(devices) == 1 else f"cuda:0 to cuda:{len(devices) - 1}"
        raise DeviceError(f"there is no device {index}, {numbers}; see `pyllama doctor`")
    native.read_bandwidth(path, index, _PROBE_BYTES, 1)  # a kernel that is checked: the library has code for the device
    record = devices[index]
    return CudaDevice(index, record["name"], record["free_bytes"], record["memory_bytes"], emulated)


def free_bytes(index: int) -> int:
    """Free memory of a device, now."""
    native = load_native().cuda
    return int(native.devices(native.library_path())[index]["free_bytes"])


def measure_bandwidth(device: CudaDevice) -> float:
    """GB/s of a streaming read of a device's memory."""
    native = load_native().cuda
    n_bytes = _PROBE_BYTES if device.emulated else min(_MEASURED_BYTES, free_bytes(device.index) // 2) // 16 * 16
    return float(native.read_bandwidth(native.library_path(), device.index, n_bytes))


def examine_cuda() -> CudaReport:
    """Opens the library, asks it for everything and runs a kernel on every device; what fails becomes `trouble`."""
    native = load_native().cuda
    library, emulated = None, False
    try:
        path = native.library_path()
        build = native.build(path)
        emulated = bool(build["emulated"])
        made_by = "emulated on the CPU" if emulated else f"toolkit {version_text(build['toolkit'])}"
        library = f"{made_by}, code for {build['architectures']}"
        devices = native.devices(path)
        library += "" if emulated else f"; the driver runs CUDA {version_text(native.driver(path))}"
        lines = [DeviceLine(_device_text(device), _trouble(path, i)) for i, device in enumerate(devices)]
        return CudaReport(library, emulated, lines, None)
    except DeviceError as error:
        return CudaReport(library, emulated, [], str(error))


def _trouble(path: str, index: int) -> str | None:
    try:
        load_native().cuda.read_bandwidth(path, index, _PROBE_BYTES, 1)
    except DeviceError as error:
        return str(error)
    return None


def version_text(version: int) -> str:
    """CUDA's own number of a version in its usual form: 13000 is 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _device_text(device: dict[str, Any]) -> str:
    major, minor = device["compute_capability"]
    free, memory = (device[key] / 2**30 for key in ("free_bytes", "memory_bytes"))
    return (
        f"{device['name']}, compute capability {major}.{minor}, {device['multiprocessors']} multiprocessors, "
        f"{free:.1f} of {memory:.1f} GiB free"
    )
