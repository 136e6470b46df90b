"""What this installation can do on this machine, what is missing, and why. Printing is cli/doctor.py's work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any, Literal

from .common.errors import PyllamaError
from .cuda import PROVEN_ON_A_GPU, examine_cuda
from .demo import demo_source
from .memory import available_bytes
from .native import load_native

_PROBE_S = 0.5
_PROBE_BYTES = 2 << 30  # what must be free: the probe reads 1 GiB, and must not push others out of memory
# package → what it is needed for, and whether everything else works without it
_PACKAGES: dict[str, tuple[str, bool]] = {
    "numpy": ("arrays", False),
    "jinja2": ("chat templates", False),
    "tokenizers": ("models with tokenizer.json", False),
    "sentencepiece": ("models with tokenizer.model", True),
    "rich": ("a coloured chat", True),
    "prompt_toolkit": ("line editing and history in the chat", True),
    "tqdm": ("progress bars of quantize", True),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. "bad" means that pyllama does not work here, "missing" that a part of it does not."""

    name: str
    state: Literal["ok", "missing", "bad"]
    text: str


def examine() -> list[Finding]:
    """Looks at everything, in the order of the report. Takes about a second for measuring the memory."""
    findings = [
        Finding("python", "ok", f"{platform.python_version()} at {sys.executable}"),
        Finding("machine", "ok", f"{platform.system()} {platform.machine()}, {_cpu_name()}"),
    ]
    findings += _engine()
    findings += [_package(name) for name in _PACKAGES]
    findings.append(_demo())
    return [*findings, *_cuda()]


def _engine() -> list[Finding]:
    try:
        native = load_native()
    except ImportError as error:
        return [Finding("engine", "bad", str(error))]
    info = native.build_info()
    described = ", ".join(f"{key} {value}" for key, value in sorted(info.items()))
    runs = native.isas()
    lacks = [isa for isa in native.all_isas() if isa not in runs]
    findings = [Finding("engine", "ok", described), _isa(runs, lacks)]
    threads = native.default_threads()
    findings.append(Finding("threads", "ok", _threads(threads)))
    return [*findings, _bandwidth(native, threads)]


def _bandwidth(native: Any, threads: int) -> Finding:
    free = available_bytes()
    if free is not None and free < _PROBE_BYTES:
        why = f"{free / 2**30:.1f} GiB of memory are free, measuring takes {_PROBE_BYTES / 2**30:.0f}"
        return Finding("bandwidth", "missing", f"not measured: {why}")
    try:
        gb_per_s = native.read_bandwidth(threads, _PROBE_S)
    except ValueError as error:  # an impossible PYLLAMA_ISA
        return Finding("bandwidth", "missing", f"not measured: {error}")
    except MemoryError:  # a limit that the system's free memory does not tell of
        return Finding("bandwidth", "missing", "not measured: out of memory")
    return Finding("bandwidth", "ok", f"{gb_per_s:.1f} GB/s read with {threads} threads, measured now")


def _isa(runs: list[str], lacks: list[str]) -> Finding:
    wish = os.environ.get("PYLLAMA_ISA", "")
    if wish and wish not in runs:
        why = "this machine cannot run it" if wish in lacks else "no such kernels in this build"
        return Finding("kernels", "bad", f"PYLLAMA_ISA={wish}: {why}; expected one of {' '.join(runs)}")
    text = f"{wish or runs[0]}{' (PYLLAMA_ISA)' if wish else ''}; this machine runs {' '.join(runs)}"
    return Finding("kernels", "ok", text + (f"; it cannot run {' '.join(lacks)}" if lacks else ""))


def _threads(threads: int) -> str:
    text = f"{threads}: one per physical core that affinity and cgroup allow"
    if hasattr(os, "sched_getaffinity"):
        text += f" (affinity: {len(os.sched_getaffinity(0))} of {os.cpu_count()} processors)"
    return text


def _package(name: str) -> Finding:
    purpose, optional = _PACKAGES[name]
    if importlib.util.find_spec(name) is None:
        return Finding(
            name, "missing" if optional else "bad", f"not installed; needed for {purpose}: pip install {name}"
        )
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "version unknown"
    return Finding(name, "ok", f"{version} ({purpose})")


def _demo() -> Finding:
    try:
        return Finding("demo", "ok", demo_source().name)
    except PyllamaError as error:
        return Finding("demo", "missing", str(error))


def _cuda() -> list[Finding]:
    try:
        report = examine_cuda()
    except ImportError:  # the engine's line says it
        return [Finding("cuda", "missing", "unknown without the engine")]
    if report.trouble is not None:
        built = "" if report.library is None else f"{report.library}; "
        return [Finding("cuda", "missing", f"{built}{report.trouble}; everything runs on the CPU")]
    if report.emulated:
        use = 'for tests: only device="cuda" takes it'
    else:
        name = "auto" if PROVEN_ON_A_GPU else "cuda"
        use = f'device="{name}" takes device 0' if report.devices[0].trouble is None else "device 0 does not work"
    findings = [Finding("cuda", "ok", f"{report.library}; {use}")]
    for i, device in enumerate(report.devices):
        state: Literal["ok", "missing"] = "ok" if device.trouble is None else "missing"
        findings.append(
            Finding(f"cuda device {i}", state, device.text + (f"; {device.trouble}" if device.trouble else ""))
        )
    return findings


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "processor unknown"
