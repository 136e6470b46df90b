"""The extension's side of the CUDA library: every way in which CUDA can be missing is told precisely, and nobody who
does not ask for CUDA ever opens it.

Libraries of C++ compiled here stand in for the real one: they fill the table of csrc/cuda/api.h as a machine without a
driver, with an old one, and so on would. That the real library works on a device is not tested here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyllama import LLM, DeviceError
from pyllama.cli.main import main
from pyllama.cuda import choose_device, examine_cuda
from pyllama.native import load_native

from .helpers_elf import needed_libraries, shown_symbols

ROOT = Path(__file__).resolve().parent.parent
Make = Callable[..., Path]

# A machine with one device where everything works; -D changes single answers.
FAKE = r"""
#include "cuda/api.h"
#include <cstdio>
#include <cstdlib>
#ifndef KIND
#define KIND kPyllamaCudaOk
#endif
#ifndef READS
#define READS KIND
#endif
#ifndef VERSION
#define VERSION kPyllamaCudaVersion
#endif
#ifndef SIZE
#define SIZE sizeof(PyllamaCudaTable)
#endif
#ifndef DRIVER
#define DRIVER 13010
#endif
namespace {
struct Opened {  // leaves a trace when the library is loaded
  Opened() {
    if (const char* path = std::getenv("FAKE_CUDA_TRACE")) std::fclose(std::fopen(path, "w"));
  }
} opened;
const char* last_error() { return "the fake's own words"; }
int build(PyllamaCudaBuild* b) { *b = {13000, 0, "80+PTX"}; return kPyllamaCudaOk; }
int driver(int32_t* v) { *v = DRIVER; return DRIVER ? kPyllamaCudaOk : kPyllamaCudaNoDriver; }
int device_count(int32_t* n) { *n = 1; return KIND; }
int device(int32_t index, PyllamaCudaDevice* d) {
  if (index != 0) return kPyllamaCudaBadArgument;
  *d = {};
  std::snprintf(d->name, sizeof(d->name), "Fake 9000");
  d->major = 9; d->minor = 0; d->multiprocessors = 132; d->l2_bytes = 50 << 20; d->shared_bytes = 227 << 10;
  d->memory_bytes = int64_t{80} << 30; d->free_bytes = int64_t{79} << 30;
  return kPyllamaCudaOk;
}
int read_bandwidth(int32_t index, int64_t bytes, int32_t, double* seconds) {
  *seconds = bytes / 3e12;
  return index == 0 ? READS : kPyllamaCudaBadArgument;
}
const PyllamaCudaTable table = {VERSION, SIZE, last_error, build, driver, device_count, device, read_bandwidth};
}  // namespace
#ifndef ENTRY
#define ENTRY pyllama_cuda_table
#endif
extern "C" const PyllamaCudaTable* ENTRY(void) { return TABLE; }
"""


@pytest.fixture(scope="module")
def make_fake(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make_fake(KIND="…", …) -> a shared library whose answers differ from a good machine's in these."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler to make a library with")
    folder = tmp_path_factory.mktemp("fakes")
    (folder / "fake.cpp").write_text(FAKE)
    made: dict[tuple[tuple[str, str], ...], Path] = {}

    def make(**definitions: str) -> Path:
        key = tuple(sorted(definitions.items()))
        if key not in made:
            made[key] = folder / f"fake{len(made)}.so"
            wishes = [f"-D{name}={value}" for name, value in ({"TABLE": "&table"} | definitions).items()]
            command = [compiler, "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", *wishes, "fake.cpp", "-o"]
            subprocess.run([*command, str(made[key])], cwd=folder, check=True)
        return made[key]

    return make


def use(monkeypatch: pytest.MonkeyPatch, path: Path | str) -> None:
    monkeypatch.setenv("PYLLAMA_CUDA_LIBRARY", str(path))


def why() -> str:
    """What LLM(device="cuda") says."""
    with pytest.raises(DeviceError) as caught:
        LLM("demo", device="cuda")
    return str(caught.value)


def test_the_library_lies_beside_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    native = load_native()
    monkeypatch.delenv("PYLLAMA_CUDA_LIBRARY", raising=False)
    assert Path(native.cuda.library_path()) == Path(native.__file__).parent / "libpyllama_cuda.so"
    use(monkeypatch, "")  # set and empty is not set
    assert Path(native.cuda.library_path()).name == "libpyllama_cuda.so"
    use(monkeypatch, "/some/where.so")
    assert native.cuda.library_path() == "/some/where.so"


def test_a_build_without_cuda(tmp_path: Path) -> None:
    """Asked for by its place, as an extension without a library beside it would."""
    path = tmp_path / "libpyllama_cuda.so"
    with pytest.raises(DeviceError, match=r"built without CUDA.*PYLLAMA_CUDA=ON") as caught:
        load_native().cuda.build(str(path))
    assert str(path) in str(caught.value)


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, tmp_path / "none.so")
    assert "none.so: no such file" in why() and "PYLLAMA_CUDA_LIBRARY names it" in why()


def test_a_library_that_cannot_be_read(tmp_path: Path) -> None:
    """It is there, so nobody is told to build it; a link to itself is what not even root can read."""
    path = tmp_path / "libpyllama_cuda.so"
    path.symlink_to(path)
    with pytest.raises(DeviceError, match=r"libpyllama_cuda\.so: cannot be read: \S") as caught:
        load_native().cuda.build(str(path))
    assert "built without" not in str(caught.value)


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library")
    use(monkeypatch, tmp_path / "text.so")
    assert "text.so: cannot be loaded: " in why()
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, "text.so")  # the file here, not one of that name in a folder of the system
    assert "text.so: cannot be loaded: " in why()


@pytest.mark.parametrize(
    ("definitions", "words"),
    [
        ({"ENTRY": "another_function"}, "has no function pyllama_cuda_table"),
        ({"TABLE": "nullptr"}, "gave no table"),
        ({"VERSION": "7"}, "its table of functions has version 7, this pyllama expects 3"),
        ({"SIZE": "8"}, "has 8 bytes, this pyllama expects 168 or more"),
        ({"KIND": "kPyllamaCudaNoDriver"}, "no NVIDIA driver was found (the fake's own words)"),
        (
            {"KIND": "kPyllamaCudaDriverTooOld", "DRIVER": "12040"},
            "driver is too old: it runs CUDA 12.4, pyllama's CUDA library was built with 13.0",
        ),
        ({"KIND": "kPyllamaCudaNoDevice"}, "a driver, but no NVIDIA device was found"),
        ({"KIND": "kPyllamaCudaOutOfMemory"}, "out of memory on the device: the fake's own words"),
        ({"KIND": "kPyllamaCudaInternal"}, "CUDA failed: the fake's own words"),
        ({"KIND": "99"}, "CUDA failed: the fake's own words"),  # a kind of a later version
    ],
)
def test_every_reason_is_told(
    definitions: dict[str, str], words: str, make_fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make_fake(**definitions))
    assert words in why()
    assert why().startswith('device="cuda": ') and why().endswith('; use device="cpu" or "auto"')
    assert words in str(examine_cuda().trouble)
    device, note = choose_device("auto")
    assert device is None and note is not None and words in note, "the CPU is taken, and why is known"


def test_a_larger_table_of_a_later_library_is_taken(make_fake: Make) -> None:
    assert load_native().cuda.build(str(make_fake(SIZE="sizeof(PyllamaCudaTable)+8")))["toolkit"] == 13000


def test_a_device_is_described(make_fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(make_fake())
    cuda = load_native().cuda
    assert cuda.build(path) == {"toolkit": 13000, "emulated": False, "architectures": "80+PTX"}
    assert cuda.driver(path) == 13010
    (device,) = cuda.devices(path)
    assert device == {
        "name": "Fake 9000",
        "compute_capability": (9, 0),
        "multiprocessors": 132,
        "l2_bytes": 50 << 20,
        "shared_bytes": 227 << 10,
        "memory_bytes": 80 << 30,
        "free_bytes": 79 << 30,
    }
    assert cuda.read_bandwidth(path, 0, 1 << 30) == pytest.approx(3000)
    with pytest.raises(ValueError, match="the fake's own words"):
        cuda.read_bandwidth(path, 1, 1 << 30)
    use(monkeypatch, path)
    assert choose_device("auto") == (
        None,
        'no CUDA: no model of this version has run on a GPU yet; device="cuda" takes Fake 9000',
    )
    monkeypatch.setattr("pyllama.cuda.PROVEN_ON_A_GPU", True)
    for name in ("cuda", "cuda:0", "auto"):
        chosen, note = choose_device(name)
        assert chosen is not None and (chosen.label, chosen.name, note) == ("cuda:0", "Fake 9000", None)
        assert (chosen.free_bytes, chosen.memory_bytes, chosen.emulated) == (79 << 30, 80 << 30, False)
    with pytest.raises(DeviceError, match=r'device="cuda:3": there is no device 3, only cuda:0'):
        choose_device("cuda:3")
    config = {"head_dim": 160}
    with pytest.raises(DeviceError, match=r'device="cuda": head_dim 160: the CUDA kernels take even ones up to 128'):
        choose_device("cuda", config)
    assert choose_device("auto", config) == (None, "no CUDA: head_dim 160: the CUDA kernels take even ones up to 128")


def test_a_device_without_code_for_it(make_fake: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(make_fake(KIND="kPyllamaCudaOk", READS="kPyllamaCudaArchitectureNotBuilt"))
    with pytest.raises(DeviceError, match=r"has code for 80\+PTX, which this device does not run.*PYLLAMA_CUDA_ARCHS"):
        load_native().cuda.read_bandwidth(path, 0, 1 << 30)
    use(monkeypatch, path)
    assert "which this device does not run" in why()
    assert choose_device("auto")[0] is None
    (line,) = examine_cuda().devices
    assert line.text.startswith("Fake 9000") and "does not run" in str(line.trouble)


def test_doctor_shows_it(make_fake: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("PYLLAMA_ISA", raising=False)
    monkeypatch.setattr("pyllama.doctor._PROBE_BYTES", 1 << 60)  # nobody has as much: the memory is not measured
    use(monkeypatch, make_fake())
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (library,) = (line for line in lines if line.startswith("cuda  "))
    assert "  toolkit 13.0, code for 80+PTX; the driver runs CUDA 13.1; " in library
    assert library.endswith('device="cuda" takes device 0')
    (device,) = (line for line in lines if line.startswith("cuda device 0"))
    assert "Fake 9000, compute capability 9.0, 132 multiprocessors, 79.0 of 80.0 GiB free" in device
    use(monkeypatch, make_fake(READS="kPyllamaCudaArchitectureNotBuilt"))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("cuda  ") and line.endswith("device 0 does not work") for line in lines)
    assert any(line.startswith("cuda device 0") and "[missing] Fake 9000" in line for line in lines)
    use(monkeypatch, make_fake(KIND="kPyllamaCudaDriverTooOld", DRIVER="12040"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "toolkit 13.0, code for 80+PTX; the NVIDIA driver is too old" in out and "cuda device" not in out


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_who_asks_opens_it(make_fake: Make, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    wishes = {"PYLLAMA_CUDA_LIBRARY": str(make_fake()), "FAKE_CUDA_TRACE": str(trace)}
    code = """
