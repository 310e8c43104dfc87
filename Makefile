# Needs python 3.11 or newer, make and git. Everything is installed into .venv; nothing outside the checkout is touched.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell $(name) -c 'print("$(name)")' 2>/dev/null)))
# Test processes at a time; each has one torch thread, so that they do not fight for the cores.
WORKERS ?= 4

# The documentation's theme advertises its successor on every build, pyright every release.
export NO_MKDOCS_2_WARNING := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench bench-all docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with macrobatch and everything that the other targets need
	@:

# constraints.txt holds torch at a release that has a CPU build, so that no CUDA package need be downloaded.
$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV): some minutes the first time" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,plot,track,dev]"
	@touch $@

demo: setup ## train on real handwritten digits and compare with the full batch
	@$(BIN)/macrobatch demo

test: setup ## run all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses $(WORKERS) --dist loadgroup

check: setup ## format, lint, types, documentation, architecture
	@$(BIN)/python -m ruff format --check --quiet
	@$(BIN)/python -m ruff check --quiet
	@$(BIN)/python -m pyright
	@$(MAKE) --no-print-directory docs
	@$(BIN)/python -m pytest --quiet tests/test_architecture.py

bench: setup ## measure what a step costs beyond its forward and backward
	@$(BIN)/python benchmarks/overhead.py

bench-all: setup ## run every benchmark that this machine can, peers beside, and report on the aims
	@$(BIN)/python benchmarks/run.py

docs: setup ## build the documentation into site/
	@$(BIN)/python -m mkdocs build --strict --quiet

clean: ## remove what the other targets write, except .venv
	@rm -rf site dist .pytest_cache .ruff_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
