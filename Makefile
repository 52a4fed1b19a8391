# make demo  trains on handwritten digits;  make test  runs the tests.  Each needs nothing but Python and its pip.
# make lint, make format, make wheel, make clean: for developers.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
  if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then echo $$p; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS = constraints/py$(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])').txt
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: demo test lint format wheel clean

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.run $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.dev
	rm -rf dist build
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "error: Python 3.11 or 3.12 is needed; name one with make PYTHON=/path/to/python3." >&2; exit 2; fi
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; install it (on Debian: apt-get install python3-venv)." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(INSTALL) --editable ".[experiments]"
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml
	$(INSTALL) --editable ".[dev]"
	@touch $@ $(VENV)/.demo
