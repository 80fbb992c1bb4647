# The two commands of this project, on a machine with Python 3.11 or 3.12 and a C compiler:
#   make bench   a quick benchmark against torch.nn, with its table and plot
#   make test    lint, format check and all tests
# Both set up $(VENV) first. PYTHON=... chooses the interpreter, VENV=... the folder, TORCH=... torch's requirement.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

# Where there is no GPU: the release whose CPU build the index may offer; a newer one can be CUDA only.
HAS_GPU = nvidia-smi -L >/dev/null 2>&1
TORCH ?= $(shell if $(HAS_GPU); then echo 'torch>=2.11'; else echo 'torch==2.13.0'; fi)

CXX_SOURCES = $(shell find csrc bench -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

# The GPU's tests and benchmark take the Python that is there, with its torch and Triton; they need nothing installed.
GPU_PYTHON ?= $(shell command -v python3 || echo python)
OUT ?= bench/out/gpu
FLASHRNN_SECONDS ?= 60
FLASHRNN_WORKLOADS ?= flashrnn-768 neural-hydrology sample-factory

NEEDS_GPU = $(GPU_PYTHON) -c \
	'import torch; assert torch.cuda.is_available(), "torch finds no GPU"; print(torch.cuda.get_device_name())'
BUILD_FOR_THIS_GPU = \
	FASTRNN_CUDA_ARCHS="$${FASTRNN_CUDA_ARCHS:-$$($(GPU_PYTHON) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}" \
	    $(GPU_PYTHON) setup.py -q build_ext --inplace

.PHONY: help venv bench test test-compiling test-others mutate gpu sanitize lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## Create the virtual environment; install fastrnn, editable, with its test, bench and examples extras

bench: $(STAMP) ## Quick benchmark against torch.nn: a table and a plot
	$(BIN)/python -m bench --quick

# Tests of numbers run on all cores, and with them what is timed, for it runs beside nothing else. The others are two
# processes with one thread each, for two that both use every core wait for each other; the first has most of what compiles.
NUMBERS = $(addprefix tests/test_, differential.py matrix.py properties.py)
COMPILING = $(addprefix tests/test_, cache.py combinations.py cuda_build.py cuda_host.py options.py \
	options_and_lengths.py triton_compile.py)
TIMED = tests/test_cache.py::test_first_call_is_quick \
	tests/test_packaging.py::test_importing_is_quick_and_takes_neither_numba_nor_triton

test: $(STAMP) lint ## Lint, format check and all tests
	$(BIN)/python -m pytest $(TIMED) $(NUMBERS)
	OMP_NUM_THREADS=1 MAX_JOBS=1 $(MAKE) --no-print-directory -j2 -Otarget test-compiling test-others

test-compiling: $(STAMP)
	$(BIN)/python -m pytest $(TIMED:%=--deselect=%) $(COMPILING)

test-others: $(STAMP)
	$(BIN)/python -m pytest $(TIMED:%=--deselect=%) $(patsubst %,--ignore=%,$(NUMBERS) $(COMPILING))

mutate: $(STAMP) ## Drop every barrier and flag of the CUDA kernels in turn, and list those that no test notices
	PYTHONPATH=.:tests $(BIN)/python tests/mutate.py

# The benchmark runs even if a test fails, and checks its own results; make then fails at the end. The limits add up to
# less than nine minutes. FlashRNN compiles its kernels when they are first called, for minutes, and keeps them: what does
# not fit into its time fits into that of a later run, or FLASHRNN_SECONDS=3600 gives it more.
gpu: ## On a machine with a GPU: build, GPU tests, benchmark against cuDNN and FlashRNN; CSV and summary in $$OUT
	mkdir -p $(OUT)
	$(NEEDS_GPU)
	$(GPU_PYTHON) -c 'import pytest' || { echo 'the GPU tests need pytest: $(GPU_PYTHON) -m pip install pytest' >&2; exit 1; }
	$(BUILD_FOR_THIS_GPU)
	status=0; \
	timeout 200 $(GPU_PYTHON) -m pytest -q --maxfail 10 tests/test_gpu.py 2>&1 | tee $(OUT)/tests.txt || status=1; \
	for backend in cuda triton; do \
	    timeout 125 $(GPU_PYTHON) -m bench --device cuda --dtype bfloat16 --backend $$backend --seconds 1 --stop-after 100 \
	        --output $(OUT)/results.csv --plot $(OUT)/$$backend.png 2>&1 | tee $(OUT)/$$backend.txt || status=1; \
	done; \
	if $(GPU_PYTHON) -c 'import flashrnn' >/dev/null 2>&1; then \
	    timeout $(FLASHRNN_SECONDS) $(GPU_PYTHON) -m bench --device cuda --dtype bfloat16 --backend flashrnn --seconds 1 \
	        $(FLASHRNN_WORKLOADS:%=--workload %) --output $(OUT)/results.csv --plot $(OUT)/flashrnn.png \
	        2>&1 | tee $(OUT)/flashrnn.txt || echo 'FlashRNN: not all of it ran'; \
	fi; \
	exit $$status

# Only fastrnn's kernels are checked. torch keeps no memory back, so that what lies past a tensor's end is no other's.
# racecheck knows shared memory alone: nothing here checks the exchange between blocks.
SANITIZER = timeout 600 compute-sanitizer --error-exitcode 1 --kernel-regex kns=entry

sanitize: ## On a machine with a GPU: build; memcheck and racecheck of the CUDA kernels on tiny layers; reports in $$OUT
	mkdir -p $(OUT)
	$(NEEDS_GPU)
	command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer of CUDA is not on the path' >&2; exit 1; }
	$(BUILD_FOR_THIS_GPU)
	status=0; \
	for tool in memcheck racecheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool $(GPU_PYTHON) -m pytest -q tests/test_gpu.py \
	        -k TestTiny 2>&1 | tee $(OUT)/$$tool.txt || status=1; \
	done; \
	exit $$status

lint: $(STAMP) ## Check with ruff, and clang-format where there are C++ sources
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES))

format: $(STAMP) ## Reformat the sources
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

clean: ## Remove build products and caches; the virtual environment and the benchmark results stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks bench/out
	find . -path './.venv*' -prune -o -path ./.git -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

# The CUDA kernels are not built here: where there is a GPU `make gpu` does it, and tests build them for themselves.
# torch comes first, and the install is not isolated: a build environment of its own would fetch torch again,
# and a later package's range would choose another build of it.
$(STAMP): pyproject.toml setup.py
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    python='$(PYTHON)'; \
	    if [ -z "$$python" ]; then \
	        for candidate in python3.11 python3.12 python3; do \
	            if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' \
	                >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	        done; \
	    fi; \
	    if [ -z "$$python" ]; then \
	        echo 'fastrnn needs Python 3.11 or 3.12 with its venv and ensurepip modules (Debian: python3-venv);' >&2; \
	        echo 'none of python3.11, python3.12, python3 is one. Name an interpreter: make PYTHON=/path/to/python' >&2; \
	        exit 1; \
	    fi; \
	    echo "$$python -m venv $(VENV)"; \
	    "$$python" -m venv $(VENV); \
	fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || ( set -x; $(PIP) install '$(TORCH)' )
	$(PIP) install 'setuptools>=77.0.3' 'ninja>=1.11' 'pybind11>=2.13'
	FASTRNN_BUILD_CUDA=0 $(PIP) install --no-build-isolation --editable '.[test,bench,examples]'
	@touch $@
