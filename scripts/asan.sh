#!/usr/bin/env bash
# The suite on a build with AddressSanitizer and UndefinedBehaviorSanitizer. It runs in a copy of the tree under
# build/asan, so that the normal extension stays where it is. Leaks are not looked for: Python itself holds memory at exit.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(cd "${VENV:-.venv}" && pwd)
tree=build/asan/tree
compiler=${CXX:-c++}

rm -rf "$tree"
mkdir -p "$tree"
tar -cf - --exclude=./build --exclude=./.git --exclude=./.venv --exclude=./demo-model --exclude='./.*_cache' --exclude='*.so' \
  --exclude=__pycache__ . | tar -xf - -C "$tree"

# Sources are the originals, so that ninja's timestamps hold from one run to the next; only the module is put in the copy.
objects=$(pwd)/build/asan/objects
PYLLAMA_BUILD_DIR=$objects PYLLAMA_SANITIZE=1 PYLLAMA_WERROR=1 "$venv/bin/python" setup.py --quiet build_ext --build-lib build/asan/lib --build-temp build/asan/temp
cp build/asan/lib/pyllama/_C.*.so "$tree/pyllama/"

cd "$tree"
preload="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so) $("$compiler" -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:${ASAN_OPTIONS:-}
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:${UBSAN_OPTIONS:-}
export PYLLAMA_BUILD_DIR=$objects
export CXX="$compiler -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"  # tests/cuda compiles its kernels
LD_PRELOAD="$preload" PYTHONPATH=. "$venv/bin/python" - <<'PY'
import pathlib
import pyllama._C as extension
here = pathlib.Path.cwd()
assert pathlib.Path(extension.__file__).is_relative_to(here), f"the sanitized module is not the one imported: {extension.__file__}"
PY
LD_PRELOAD="$preload" exec "$venv/bin/python" -m pytest -p no:cacheprovider --ignore=tests/test_objects.py --ignore=tests/test_build.py \
  --ignore=tests/cuda/test_defects.py -m "not many_blocks" "$@"
