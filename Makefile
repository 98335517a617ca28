# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.11 or newer, make, and a compiler.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: demo test check install clean

# torch first, by its own line: a plain dependency may pull gigabytes of CUDA onto a machine without a GPU.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[demo,dev]'
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/softprompt demo

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
