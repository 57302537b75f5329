# Both set-up commands of the README: each makes .venv by itself.
#   make demo      train a small GPT on Python's own help texts with five optimizers; table and runs/demo/report.png
#   make test      what CI runs: lint, types, tests with coverage
#   make test-all  the slow tier as well (mutants)
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Tests run in parallel, one thread each.
test test-all: export OMP_NUM_THREADS := 1

.PHONY: demo test test-all lint

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mofasgd needs Python >= 3.10: make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/mofasgd compare --config configs/demo.yaml

lint: $(READY)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n auto -m "not slow" --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

test-all: lint
	$(BIN)/python -m pytest -n auto --cov --cov-fail-under=90
