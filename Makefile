# make demo · make test · make lint · make test-slow · make test-hf · make clean     Each sets up .venv by itself.

VENV := .venv
BIN := $(VENV)/bin
# Fails for a Python that we do not support or that cannot make environments.
SUITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
# The first of these that suits. Override: make demo PYTHON=/path/to/python3.12
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUITS)' 2>/dev/null && echo $$p && break; done)
FOUND = $(shell $(or $(PYTHON),python3) --version 2>&1 | head -n 1)

.PHONY: demo test test-slow test-hf test-cluster bench lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       train a sweep of language models on real text and plot its scaling law (minutes on 2 cores)"
	@echo "make test       the tests (minutes);  make test-slow: reproductions and endurance tests"
	@echo "make test-hf    parity with the transformers package (installs torch)"
	@echo "make test-cluster   sweeps on a real Slurm and a real Ray, both started on this machine (as root on Debian)"
	@echo "make bench      the benchmarks on this CPU, and their table (installs torch)"
	@echo "make lint       style and types;      make clean: removes .venv and caches, never results"

demo: $(VENV)/.demo-is-set-up
	@$(BIN)/jaxgpt reproduce demo

# A file at a time to each core, so that what a file sets up is set up once, in the order of tests/conftest.py.
test: $(VENV)/.test-is-set-up
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# With all optimisations of XLA, which tests/conftest.py leaves out: these compute for long.
test-slow: $(VENV)/.test-is-set-up
	XLA_FLAGS= $(BIN)/python -m pytest -m slow

# Parity with the transformers package, in an environment of its own: torch is large.
test-hf:
	@$(MAKE) --no-print-directory VENV=.venv-hf .venv-hf/.test-is-set-up
	@.venv-hf/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test-hf]'
	.venv-hf/bin/python -m pytest tests/test_huggingface.py

# A real Slurm and a real Ray on this machine, in an environment of its own: Ray is large.
test-cluster:
	@tests/cluster/install.sh
	@$(MAKE) --no-print-directory VENV=.venv-cluster .venv-cluster/.test-is-set-up
	@.venv-cluster/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[slurm,ray]'
	.venv-cluster/bin/python -m pytest -m cluster tests/cluster

# All that runs on a CPU, in an environment of its own: torch is large. A GPU: python3 -m benchmarks.gpu
BENCH := steps sweeps icl startup scale mixture sampling fits coverage
bench:
	@$(MAKE) --no-print-directory VENV=.venv-bench .venv-bench/.demo-is-set-up
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@for name in $(BENCH); do .venv-bench/bin/python -m benchmarks.$$name || exit; done
	@cat benchmarks/README.md

lint: $(VENV)/.test-is-set-up
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

$(VENV)/bin/python:
	$(if $(shell $(PYTHON) -c '$(SUITS)' 2>/dev/null && echo yes),,$(error jaxgpt needs Python 3.11, 3.12 or 3.13 \
		with venv, and found $(or $(FOUND),no Python); name one with PYTHON=/path/to/python3.12))
	@$(PYTHON) -m venv $(VENV)

# make demo EXTRA=cuda (or tpu) installs the JAX of that accelerator.
EXTRA ?=
# The stamps: an install that was cut short leaves none, so it is done again.
$(VENV)/.demo-is-set-up: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing jaxgpt into $(VENV) (a minute or two)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.$(if $(EXTRA),[$(EXTRA)])'
	@touch $@

$(VENV)/.test-is-set-up: $(VENV)/.demo-is-set-up
	@echo "installing the test tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-hf .venv-bench .venv-cluster .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -exec rm -rf {} +
