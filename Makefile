# Two commands: `make demo` shows the whole way on a simulated cohort, `make test` checks everything.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup demo test test-all lint clean

setup: $(VENV)/.installed

# torch first: whatever build of the pinned version is there already is kept.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	rm -rf demo-out
	$(BIN)/st-align demo --out demo-out

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu and not large" --cov --cov-report=term

test-all: lint
	$(BIN)/python -m pytest --cov --cov-report=term

clean:
	rm -rf $(VENV) demo-out .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
