#!/usr/bin/env bash
# The engine for 64-bit ARM, cross-compiled and tested under emulation: arguments are pytest's. Everything goes into build/arm:
# an ARM Python (scripts/arm_python.sh), objects, and a copy of the tree to run in. It tells bits, not speed: an emulator's time
# means nothing. Skips with a reason where a tool is missing (Debian: qemu-user g++-aarch64-linux-gnu, and apt-get itself).
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

VENV=$venv scripts/arm_python.sh
export PATH="$venv/bin:$PATH"
cmake -S . -B "$arm/objects" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DPYLLAMA_WERROR=ON -DPython_EXECUTABLE="$arm/python" \
  -DPython_INCLUDE_DIR="$(echo "$root"/usr/include/python3.*)" -DCMAKE_CXX_FLAGS="-idirafter $root/usr/include" \
  -Dpybind11_DIR="$("$venv/bin/python" -m pybind11 --cmakedir)" >"$arm/cmake.log"
cmake --build "$arm/objects" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" | tail -1

rm -rf "$arm/tree"
mkdir -p "$arm/tree"
tar -cf - --exclude=__pycache__ --exclude='*.so' pyproject.toml benchmarks csrc pyllama quantize tests | tar -xf - -C "$arm/tree"
cp "$arm"/objects/lib/_C.*.so "$arm/tree/pyllama/"
PYLLAMA_BUILD_DIR=$arm/objects "$venv/bin/python" -m pytest -p no:cacheprovider -q tests/test_objects.py

cd "$arm/tree"
export PYTHONPATH="$arm/site" PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1
offered='from pyllama import _C; print("+".join(_C.isas()))'
check() { [ "$(ARM_CPU=$1 "$arm/python" -c "$offered")" = "$2" ] || { echo "test-arm: a $1 should be offered $2"; exit 1; }; }
check neoverse-n1 neon+scalar
check cortex-a72 scalar  # has no dot products

# The same bits as on this machine, and not only the same as its own scalar kernels'.
(unset PYTHONPATH && cd ../../.. && "$venv/bin/python" -m tests.print_bits) >"$arm/bits.here"
"$arm/python" -m tests.print_bits >"$arm/bits.arm"
diff "$arm/bits.here" "$arm/bits.arm" || { echo "test-arm: other bits on ARM (>) than here (<)"; exit 1; }
echo "test-arm: $(wc -l <"$arm/bits.arm") digests of logits and drawn tokens are those of this machine"

export CXX=aarch64-linux-gnu-g++  # tests/cuda compiles its kernels
exec "$arm/python" -m pytest -p no:cacheprovider -q -m "not many_blocks" "$@"
