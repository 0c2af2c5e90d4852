# make demo: install, prepare text, train, evaluate, sample, report. make test: install, run every test.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEMO := runs/demo

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

$(VENV)/base: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or 3.12 is needed: make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: $(VENV)/base requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
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
