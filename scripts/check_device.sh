#!/usr/bin/env bash
# The tests' C++ files as CUDA, by nvcc: tests/cuda/helper_kernels.cpp, which has a kernel for each helper of
# csrc/cuda/device.h, for one architecture of each kind; the others for one, as `make gpu-check` compiles them. Runs
# nothing. Arguments are other architectures for the helpers (75 90); NVCC names the compiler.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=${NVCC:-nvcc}
out=build/check_device
mkdir -p "$out"
for arch in "${@:-75 80 90 120}"; do
  for one in $arch; do
    "$nvcc" -x cu -std=c++17 -arch="sm_$one" -cubin -fmad=false -Werror all-warnings -Icsrc -o "$out/helpers_$one.cubin" tests/cuda/helper_kernels.cpp
    echo "check_device: sm_$one compiles"
  done
done
python3 -m tests.cuda.compiling --tests-only --architecture 90 "$out/tests.so"
echo "check_device: the tests compile for a device"
