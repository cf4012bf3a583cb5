# Everything runs in .venv, made on first use. `make help` lists the commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help install demo test check bench clean

help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## make .venv with the pinned versions

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: install  ## train on one half of a real MRI, segment the other, write demo/index.html
	$(BIN)/ossnet demo --out demo

# A worker for each core: threads of theirs would wait for each other, and awake where a test has two.
test: export OMP_NUM_THREADS = 1
test: export GOMP_SPINCOUNT = 1000
test: install  ## quick tests: no GPU, no download
	$(BIN)/python -m pytest -n 2 -m "not slow and not shared"

check: install  ## formatting, rules, types, import contracts
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install  ## time the field against the released algorithm and a U-Net
	$(BIN)/python benchmarks/whole_volume.py

clean:  ## remove .venv and everything generated
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