import pyllama, pyllama.llm, pyllama.doctor, pyllama.cuda
from pyllama.native import load_native
native = load_native()
native.cuda.library_path()
try:
    pyllama.LLM("no such model", device="auto")  # before anything else
except Exception as error:
    print(type(error).__name__)
"""
    assert run_python(code, **wishes).strip() == "FileNotFoundError"
    assert not trace.exists()
    run_python(code + "native.cuda.build(native.cuda.library_path())", **wishes)
    assert trace.exists()


def test_the_extension_needs_nothing_of_cuda() -> None:
    needed = needed_libraries(Path(load_native().__file__))
    assert any(name.startswith("libc.") for name in needed)
    assert [name for name in needed if "cuda" in name.lower() or "nv" in name.lower()] == []


def test_the_library_that_was_built() -> None:
    """With nvcc there is one beside the extension: it hides its runtime, and opens where no driver is."""
    path = Path(load_native().__file__).parent / "libpyllama_cuda.so"
    if not path.exists():
        pytest.skip("this build has no CUDA library (no nvcc, or PYLLAMA_CUDA=OFF)")
    assert shown_symbols(path) == {"pyllama_cuda_table"}
    assert [name for name in needed_libraries(path) if "cuda" in name] == []
    cuda = load_native().cuda
    build = cuda.build(str(path))
    assert build["toolkit"] >= 11000 and not build["emulated"] and build["architectures"]
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        cuda.read_bandwidth(str(path), 0, 3)
    try:
        n_devices = len(cuda.devices(str(path)))
    except DeviceError as error:
        assert any(words in str(error) for words in ("no NVIDIA driver", "driver is too old", "no NVIDIA device"))
    else:
        assert all(cuda.read_bandwidth(str(path), i, 64 << 20) > 1 for i in range(n_devices))


def test_many_threads_open_one_library(make_fake: Make) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = make_fake(DRIVER="13020")  # nobody has opened it yet

    def ask(_: int) -> Any:
        return load_native().cuda.driver(str(path))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(32))) == {13020}
