# Every target can be repeated, and is fast if there is nothing to do.
.DEFAULT_GOAL := help
.PHONY: help setup slurm ops demo test test-slurm gpu gpu-wheels lint readme docs pages pictures bench faults lock clean
SHELL := bash
VENV := .venv
PYTHON := $(VENV)/bin/python
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
ACCOUNTING_PACKAGES := slurmdbd mariadb-server-core
OPS := g++ libaio-dev
STAMP := $(VENV)/.made

help: ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP) ## create .venv from requirements.lock (installs uv if missing)

$(STAMP): requirements.lock pyproject.toml
	@echo "== setup: creating $(VENV) from requirements.lock"
	@command -v uv >/dev/null || python3 -m pip install --quiet uv 2>/dev/null || python3 -m pip install --quiet --user --break-system-packages uv
	@export PATH="$$HOME/.local/bin:$$PATH"; set -e; \
	  [ -x $(PYTHON) ] || uv venv --quiet --python '>=3.11' $(VENV); \
	  uv pip sync --quiet --compile-bytecode --python $(VENV) --require-hashes requirements.lock; \
	  uv pip install --quiet --python $(VENV) --no-deps --editable .
	@touch $@

# Install the Debian packages $(1) for target $@ if $$missing is set.
define install
[ -z "$$missing" ] || { \
  echo "== $@: installing $(1)"; \
  sudo=; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
  export DEBIAN_FRONTEND=noninteractive; \
  { $$sudo apt-get install -y -qq --no-install-recommends $(1) || { \
    $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends $(1); }; } >/dev/null; }
endef

slurm: ## install Slurm and its accounting for the one-machine cluster, if missing (Debian, Ubuntu; as root or with sudo)
	@export PATH="$$PATH:/usr/local/sbin:/usr/sbin"; \
	for program in slurmctld slurmd sbatch munged slurmdbd mariadbd; do command -v $$program >/dev/null || missing=1; done; \
	$(call install,$(SLURM_PACKAGES) $(ACCOUNTING_PACKAGES))

ops: ## install the compiler and library of DeepSpeed's CPU and NVMe ops, if missing (likewise)
	@command -v c++ >/dev/null && [ -e /usr/include/libaio.h ] || missing=1; \
	$(call install,$(OPS))

demo: setup ## train on digits as a Slurm job of four nodes, on a cluster started on this machine
	@if $(MAKE) --no-print-directory slurm; then \
	  echo "== demo: slurm/cluster.py run -- launch/slurm.py --nodes 4 --follow"; \
	  $(PYTHON) slurm/cluster.py run --nodes 4 -- $(PYTHON) launch/slurm.py --nodes 4 --profile one-machine --follow; \
	else \
	  echo "== demo: Slurm cannot be installed here; running launch/local.py --nodes 4 instead"; \
	  $(PYTHON) launch/local.py --nodes 4; \
	fi

test: setup lint ## run ruff, mypy and all tests
	@echo "== test: pytest"
	$(PYTHON) -m pytest

TESTS := tests/slurm
# Tests of what may differ between versions of Slurm: submit, place ranks, kill, lose nodes, requeue, preempt, cancel, wait.
SMOKE := tests/slurm -k "supervision or (chain and not digits) or give_the_same or ranks_are_placed or killed_rank or cancelled_and_lost"
ifdef SLURM
test-slurm: ## run the tests that need Slurm, or TESTS (smoke: a few); with SLURM=24.11 on that version, in a chroot of its Debian release
	slurm/debian.sh $(SLURM) make test-slurm TESTS='$(TESTS)'
else
test-slurm: setup slurm ops
	LOCKSTEP_REQUIRE_SLURM=1 $(PYTHON) -m pytest $(if $(filter smoke,$(TESTS)),$(SMOKE),$(TESTS))
endif

WHEELS :=
gpu: ## run tests and benchmarks that need a GPU, and write build/gpu.md; WHEELS=folder installs from there; without a GPU, list them
	@WHEELS="$(WHEELS)" tests/gpu/run.sh $(if $(ROWS),--rows $(ROWS))

gpu-wheels: ## download the dependencies into the folder WHEELS, for make gpu on a machine without a network
	@[ -n "$(WHEELS)" ] || { echo "gpu-wheels: name a folder: make gpu-wheels WHEELS=/path/to/wheels" >&2; exit 2; }
	@tests/gpu/wheels.sh "$(WHEELS)"

lint: setup ## run ruff and mypy
	@echo "== lint: ruff, mypy"
	@$(VENV)/bin/ruff check --quiet . && $(VENV)/bin/ruff format --quiet --check . && $(VENV)/bin/mypy --no-error-summary

bench: setup slurm ## benchmark a training step, image loading, a checkpoint, a submission, and what grows with samples and files
	$(PYTHON) benchmarks/step.py
	$(PYTHON) benchmarks/input.py
	$(PYTHON) benchmarks/checkpoint.py
	$(PYTHON) benchmarks/growth.py
	$(PYTHON) benchmarks/growth_checkpoint.py
	$(PYTHON) slurm/cluster.py run -- $(PYTHON) benchmarks/launch.py

faults: setup slurm ## inject faults into jobs on a one-machine Slurm cluster, and print the lost steps and time
	$(PYTHON) benchmarks/faults.py $(if $(ROWS),--rows $(ROWS))

pages: setup ## generate docs/configuration.md and docs/covered.md
	PYTHONPATH=tests $(PYTHON) -m pages.configuration
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(PYTHON) -m foreign.page

pictures: setup ## draw the pictures of README from a run
	PYTHONPATH=tests $(PYTHON) -m pages.pictures

docs: setup ## build docs/ as a site in build/docs; a broken link is an error
	@echo "== docs: build/docs/index.html"
	@export PATH="$$HOME/.local/bin:$$PATH"; uv run --quiet --no-project --isolated --with-requirements docs/requirements.lock \
	  sphinx-build --quiet --fail-on-warning --keep-going docs build/docs

readme: setup slurm ## run every command of README in an empty folder, with the wheel in a new environment
	@echo "== readme"
	@PATH="$$PATH:$$HOME/.local/bin" PYTHONPATH=tests $(PYTHON) -m pages.readme

lock: ## pin the dependencies of pyproject.toml in requirements.lock and docs/requirements.lock
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --extra dev pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --group docs -o docs/requirements.lock

clean: ## remove .venv and caches, but neither runs/ nor data/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build src/*.egg-info
