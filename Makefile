# Each target makes .venv when it is missing, installs what the target needs into it, and does
# nothing twice: the stamps in .venv remember what is installed for this pyproject.toml.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WORKERS ?= 2

.PHONY: train test test-all lint format aot notebooks clean

train: $(VENV)/base
	$(BIN)/python -m jaxeff.train --config configs/lm_stdlib.py

test: $(VENV)/test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

test-all: $(VENV)/test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

aot: $(VENV)/aot
	$(BIN)/python -m jaxeff.aot --config configs/lm_8b.py --target v5p:4x4x4

notebooks: $(VENV)/notebooks
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter execute notebooks/*.ipynb

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'jaxeff needs Python 3.11 or newer; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	touch $@

$(VENV)/base: $(VENV)/python pyproject.toml
	$(PIP) --editable .
	touch $@

$(VENV)/test $(VENV)/dev $(VENV)/aot $(VENV)/notebooks: $(VENV)/%: $(VENV)/base
	$(PIP) --editable '.[$*]'
	touch $@
