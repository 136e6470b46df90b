#!/usr/bin/env bash
# A user's view of the package: builds the source distribution, from that a wheel, installs the wheel in a fresh virtual
# environment and runs it outside this tree. Fails when a file was forgotten in MANIFEST.in or in the package data.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(cd "${VENV:-.venv}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$venv/bin/python" -m pip --disable-pip-version-check -qq install build
"$venv/bin/python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { tail -50 "$work/build.log" >&2; exit 1; }
ls -l "$work/dist"
scripts/make_venv.sh "$work/venv"
cd "$work"
venv/bin/python -m pip --disable-pip-version-check -qq install dist/*.whl
venv/bin/python - "$work" <<'PY'
import importlib.resources, pathlib, sys
import pyllama
import pyllama._C as extension
work = pathlib.Path(sys.argv[1]).resolve()
assert pathlib.Path(pyllama.__file__).resolve().is_relative_to(work), pyllama.__file__
files = {p.name for p in importlib.resources.files(pyllama).iterdir()}
missing = {"py.typed", "_C.pyi"} - files
assert not missing, f"the wheel lacks {missing}"
assert importlib.resources.files("quantize").joinpath("data/calibration.txt").is_file(), "the wheel lacks calibration.txt"
print("pyllama", pyllama.__version__, extension.build_info(), extension.isas())
PY
venv/bin/quantize --help >/dev/null
venv/bin/pyllama --help >/dev/null
venv/bin/pyllama doctor
echo "dist-check: the wheel built from the source distribution installs and runs"
