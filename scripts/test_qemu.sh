#!/usr/bin/env bash
# Kernels, engine and a real reply on an emulated processor without AVX2: one instruction too many dies here of SIGILL.
# Arguments are pytest's. Skips with a reason where qemu-x86_64 (Debian: qemu-user) is missing. QEMU_CPU chooses another
# processor.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(cd "${VENV:-.venv}" && pwd)
cpu=${QEMU_CPU:-Nehalem}

if [ "$(uname -m)" != x86_64 ]; then echo "test-qemu: skipped, this is $(uname -m), not x86_64"; exit 0; fi
if ! command -v qemu-x86_64 >/dev/null; then
  echo "test-qemu: skipped, there is no qemu-x86_64 (apt-get install qemu-user)"
  exit 0
fi
unset QEMU_CPU
python=$("$venv/bin/python" -c 'import os, sys; print(os.path.realpath(sys.executable))')
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# PYTHONPATH instead of the venv's own link: qemu runs the real interpreter, which does not know that it is in a venv.
export PYTHONPATH="$site" PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1
emulated() { qemu-x86_64 -cpu "$cpu" "$python" "$@"; }

emulated - <<'PY'
from pyllama import _C
assert _C.isas() == ["scalar"], f"an emulated processor without AVX2 is offered {_C.isas()}"
PY
emulated -m pytest -p no:cacheprovider -q "$@"
