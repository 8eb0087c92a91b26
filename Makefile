# Two commands: `make demo` shows the whole way on a simulated cohort, `make test` checks everything.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOWEST := .venv-lowest
PIP    := pip install --quiet --disable-pip-version-check
PORT   ?= 8000
ARGS   ?=  # of pytest, as in make test ARGS="-k niche"

.PHONY: setup demo test test-all test-lowest lint docs docs-html dist clean

setup: $(VENV)/.installed

# torch first: whatever build of the pinned version is there already is kept.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -c constraints.txt torch
	$(BIN)/$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/$(PIP) -c constraints.txt -e '.[dev,docs]'
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
	$(BIN)/python -m pytest -m "not slow and not gpu and not large" --cov --cov-report=term $(ARGS)

test-all: lint test-lowest
	$(BIN)/python -m pytest --cov --cov-report=term $(ARGS)

# The least version of every dependency that pyproject.toml names, but for torch and torchvision:
# their old builds for a CPU lie on no index that a plain install reads, so the pinned ones stay.
# Old libraries over new ones warn of what is deprecated; that is not ours to mend.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -m "not slow and not gpu and not large" \
		-W ignore::DeprecationWarning $(ARGS)

$(LOWEST)/.installed: pyproject.toml constraints.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/$(PIP) uv
	$(LOWEST)/bin/$(PIP) --no-deps -c constraints.txt torch torchvision
	grep -E '^(torch|torchvision)==' constraints.txt > $(LOWEST)/pinned.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python \
		--resolution lowest-direct --override $(LOWEST)/pinned.txt -e '.[dev]'
	touch $@

docs: docs-html
	@echo "http://localhost:$(PORT) (Ctrl-C ends it)"
	$(BIN)/python -m http.server --bind localhost --directory build/docs $(PORT)

docs-html: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs

dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(LOWEST) demo-out build dist .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
