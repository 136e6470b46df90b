"""Builds the extension pyllama._C with CMake, and the CUDA library beside it where there is an nvcc; everything else
about the package stands in pyproject.toml.

Environment: PYLLAMA_BUILD_DIR (objects; kept, so that a rebuild takes seconds), PYLLAMA_WERROR=1, PYLLAMA_SANITIZE=1,
PYLLAMA_CUDA=AUTO|ON|OFF, PYLLAMA_CUDA_ARCHS (docs/GPU.md), CXX, CMAKE_ARGS, CMAKE_BUILD_PARALLEL_LEVEL.
Compiles nothing itself and chooses no instruction set: CMakeLists.txt does.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = "libpyllama_cuda.so"


def build_dir() -> Path:
    """Where CMake keeps its objects: one folder per platform and interpreter unless PYLLAMA_BUILD_DIR names one."""
    name = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    return Path(os.environ.get("PYLLAMA_BUILD_DIR") or ROOT / "build" / name).resolve()


def find_tool(name: str) -> str | None:
    """A build tool's path: the one that came as a Python build requirement, else the system's."""
    try:
        module = __import__(name)
        folder = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
    except ImportError:
        folder = None
    places = [folder, os.path.dirname(sys.executable), os.environ.get("PATH")]
    return next(filter(None, (shutil.which(name, path=place) for place in places if place)), None)


def parallel_jobs() -> str:
    """As many compilers at once as this process may use cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(cores)


def cuda_wish() -> str:
    """AUTO, ON or OFF; CMake refuses anything else."""
    return os.environ.get("PYLLAMA_CUDA") or "AUTO"


def require_compiler() -> None:
    """Says what is missing before CMake says it in forty lines."""
    wanted = os.environ.get("CXX")
    if wanted:
        program = shlex.split(wanted)[0]
        if shutil.which(program) is None:
            raise SystemExit(f"pyllama: CXX={wanted}, but no program {program} was found; unset CXX or install it")
    elif not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SystemExit(
            "pyllama: no C++ compiler found (looked for c++, g++, clang++). Install one, for example the package "
            "g++ (Debian, Ubuntu), gcc-c++ (Fedora) or the Xcode command line tools (macOS), or set CXX."
        )


class CMakeBuild(build_ext):
    """build_ext that lets CMake make extension and CUDA library, and copies both to where setuptools wants them."""

    def build_extension(self, ext: Extension) -> None:
        require_compiler()
        cmake = find_tool("cmake")
        if cmake is None:
            raise SystemExit(
                "pyllama: cmake was not found; install it (pip install cmake) or build with pip's isolation"
            )
        folder = build_dir()
        folder.mkdir(parents=True, exist_ok=True)
        self._run([cmake, "-S", str(ROOT), "-B", str(folder), *self._configure_arguments(folder)])
        build = [cmake, "--build", str(folder), "--parallel", parallel_jobs(), "--target"]
        self._run([*build, "_C"])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / "lib" / target.name), str(target))
        self._build_cuda(build, folder / "lib" / CUDA_LIBRARY, target.parent / CUDA_LIBRARY)

    def copy_extensions_to_source(self) -> None:
        """What an editable install and --inplace do with the extension, for the library beside it as well."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            build_py = self.get_finalized_command("build_py")
            package = Path(build_py.get_package_dir(ext.name.rpartition(".")[0]))
            made = Path(self.build_lib, self.get_ext_filename(ext.name)).parent / CUDA_LIBRARY
            self._replace(made, package / CUDA_LIBRARY)

    def _build_cuda(self, build: list[str], made: Path, target: Path) -> None:
        """The CUDA library into `target`. Nobody needs it who did not ask for it: then a failure is only told."""
        try:
            self._run([*build, "cuda_library"])
        except SystemExit as error:
            if cuda_wish() == "ON" or os.environ.get("PYLLAMA_WERROR") == "1":
                raise
            print(f"{error}\npyllama: the CUDA library could not be built; going on without it", file=sys.stderr)
            made.unlink(missing_ok=True)
        self._replace(made, target)

    def _replace(self, made: Path, target: Path) -> None:
        """Copies, if there is something. A library of an earlier build never stays: it would pass for this one's."""
        target.unlink(missing_ok=True)
        if made.exists():
            self.copy_file(str(made), str(target))

    def _configure_arguments(self, folder: Path) -> list[str]:
        import pybind11

        flag = {True: "ON", False: "OFF"}
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYLLAMA_OUTPUT_DIR={folder / 'lib'}",
            f"-DPYLLAMA_WERROR={flag[os.environ.get('PYLLAMA_WERROR') == '1']}",
            f"-DPYLLAMA_SANITIZE={flag[os.environ.get('PYLLAMA_SANITIZE') == '1']}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPYLLAMA_CUDA={cuda_wish()}",
            f"-DPYLLAMA_CUDA_ARCHS={os.environ.get('PYLLAMA_CUDA_ARCHS') or 'AUTO'}",
        ]
        ninja = find_tool("ninja")
        if not (folder / "CMakeCache.txt").exists() and ninja:
            arguments += ["-G", "Ninja"]
        if ninja:
            arguments.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        return arguments + shlex.split(os.environ.get("CMAKE_ARGS", ""))

    def _run(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"pyllama: `{shlex.join(command)}` failed with status {error.returncode}; see above"
            ) from None


setup(ext_modules=[Extension("pyllama._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
