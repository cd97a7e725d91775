# make demo   the whole job on an embedded model and Banking77, on a CPU, offline once installed
# make test   the default tests
# make results  docs/results.md from results/*.json
# make lint   style, types, import directions
#
# VENV=path   another virtual environment; PYTHON=python3.12 the interpreter that makes it
# TORCH=spec  what is installed for torch when the environment has none, for example
#             TORCH="torch --index-url https://download.pytorch.org/whl/cpu" for CPU-only wheels

VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.bitdistill-installed
NATIVE := $(shell find native -type f)
SEED ?= 0

.PHONY: demo test results lint setup clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^$$/q'

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"error: Python {v[0]}.{v[1]} found, 3.11 or newer is needed; make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# torch first and alone: what the environment has already is kept, and the other packages follow it.
$(STAMP): pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/bitdistill demo --seed $(SEED)

test: $(STAMP)
	$(BIN)/python -m pytest

results: $(STAMP)
	$(BIN)/python scripts/make_results.py

lint: $(STAMP)
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py scripts/*.py
	$(BIN)/lint-imports

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
