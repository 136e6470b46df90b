#!/usr/bin/env bash
# csrc/cuda/device.h in every branch: a kernel for each helper, compiled by nvcc for one architecture of each kind. The same
# file runs through the emulation in tests/cuda. Arguments are other architectures (75 90); NVCC names the compiler.
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
