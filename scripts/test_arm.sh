#!/usr/bin/env bash
# The engine for 64-bit ARM, cross-compiled and tested under emulation: arguments are pytest's. Everything goes into build/arm:
# an ARM Python from the distribution's own packages (downloaded and unpacked, nothing is installed), NumPy and pytest for
# it from the package index, objects, and a copy of the tree to run in. It tells bits, not speed: an emulator's time means nothing.
# Skips with a reason where a tool is missing (Debian: qemu-user g++-aarch64-linux-gnu, and apt-get itself).
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(cd "${VENV:-.venv}" && pwd)
arm=$(pwd)/build/arm
root=$arm/root

if [ "$(uname -m)" = aarch64 ]; then echo "test-arm: skipped, this is an ARM machine: make test runs these kernels themselves"; exit 0; fi
for tool in qemu-aarch64 aarch64-linux-gnu-g++ apt-get dpkg-deb; do
  if ! command -v "$tool" >/dev/null; then
    echo "test-arm: skipped, there is no $tool (apt-get install qemu-user g++-aarch64-linux-gnu, on Debian or Ubuntu)"
    exit 0
  fi
done

# With lists and a cache of its own, and as if nothing were installed: what is fetched runs with nothing else there.
private_apt() {
  apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=0 -o APT::Sandbox::User="$(id -un)" \
    -o Dir::State="$arm/apt/state" -o Dir::State::status="$arm/apt/status" -o Dir::Cache="$arm/apt/cache" "$@"
}

if [ ! -e "$arm/.python-ready" ]; then
  rm -rf "$arm/apt" "$root" "$arm/site"
  mkdir -p "$arm/apt/state/lists/partial" "$arm/apt/cache/archives/partial" "$root"
  : >"$arm/apt/status"
  private_apt update
  private_apt install -y --download-only python3-minimal libpython3-stdlib libpython3-dev libstdc++6 >/dev/null
  for package in "$arm"/apt/cache/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
  cat >"$arm/python" <<SH
#!/bin/sh
PYTHONHOME="$root/usr" exec qemu-aarch64 -cpu "\${ARM_CPU:-neoverse-n1}" -L "$root" "\$(readlink -f "$root/usr/bin/python3")" "\$@"
SH
  chmod +x "$arm/python"
  version=$("$arm/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$venv/bin/python" -m pip --disable-pip-version-check -qq install --no-warn-conflicts --target "$arm/site" --python-version "$version" --only-binary=:all: \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 numpy pytest hypothesis
  rm -rf "$arm/apt"
  touch "$arm/.python-ready"
fi

export PATH="$venv/bin:$PATH"
cmake -S . -B "$arm/objects" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DPYLLAMA_WERROR=ON -DPython_EXECUTABLE="$arm/python" \
  -DPython_INCLUDE_DIR="$(echo "$root"/usr/include/python3.*)" -DCMAKE_CXX_FLAGS="-idirafter $root/usr/include" \
  -Dpybind11_DIR="$("$venv/bin/python" -m pybind11 --cmakedir)" >"$arm/cmake.log"
cmake --build "$arm/objects" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" | tail -1

rm -rf "$arm/tree"
mkdir -p "$arm/tree"
tar -cf - --exclude=__pycache__ --exclude='*.so' pyproject.toml pyllama quantize tests | tar -xf - -C "$arm/tree"
cp "$arm"/objects/lib/_C.*.so "$arm/tree/pyllama/"
PYLLAMA_BUILD_DIR=$arm/objects "$venv/bin/python" -m pytest -p no:cacheprovider -q tests/test_objects.py

cd "$arm/tree"
export PYTHONPATH="$arm/site" PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1
offered='from pyllama import _C; print("+".join(_C.isas()))'
check() { [ "$(ARM_CPU=$1 "$arm/python" -c "$offered")" = "$2" ] || { echo "test-arm: a $1 should be offered $2"; exit 1; }; }
check neoverse-n1 neon+scalar
check cortex-a72 scalar  # has no dot products
exec "$arm/python" -m pytest -p no:cacheprovider -q "$@"
