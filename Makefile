# The same verbs for people and for CI. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# -P keeps the repository root off the import path: its `proto` and `kernels` are not packages.
RUN := $(BIN)/python -P
RUNTIME := $(VENV)/.stateferry-runtime
DEV := $(VENV)/.stateferry-dev
BENCH := $(VENV)/.stateferry-bench
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt
# Installing compiles the CPU kernels: again when they change.
NATIVE := setup.py $(wildcard kernels/stateferry_kernels/native/src/*) \
  kernels/stateferry_kernels/native/build.py
PROTOS := $(sort $(wildcard proto/stateferry/v1/*.proto))
ARGS ?=

MAKEFLAGS += --no-print-directory
# Idle OpenMP threads must sleep: with busy waits, two processes on two cores starve each other.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 10000
# Large tensors in large pages, as workers have them.
export THP_MEM_ALLOC_ENABLE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo serve test test-slow test-faults check check-native format proto docs bench bench-kernels bench-peers bench-cache bench-spec bench-transfer golden gpu-report clean

help: ## List the targets
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(RUNTIME) ## Install what serving needs into .venv

setup-dev: $(DEV) ## Install what checks and tests need as well

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "stateferry needs Python 3.11 or newer; try: make PYTHON=python3.12 setup"; exit 1; }
	@echo "setup: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python3 -m venv failed; Debian has it in python3-venv"; exit 1; }

$(RUNTIME): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@echo "setup: installing torch, the largest download"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@echo "setup: installing stateferry and the rest of what it needs, compiling its CPU kernels"
	@$(PIP) --editable .
	@touch $@

$(DEV): pyproject.toml constraints.txt $(RUNTIME)
	@echo "setup: installing tools for checks and tests"
	@$(PIP) --editable '.[dev]'
	@touch $@

$(BENCH): pyproject.toml constraints.txt $(RUNTIME)
	@echo "setup: installing what benchmarks draw with"
	@$(PIP) --editable '.[bench]'
	@touch $@

demo: $(RUNTIME) ## Three prompts through router, prefill and decode processes
	@$(RUN) -m stateferry demo $(ARGS)

serve: $(RUNTIME) ## A cluster on this machine, until Ctrl-C; ARGS="--decode 2"
	@$(RUN) -m stateferry serve $(ARGS)

test: $(DEV) ## All tests but the slow ones and those that need a GPU
	@$(RUN) -m pytest -m "not slow and not gpu" $(ARGS)

test-slow: $(DEV) ## The slow tests
	@$(RUN) -m pytest -m "slow and not gpu" $(ARGS) || [ $$? -eq 5 ]

check: $(DEV) ## Format, lint, types, layout, contracts, generated files
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(RUN) -m pytest -q tests/house

NATIVE_TESTS := $(addprefix tests/kernels/test_,tape.py one_order.py verify_order.py threads.py \
  elementwise.py against_reference.py reference_backend.py native_guards.py attention.py \
  attention_order.py rotary.py activation.py)

check-native: $(DEV) ## The CPU kernels' tests under the address and undefined-behaviour sanitizers
	@variant=$$(PYTHONPATH=kernels $(RUN) -c "from stateferry_kernels.native.library import \
	  native; print(native().variant.name)") && \
	  $(RUN) kernels/stateferry_kernels/native/build.py build/native-asan --sanitize \
	  --only $$variant
	@LD_PRELOAD=$$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(RUN) -m pytest -q -k "not torch" \
	  --native-dir build/native-asan $(NATIVE_TESTS) $(ARGS)

format: $(DEV) ## Format and fix what can be fixed
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

proto: $(DEV) ## Generate services/stateferry/v1 from proto/
	@$(RUN) -m grpc_tools.protoc -Iproto --python_out=services --pyi_out=services \
	  --grpc_python_out=services $(PROTOS)

docs: $(DEV) ## Generate docs/CONFIG.md
	@mkdir -p docs
	@$(RUN) -m stateferry.config_docs > docs/CONFIG.md

bench: ## List the benchmarks
	@grep -hE '^bench-[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20; \
	  grep -qE '^bench-[a-z-]+:' $(MAKEFILE_LIST) || echo "no benchmark yet; each is a target bench-NAME"

bench-kernels: $(BENCH) ## CPU kernels against this machine's ceilings; ARGS="--quick --vllm-python PATH"
	@PYTHONPATH=tests $(RUN) -m bench.kernels $(ARGS)

# Children of it run by themselves, each in the Python and with the waits of its own kind.
golden: $(DEV) ## Caches, cuts, preemption, company, hand-off: no bit may change; ARGS="--seed N"
	@PYTHONPATH=tests $(RUN) -m golden $(ARGS)

test-faults: $(DEV) ## Workers killed, stopped, restarted under load: no client can tell; ARGS="--seeds N --quick"
	@PYTHONPATH=tests $(RUN) -m faults $(ARGS)

bench-peers: $(DEV) ## Against transformers, vLLM, llama.cpp; ARGS="--llama DIR --vllm-python PATH"
	@PYTHONPATH=tests $(RUN) -m bench.peers $(ARGS)

bench-cache: $(BENCH) ## The prefix cache against others' policies; ARGS="--trace FILE --quick"
	@PYTHONPATH=tests $(RUN) -m bench.cache $(ARGS)

bench-spec: $(BENCH) ## Decoding with drafts against decoding without; ARGS="--model DIR --text FILE --quick"
	@PYTHONPATH=tests $(RUN) -m bench.spec $(ARGS)

bench-transfer: $(BENCH) ## The hand-off between two processes against bare ucxx, gRPC; ARGS="--quick"
	@PYTHONPATH=tests $(RUN) -m bench.transfer $(ARGS)

# A GPU host has a python with torch of its own.
GPU_PYTHON ?= python3
GPU_OUT ?= out/gpu

gpu-report: ## On a GPU host: the kernels' tests, then benchmarks; ARGS="--peers DIR --quick"
	@PYTHONPATH=kernels:services:tests$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -P -m bench.gpu \
	  --out $(GPU_OUT) $(ARGS)

clean: ## Remove caches and build output; .venv stays
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis services/*.egg-info
	@find services kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
