# One line a target in `make help`. Every target makes the environment it needs under .venvs/;
# a second run finds it there. Name another Python with `make PYTHON=python3.12 ...`.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
ifeq ($(strip $(PYTHON)),)
$(error Python 3.11 or newer is needed and none is on the PATH)
endif

ENVIRONMENT = $(PYTHON) tools/environment.py
VLLM = .venvs/vllm/bin
VLLM_NEWEST = .venvs/vllm-0.33/bin
SGLANG = .venvs/sglang/bin
SGLANG_LOWEST = .venvs/sglang-0.5.22/bin
COMPRESSOR = .venvs/llm-compressor/bin
LINT = .venvs/lint/bin
# Further words for pytest: make test-vllm PYTEST='-k spec -x'
PYTEST ?=
# Every kind of claim once; the whole matrix with `make test-vllm TIER=`, as in `make test-all`
TIER ?= -m 'not matrix'
# What `make bench` measures: make bench BENCH='--model small --set quick'; make bench-sglang measures the same
BENCH ?= --model 8b-cut

# What of it `make test-install` tries: make test-install INSTALL="--only uv"
INSTALL ?=

.DEFAULT_GOAL := help
.PHONY: help demo demo-sglang doctor doctor-sglang test test-all test-core test-kernels test-vllm test-vllm-newest \
	test-sglang test-sglang-lowest test-install references quantised-checkpoints lint format bench bench-sglang memory \
	tree env env-newest env-sglang env-sglang-lowest env-compressor env-lint wheel clean

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'

demo: env ## serve the demo model with vLLM, ask it two questions, stop
	$(VLLM)/lfm2 demo

demo-sglang: env-sglang ## the same with SGLang
	$(SGLANG)/lfm2 demo

doctor: env ## which class vLLM resolves, kernels, self-checks
	$(VLLM)/lfm2 doctor

doctor-sglang: env-sglang ## the same for SGLang
	$(SGLANG)/lfm2 doctor

# Two suites at a time, the longest first: each keeps one core busy for most of its time. A suite makes its environment
# itself, since after a prerequisite make would go on with whichever suite comes next.
SUITES = $(MAKE) --jobs=2 --keep-going --output-sync=line

test: ## every kind of claim once: core, kernels, both engines (20 minutes on two cores)
	$(SUITES) test-sglang test-vllm test-kernels test-core

test-all: ## the whole matrix, on the lowest and the newest release of both engines (70 minutes)
	$(SUITES) TIER= test-vllm test-vllm-newest test-sglang test-sglang-lowest test-kernels test-core

test-core: ## everything that needs no engine (about a minute)
	@$(ENVIRONMENT) vllm
	$(VLLM)/python -m pytest tests/core $(TIER) $(PYTEST)

test-kernels: ## kernels for GPUs in Triton's interpreter, and what they compile to
	@$(ENVIRONMENT) vllm
	$(VLLM)/python -m pytest tests/kernels $(TIER) $(PYTEST)

test-vllm: ## real vLLM engines, newest release with a CPU build
	@$(ENVIRONMENT) vllm
	$(VLLM)/python -m pytest tests/engine_vllm $(TIER) $(PYTEST)

test-vllm-newest: ## the newest release's Python over that build (tools/overlay.py)
	@$(ENVIRONMENT) vllm-0.33
	$(VLLM_NEWEST)/python -m pytest tests/engine_vllm $(TIER) $(PYTEST)

test-sglang: ## real SGLang engines, newest supported release
	@$(ENVIRONMENT) sglang
	$(SGLANG)/python -m pytest tests/engine_sglang $(TIER) $(PYTEST)

test-sglang-lowest: ## real SGLang engines, lowest supported release
	@$(ENVIRONMENT) sglang-0.5.22
	$(SGLANG_LOWEST)/python -m pytest tests/engine_sglang $(TIER) $(PYTEST)

references: ## what transformers answers to the prompts of `make test`, computed anew and kept for the next run
	rm -rf tests/engine_common/kept_references
	LFM2_TEST_KEEP_REFERENCES=1 $(MAKE) test
	rm -f tests/engine_common/kept_references/*.lock

quantised-checkpoints: env-compressor ## the demo model quantised by llm-compressor, in .cache/quantised (a minute)
	$(COMPRESSOR)/python examples/quantise_demo_model.py .cache/quantised

lint: env-lint ## ruff (rules and format) and mypy
	$(LINT)/ruff check .
	$(LINT)/ruff format --check .
	$(LINT)/mypy

format: env-lint ## what ruff can repair by itself
	$(LINT)/ruff check --fix .
	$(LINT)/ruff format .

bench: env ## ours against the built-in model, same flags, in turn
	$(VLLM)/python -m benchmarks.compare $(BENCH)

bench-sglang: env-sglang ## ours against stock SGLang with only what a CPU needs to run it
	$(SGLANG)/python -m benchmarks.compare --engine sglang $(BENCH)

memory: env env-sglang ## the tables of cache memory, from the engines' own planners
	$(VLLM)/python -m benchmarks.memory --write
	$(SGLANG)/python -m benchmarks.sglang_memory --write

tree: ## the file tree in README.md, from the files' docstrings
	$(PYTHON) tools/file_tree.py

test-install: ## every install line of README.md in fresh environments (half an hour)
	$(PYTHON) tools/test_install.py $(INSTALL)

wheel: env ## the wheel, in dist/
	$(VLLM)/python -m build --wheel --outdir dist .

env:
	@$(ENVIRONMENT) vllm

env-newest:
	@$(ENVIRONMENT) vllm-0.33

env-sglang:
	@$(ENVIRONMENT) sglang

env-sglang-lowest:
	@$(ENVIRONMENT) sglang-0.5.22

env-compressor:
	@$(ENVIRONMENT) llm-compressor

env-lint:
	@$(ENVIRONMENT) lint

clean: ## remove build products (not the environments)
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache
