"""What CUDA can do here, in words: for `device="cuda"` and for `pyllama doctor`.

Opens the CUDA library (csrc/cuda_library.h) when called and never at import. Chooses no device and runs nothing on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .common.errors import DeviceError
from .native import load_native

CANNOT_RUN = "this version of pyllama cannot run models on CUDA yet"


@dataclass(frozen=True)
class CudaReport:
    """`library`: how it was built, None if it cannot be opened; `devices`: a line each; `trouble`: why not, or None."""

    library: str | None
    devices: list[str]
    trouble: str | None


def require_cuda() -> None:
    """Raises DeviceError with every reason for which models cannot run on CUDA here; today there is always one."""
    trouble = examine_cuda().trouble
    reasons = [trouble, f"besides, {CANNOT_RUN}"] if trouble else [CANNOT_RUN]
    raise DeviceError(f'device="cuda": {"; ".join(reasons)}; use device="cpu" or "auto"')


def examine_cuda() -> CudaReport:
    """Opens the library and asks it for everything; what fails becomes `trouble`."""
    native = load_native().cuda
    library = None
    try:
        path = native.library_path()
        build = native.build(path)
        made_by = "emulated on the CPU" if build["emulated"] else f"toolkit {version_text(build['toolkit'])}"
        library = f"{made_by}, code for {build['architectures']}"
        devices = native.devices(path)
        library += "" if build["emulated"] else f"; the driver runs CUDA {version_text(native.driver(path))}"
        return CudaReport(library, [_device_text(device) for device in devices], None)
    except DeviceError as error:
        return CudaReport(library, [], str(error))


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
