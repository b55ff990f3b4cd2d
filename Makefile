# Everything runs inside .venv, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: workbook test lab bench refresh smollm2 clean
.DEFAULT_GOAL := workbook

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[notebooks,test]'
	touch $@

workbook: $(VENV)/.installed  ## execute notebooks 01 to 05 on the tiny profile, offline
	$(PY) -m dpo_utils.workbook

test: $(VENV)/.installed  ## unit tests, every notebook through nbval, ruff
	$(PY) -m pytest tests -q
	$(PY) -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=300 -q notebooks
	$(PY) -m ruff check dpo_utils tests notebooks

lab: $(VENV)/.installed
	$(PY) -m jupyterlab notebooks
