#!/usr/bin/env bash
# Makes a virtual environment at $1 with pip in it, also where Python came without ensurepip (Debian splits it off).
# Installs nothing outside $1.
set -euo pipefail

target=${1:?usage: make_venv.sh FOLDER}
python=${PYTHON:-python3}

command -v "$python" >/dev/null || { echo "make_venv: no $python found; install Python 3.10 or newer, or set PYTHON=" >&2; exit 1; }
"$python" - <<'PY'
import sys
if sys.version_info < (3, 10):
    sys.exit(f"make_venv: {sys.executable} is Python {sys.version.split()[0]}; 3.10 or newer is needed: set PYTHON=python3.11, say")
PY

[ -x "$target/bin/python" ] && "$target/bin/python" -m pip --version >/dev/null 2>&1 && exit 0

if "$python" -m venv "$target" >/dev/null 2>&1; then exit 0; fi
if "$python" -m venv --without-pip --clear "$target" && "$python" -m pip --python "$target/bin/python" install --quiet pip; then exit 0; fi
if "$python" -m virtualenv --quiet "$target"; then exit 0; fi
echo "make_venv: $python can make no virtual environment with pip; install your system's python3-venv package (or virtualenv)" >&2
exit 1
