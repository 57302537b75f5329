# Both set-up commands of the README: each makes .venv by itself.
#   make demo      train a small GPT on Python's own help texts with five optimizers; table and runs/demo/report.png
#   make test      what CI runs: lint, types, tests with coverage
#   make test-all  the slow tier as well (mutants)
#   make test-llamafactory  the published LLaMA-Factory, in .venv-llamafactory: it pins an older transformers
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

LF := .venv-llamafactory
LF_READY := $(LF)/.ready

# Tests run in parallel, one thread each.
test test-all test-llamafactory: export OMP_NUM_THREADS := 1

.PHONY: demo test test-all test-llamafactory lint

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

# torchvision and torchaudio come as CUDA builds, whose libraries a CPU build of torch cannot load: it does without.
$(LF_READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llamafactory needs Python >= 3.11: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(LF)
	$(LF)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 pytest==9.2.0 --editable ".[llamafactory]"
	$(LF)/bin/python -c "import torchvision" 2>/dev/null || $(LF)/bin/python -m pip uninstall --quiet --yes torchvision
	$(LF)/bin/python -c "import torchaudio" 2>/dev/null || rm -r $(LF)/lib/python*/site-packages/torchaudio/lib
	touch $@

test-llamafactory: $(LF_READY)
	$(LF)/bin/python -m pytest tests/test_llamafactory.py tests/test_llamafactory_keys.py tests/test_hf_trainer.py tests/test_hf_refusals.py
