# One line a target in `make help`. Every target makes the environment it needs under .venvs/;
# a second run finds it there. Name another Python with `make PYTHON=python3.12 ...`.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
ifeq ($(strip $(PYTHON)),)
$(error Python 3.11 or newer is needed and none is on the PATH)
endif

ENVIRONMENT = $(PYTHON) tools/environment.py
VLLM = .venvs/vllm/bin
VLLM_LOWEST = .venvs/vllm-0.31/bin
LINT = .venvs/lint/bin
# Further words for pytest: make test-vllm PYTEST='-k spec -x'
PYTEST ?=
# What `make bench` measures: make bench BENCH='--model small --set quick'
BENCH ?= --model 8b-cut

.DEFAULT_GOAL := help
.PHONY: help demo doctor test test-all test-core test-engines test-vllm test-vllm-lowest lint format bench memory tree \
	env env-lowest env-lint wheel clean

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: env ## serve the demo model with vLLM, ask it two questions, stop
	$(VLLM)/lfm2 demo

doctor: env ## which class vLLM resolves, kernels, self-checks
	$(VLLM)/lfm2 doctor

test: test-core test-engines ## everything: core, vLLM suite, suite on the lowest vLLM

# Side by side: each suite keeps one core busy for most of its time.
test-engines: env env-lowest ## the vLLM suite on the newest and on the lowest supported release
	$(MAKE) --jobs=2 --output-sync=line test-vllm test-vllm-lowest

test-all: test ## the same, and the slow tests on the lowest vLLM too
	$(VLLM_LOWEST)/python -m pytest tests/engine_vllm -m slow $(PYTEST)

test-core: env ## everything that needs no engine (about a minute)
	$(VLLM)/python -m pytest tests/core $(PYTEST)

test-vllm: env ## real vLLM engines, newest supported release
	$(VLLM)/python -m pytest tests/engine_vllm $(PYTEST)

test-vllm-lowest: env-lowest ## real vLLM engines, lowest supported release, without the slow tests
	$(VLLM_LOWEST)/python -m pytest tests/engine_vllm -m 'not slow' $(PYTEST)

lint: env-lint ## ruff (rules and format) and mypy
	$(LINT)/ruff check .
	$(LINT)/ruff format --check .
	$(LINT)/mypy

format: env-lint ## what ruff can repair by itself
	$(LINT)/ruff check --fix .
	$(LINT)/ruff format .

bench: env ## ours against the built-in model, same flags, in turn
	$(VLLM)/python -m benchmarks.compare $(BENCH)

memory: env ## the table of cache memory, from vLLM's own planner
	$(VLLM)/python -m benchmarks.memory --write

tree: ## the file tree in README.md, from the files' docstrings
	$(PYTHON) tools/file_tree.py

wheel: env ## the wheel, in dist/
	$(VLLM)/python -m build --wheel --outdir dist .

env:
	@$(ENVIRONMENT) vllm

env-lowest:
	@$(ENVIRONMENT) vllm-0.31

env-lint:
	@$(ENVIRONMENT) lint

clean: ## remove build products (not the environments)
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache
