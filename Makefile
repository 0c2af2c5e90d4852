# make demo: install, prepare text, train, evaluate, sample, report. make test: install, run every test.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEMO := runs/demo

# On Linux CPUs: large pages for arrays, kept from step to step rather than returned and faulted in again; glibc alone
# reads it. Steps were 7 to 12% faster (LOG.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592

# pip would compile every file of every package, one after the other, for longer than it downloads them.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile
COMPILE_IMPORTED := PYTHONDONTWRITEBYTECODE= $(PY) -c

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

$(VENV)/base: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or 3.12 is needed: make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(COMPILE_IMPORTED) "import train, modse_jax.training.loop, modse_jax.evaluation.scoring, modse_jax.evaluation.report"
	touch $@

$(VENV)/dev: $(VENV)/base requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	$(COMPILE_IMPORTED) "import pytest, xdist"
	touch $@

demo: export DEMO_START := $(shell date +%s)
demo: $(VENV)/base
	$(PY) train.py --config=configs/tiny.py --workdir=$(DEMO)
	$(PY) eval.py --workdir=$(DEMO)
	$(PY) -m modse_jax.evaluation.summary --workdir=$(DEMO) --since=$$DEMO_START

test: $(VENV)/dev
	$(PY) -m pytest

lint: $(VENV)/dev
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV) runs
