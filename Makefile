# make demo: install, prepare text, train, evaluate, sample, report.
# make test: install, run every test that is not marked slow. make test-slow: run those that are.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEMO := runs/demo

# pip would compile every file of every package, one after the other, for longer than it downloads them.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
COMPILE_IMPORTED := PYTHONDONTWRITEBYTECODE= $(PY) -c

# XLA's CUDA compiler compiles for GPUs on a machine without one. It stays beside the environment: inside it, every run on
# a CPU would try to start CUDA. It exists for Linux alone, and its version must be jax's.
GPU_COMPILER := $(VENV)/gpu-compiler

.PHONY: demo test test-slow lint faults audit clean gpu-compiler
.DELETE_ON_ERROR:

$(VENV)/base: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or 3.12 is needed: make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(COMPILE_IMPORTED) "import train, modse_jax.training.loop, modse_jax.evaluation.scoring, modse_jax.report.pages"
	touch $@

$(VENV)/dev: $(VENV)/base requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	$(COMPILE_IMPORTED) "import pytest, xdist"
	touch $@

$(GPU_COMPILER)/installed: $(VENV)/base
	$(PIP) --no-deps --upgrade --target=$(GPU_COMPILER) 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' \
		$$($(PY) -c 'import jax; print(*(f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt")))')
	touch $@

gpu-compiler: $(GPU_COMPILER)/installed

demo: export DEMO_START := $(shell date +%s)
demo: $(VENV)/base
	$(PY) train.py --config=configs/tiny.py --workdir=$(DEMO)
	$(PY) eval.py --workdir=$(DEMO)
	$(PY) -m modse_jax.report.demo_summary --workdir=$(DEMO) --since=$$DEMO_START

test: $(VENV)/dev $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(GPU_COMPILER)/installed)
	$(PY) -m pytest

test-slow: $(VENV)/dev $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(GPU_COMPILER)/installed)
	$(PY) -m pytest -m slow

lint: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

faults: $(VENV)/dev
	$(PY) -m tests.helpers.faults --json=benchmarks/results/faults.json

audit: $(VENV)/base
	$(PIP) pip-audit
	$(PY) -m pip_audit -r requirements.txt

clean:
	rm -rf $(VENV) runs
