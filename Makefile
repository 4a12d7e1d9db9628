# make setup | train | test | exhaustive | mutants | lint | lock. All can be run again at any time; nothing is done twice.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
CONFIG ?= deploy/configs/addition.yaml
ARGS ?=
# Newest output is flushed line by line, also when it goes into a file.
export PYTHONUNBUFFERED := 1

.PHONY: help setup model train test test-fast exhaustive mutants lint format lock clean

help:
	@echo "make setup      virtual environment, locked packages, the quickstart's model"
	@echo "make train      set up, then train the quickstart (CONFIG=..., ARGS='key=value ...')"
	@echo "make test       set up, then run all tests (about half an hour)"
	@echo "make test-fast  the tests that need no engine and wait for no process (under three minutes)"
	@echo "make exhaustive what make test only samples, unless it has passed on this code"
	@echo "make mutants    put known faults into copies of the code; the fast tests must notice each"
	@echo "make lint       ruff and mypy"
	@echo "make lock       resolve requirements/cpu.in again"

setup: $(STAMP) model

$(STAMP): requirements/cpu.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; set PYTHON=... to a Python 3.11" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "error: g++ not found; DeepSpeed and vLLM compile small pieces with it" >&2; exit 1; }
	@echo "making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing the packages of requirements/cpu.lock (two to five minutes, once)"
	@$(PIP) --no-deps --no-compile -r requirements/cpu.lock
	@# What pip does itself, on all cores. Some packages carry files that no Python 3 compiles.
	@$(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@echo "installing cohort"
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $(STAMP)

model: $(STAMP)
	@$(BIN)/python deploy/models/smollm2.py

train: setup
	@$(BIN)/cohort train $(CONFIG) $(ARGS)

# Two tests at a time: starting the real stack is mostly imports, which use one core.
test: setup
	$(BIN)/pytest -n 2 $(ARGS)

test-fast: $(STAMP)
	$(BIN)/pytest -n 2 -m "not system and not slow and not exhaustive" $(ARGS)

exhaustive: setup
	$(BIN)/python -m tests.exhaustive $(ARGS)

mutants: $(STAMP)
	$(BIN)/python -m tests.mutants $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	$(PYTHON) requirements/lock.py

clean:
	rm -rf $(VENV) runs
