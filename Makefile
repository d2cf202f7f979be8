# Two commands from a bare clone: `make demo` and `make test`. Both install what they need into .venv/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable
INPUTS := pyproject.toml constraints.txt
# Tests that only compute: they run behind those that start workers and wait for them.
COMPUTING := tests/kernels tests/language_worker tests/helm tests/examples

.DEFAULT_GOAL := help
.PHONY: help demo test test-computing test-serving soak lint bench clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.runtime ## start a local cluster on the shipped model and ask it about the shipped images
	$(BIN)/tandem demo

test: $(VENV)/.development ## lint, types and the whole test suite
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync test-serving test-computing

test-computing: $(VENV)/.development
	$(BIN)/python -m tests.behind $(BIN)/python -m pytest --durations 15 $(COMPUTING)

test-serving: $(VENV)/.development
	$(BIN)/python -m pytest --durations 15 $(COMPUTING:%=--ignore %)

soak: $(VENV)/.development ## the suite with its full counts (long)
	TANDEM_TEST_PROFILE=soak $(BIN)/python -m pytest --timeout 7200 -o faulthandler_timeout=7000

lint: $(VENV)/.development ## format and repair what can be repaired
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

bench: $(VENV)/.development ## the CPU benchmarks; JSON goes to benchmarks/results/
	$(BIN)/python -m benchmarks.bench_transfer --json benchmarks/results/transfer.json
	$(BIN)/python -m benchmarks.bench_serving --json benchmarks/results/serving.json
	$(BIN)/python -m benchmarks.bench_decode --json benchmarks/results/decode.json

clean: ## remove the virtual environment, fetched tools and caches
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(INPUTS) | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.development: $(INPUTS) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.runtime
