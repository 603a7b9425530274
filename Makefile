# Everything here is safe to run twice, and the second time is fast.
.DEFAULT_GOAL := help
.PHONY: help setup slurm ops demo test lint bench faults lock clean
SHELL := bash
VENV := .venv
PYTHON := $(VENV)/bin/python
SLURM := slurmctld slurmd slurm-client munge
OPS := g++ libaio-dev
STAMP := $(VENV)/.made

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(STAMP) ## make .venv from requirements.lock (installs uv if it is missing)

$(STAMP): requirements.lock pyproject.toml
	@echo "== setup: making $(VENV) from requirements.lock"
	@command -v uv >/dev/null || python3 -m pip install --quiet uv || python3 -m pip install --quiet --user --break-system-packages uv
	@export PATH="$$HOME/.local/bin:$$PATH"; set -e; \
	  [ -x $(PYTHON) ] || uv venv --quiet --python '>=3.11' $(VENV); \
	  uv pip sync --quiet --compile-bytecode --python $(VENV) --require-hashes requirements.lock; \
	  uv pip install --quiet --python $(VENV) --no-deps --editable .
	@touch $@

# Debian's packages $(1), for target $@, unless $$missing is empty.
define install
[ -z "$$missing" ] || { \
  echo "== $@: installing $(1)"; \
  sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
  export DEBIAN_FRONTEND=noninteractive; \
  { $$sudo apt-get install -y -qq --no-install-recommends $(1) || { \
    $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends $(1); }; } >/dev/null; }
endef

slurm: ## install Slurm, for the one-machine cluster, if it is missing (Debian, Ubuntu; as root or with sudo)
	@export PATH="$$PATH:/usr/local/sbin:/usr/sbin"; \
	for program in slurmctld slurmd sbatch munged; do command -v $$program >/dev/null || missing=1; done; \
	$(call install,$(SLURM))

ops: ## install what DeepSpeed's ops for NVMe and CPUs are compiled with, if it is missing (the same)
	@command -v c++ >/dev/null && [ -e /usr/include/libaio.h ] || missing=1; \
	$(call install,$(OPS))

demo: setup ## train the digits as a job of four nodes on a Slurm cluster that it brings up on this machine
	@if $(MAKE) --no-print-directory slurm; then \
	  echo "== demo: slurm/cluster.py run -- launch/slurm.py --nodes 4 --follow"; \
	  $(PYTHON) slurm/cluster.py run --nodes 4 -- $(PYTHON) launch/slurm.py --nodes 4 --profile one-machine --follow; \
	else \
	  echo "== demo: Slurm cannot be installed here, so launch/local.py --nodes 4 instead"; \
	  $(PYTHON) launch/local.py --nodes 4; \
	fi

test: setup lint ## pass the tests
	@echo "== test: pytest"
	$(PYTHON) -m pytest

lint: setup ## ruff and mypy
	@echo "== lint: ruff, mypy"
	@$(VENV)/bin/ruff check --quiet . && $(VENV)/bin/ruff format --quiet --check . && $(VENV)/bin/mypy --no-error-summary

bench: setup ## measure a step, a save, and a submission against what they are compared with in the README
	$(PYTHON) benchmarks/step.py
	$(PYTHON) benchmarks/checkpoint.py
	$(PYTHON) slurm/cluster.py run -- $(PYTHON) benchmarks/launch.py

faults: setup slurm ## kill, stop and take away what a job on a one-machine Slurm cluster needs, and print what that cost
	$(PYTHON) benchmarks/faults.py

lock: ## pin what pyproject.toml asks for
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --extra dev pyproject.toml -o requirements.lock

clean: ## remove .venv and caches; runs/ and data/ stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build src/*.egg-info
