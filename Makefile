# Everything runs inside .venv, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
PROFILE ?= tiny
PY := .venv/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: workbook test lab refresh study bench report
.DEFAULT_GOAL := workbook

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[notebooks,benchmark,test]'
	touch $@

# Execute the notebooks in order; executed copies go to runs/notebooks.
workbook: .venv/.installed
	$(PY) -m dpo_utils.workbook --profile $(PROFILE)

# Unit tests, next to them every notebook through nbval, then ruff.
NBVAL := -p tests.conftest --nbval-lax --nbval-current-env --nbval-cell-timeout=300
test: .venv/.installed
	mkdir -p runs
	$(PY) -m pytest -q $(NBVAL) notebooks > runs/nbval.log 2>&1 & \
	$(PY) -m pytest -q tests; units=$$?; \
	wait $$!; notebooks=$$?; cat runs/nbval.log; test $$units = 0 -a $$notebooks = 0
	$(PY) -m ruff check dpo_utils tests notebooks
	$(PY) -m ruff format --check dpo_utils tests

lab: .venv/.installed
	$(PY) -m jupyterlab notebooks

# Run the notebooks on the tiny profile and put their outputs and figures back, for committing.
refresh: .venv/.installed
	$(PY) -m dpo_utils.workbook --fresh --refresh

# Notebooks 05 to 07 with three seeds; their tables go to the end of figures/README.md.
STUDY := DPO_SEEDS=3 DPO_TABLES=$(CURDIR)/runs/study.md DPO_FIGURES=$(CURDIR)/runs/figures
study: .venv/.installed
	mkdir -p runs && echo > runs/study.md
	$(STUDY) $(PY) -m dpo_utils.workbook 05 06 07
	sed '/^<!-- make study -->/q' figures/README.md > runs/head.md
	cat runs/head.md runs/study.md > figures/README.md

# Before and after over three seeds: make report PROFILE=smollm2 [ARGS='--name mine --data pairs.jsonl']
report: .venv/.installed
	$(PY) -m dpo_utils.experiments.report --profile $(PROFILE) $(ARGS)

# Ours beside TRL and plain loops on CPU, two models, short and long pairs: an hour and a half.
# ARGS='--shapes C --rounds 1' is a third of it.
bench: .venv/.installed
	cd tests && ../$(PY) -m bench.run $(ARGS)
