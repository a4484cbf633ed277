# `make compare` and `make test` set up .venv on their own; they need Python >= 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2
TASK ?= cartpole-balance

.DEFAULT_GOAL := help
.PHONY: bench clean compare experiment format help lint setup test test-all tests types

compare: $(VENV)/installed  ## compare first- and second-order methods on one task: TASK=cartpole-balance
	$(BIN)/diffmbrl compare $(TASK) $(ARGS)

test: lint types tests  ## lint, types and tests: ten minutes on two cores

test-all: SELECT :=
test-all: lint types tests  ## the same with the slow tests: an hour

# One worker for all tests of a file, for what one test has compiled, the others use. Files in their order: docstrings,
# of a second each, come last, so that no worker waits for another.
SELECT := -m "not slow"
tests: $(VENV)/installed-dev  ## the tests alone; ARGS goes to pytest
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(SELECT) $(ARGS)

lint: $(VENV)/installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev  ## let ruff repair what it can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev  ## every benchmark; BENCH=primitives for one
	$(BIN)/python -m benchmarks $(BENCH)

experiment: $(VENV)/installed  ## one question, one figure: NAME=conditioning, ARGS=--quick
	$(BIN)/python -m experiments $(or $(NAME),--help) $(ARGS)

setup: $(VENV)/installed-dev  ## .venv with everything a developer needs

clean:  ## remove .venv, caches and builds; runs stay
	rm -rf $(VENV) .cache .hypothesis .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Stamps, so that an installation is redone only when what it depends on has changed.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "diffmbrl needs Python >= 3.11; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/created pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/installed
