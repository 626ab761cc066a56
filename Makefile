# Everything a newcomer needs: `make quickstart` and `make test`. Both install into .venv first if needed.
SHELL := /bin/bash
PYTHON ?= python3
TORCH_VERSION := 2.13.0
# Set to the URL of a package index to take torch from there, for example one with CPU-only builds.
TORCH_INDEX ?=
BIN := .venv/bin
STAMP := .venv/installed
# The parts of the test suite, of which JOBS run at a time, the longest first; `others` is what has no part of its own.
JOBS ?= 2
PARTS := $(addprefix tests-,others contract unit slurm resume distributed serve)
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1 && echo yes)
# DeepSpeed compiles nothing at installation; without a GPU it is told so, which also silences its search for one.
DEEPSPEED_ENV := DS_BUILD_OPS=0 $(if $(HAS_GPU),,DS_ACCELERATOR=cpu)

.PHONY: help install quickstart serve-demo test lint types unit combinations reliability test-slow docs clean $(PARTS)
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

quickstart: install ## train, interrupt, resume, evaluate and sample a small model on real text (minutes)
	@$(DEEPSPEED_ENV) $(BIN)/megamor quickstart

serve-demo: quickstart ## serve the quickstart's model on port 8000
	@echo
	@echo "in another terminal:"
	@echo "  curl localhost:8000/v1/completions -d '{\"prompt\": \"def main():\", \"max_tokens\": 48, \"temperature\": 0.5}'"
	@echo "  and http://localhost:8000 shows the engine at work; for a load on it: megamor bench load --url http://localhost:8000"
	@echo
	@$(BIN)/megamor serve --checkpoint runs/quickstart/checkpoints/latest

test: install lint ## lint, types and the test suite without its slow cases
	@$(MAKE) --no-print-directory --keep-going -j$(JOBS) types $(PARTS)

lint: install ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## mypy
	$(BIN)/mypy

unit: install ## the test suite without its slow cases
	@$(MAKE) --no-print-directory --keep-going -j$(JOBS) $(PARTS)

$(PARTS): tests-%: install
	@log=$$(mktemp); trap 'cat $$log; rm $$log' EXIT; echo "testing: $*"; $(DEEPSPEED_ENV) OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest $(or $(wildcard tests/$*),$(PARTS:tests-%=--ignore=tests/%)) >$$log 2>&1

combinations: install ## run the tests of all combinations and write docs/combinations.md from their outcomes
	$(BIN)/python -m pytest -q -m '' tests/causality tests/decoding tests/learning tests/unit/test_model.py \
	    --combinations docs/combinations.md

reliability: install ## run the tests of every promise and update docs/reliability.md from their outcomes
	$(DEEPSPEED_ENV) $(BIN)/python -m pytest -q -m promise --reliability=benchmarks/results/reliability.json; \
	    status=$$?; $(BIN)/python -m megamor.bench.tables --write && exit $$status

docs: install ## build the documentation site; a warning is an error
	$(BIN)/zensical build --strict --clean

test-slow: install ## the slow cases alone
	$(DEEPSPEED_ENV) $(BIN)/python -m pytest -m slow

install: $(STAMP) ## create .venv and install everything into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "megamor needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
	    { rm -rf .venv; echo "$(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "installing into .venv (some minutes, once) ..."
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(TORCH_VERSION)
	@$(if $(HAS_GPU),$(BIN)/python -c 'from megamor.devices import count_gpus; from megamor.errors import user_errors; user_errors()(count_gpus)()',:)
	$(DEEPSPEED_ENV) $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean: ## remove the virtual environment, caches and the quickstart's results
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis runs/quickstart
