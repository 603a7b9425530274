# Everything here is safe to run twice, and the second time is fast.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench lock clean
SHELL := bash
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.made

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(STAMP) ## make .venv from requirements.lock (installs uv if it is missing)

$(STAMP): requirements.lock pyproject.toml
	@echo "== setup: making $(VENV) from requirements.lock"
	@command -v uv >/dev/null || python3 -m pip install --quiet uv || python3 -m pip install --quiet --user --break-system-packages uv
	@export PATH="$$HOME/.local/bin:$$PATH"; set -e; \
	  [ -x $(PYTHON) ] || uv venv --quiet --python '>=3.11' $(VENV); \
	  uv pip sync --quiet --python $(VENV) --require-hashes requirements.lock; \
	  uv pip install --quiet --python $(VENV) --no-deps --editable .
	@touch $@

demo: setup ## train the digits on two pretend nodes of two ranks
	@echo "== demo: launch/local.py --nodes 2 --ranks 2"
	$(PYTHON) launch/local.py --nodes 2 --ranks 2

test: setup lint ## pass the tests
	@echo "== test: pytest"
	$(PYTHON) -m pytest

lint: setup ## ruff and mypy
	@echo "== lint: ruff, mypy"
	@$(VENV)/bin/ruff check --quiet . && $(VENV)/bin/ruff format --quiet --check . && $(VENV)/bin/mypy --no-error-summary

bench: setup ## measure against stock lightning and a hand-written loop
	$(PYTHON) benchmarks/step.py

lock: ## pin what pyproject.toml asks for
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --extra dev pyproject.toml -o requirements.lock

clean: ## remove .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build src/*.egg-info
