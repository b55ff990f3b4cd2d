# make only wraps `python -m dpo_utils`. Everything runs inside .venv, made on first use from
# pyproject.toml and constraints.txt, and made again for another Python. ACTIVE=1 takes the
# environment that is active (venv or conda) as it is instead.
PYTHON ?= python3
PROFILE ?= tiny
BRANCH ?= main
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: workbook test lab refresh study bench report publish browser-test colab-check canary
.DEFAULT_GOAL := workbook

ifdef ACTIVE
PY := $(if $(VIRTUAL_ENV)$(CONDA_PREFIX),python,$(error ACTIVE=1, but no environment is active))
READY :=
else
PY := .venv/bin/python
READY := .venv/.installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif

.venv/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@$(PY) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$*")' 2> /dev/null || $(PYTHON) -m venv --clear .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[notebooks,benchmark,test]'
	touch $@

# Run the notebooks; executed copies go to runs/notebooks, figures to runs/figures.
workbook: $(READY)
	$(PY) -m dpo_utils workbook --profile $(PROFILE)

# Every notebook alone, with Colab's versions of August 2026 or with the newest of everything.
colab-check canary: $(READY)
	$(PY) -m tests.places $(subst -check,,$@)

# Unit tests, next to them every notebook through nbval, then ruff.
NBVAL := -p tests.conftest --nbval-lax --nbval-current-env --nbval-cell-timeout=300
test: $(READY)
	mkdir -p runs
	$(PY) -m pytest -q $(NBVAL) notebooks > runs/nbval.log 2>&1 & \
	$(PY) -m pytest -q tests; units=$$?; \
	wait $$!; notebooks=$$?; cat runs/nbval.log; test $$units = 0 -a $$notebooks = 0
	$(PY) -m ruff check dpo_utils tests notebooks
	$(PY) -m ruff format --check dpo_utils tests

# Sliders and buttons in JupyterLab under headless Chromium: needs Debian's chromium and playwright.
browser-test: $(READY)
	$(PY) -m pytest -q -rs tests/browser.py || test $$? = 5

# ARGS are JupyterLab's own, as in ARGS='--port 9999 --no-browser'.
lab: $(READY)
	$(PY) -m dpo_utils lab $(ARGS)

# Write the workbook's address and badges into every notebook and the README: make publish REPO=owner/name
publish: $(READY)
	$(PY) -m dpo_utils publish $(REPO) --branch $(BRANCH)

# Run the notebooks on the tiny profile and put their outputs and figures back, for committing.
refresh: $(READY)
	$(PY) -m dpo_utils workbook --fresh --refresh

# Notebooks 05 to 07 with three seeds; their tables go to the end of figures/README.md.
STUDY := DPO_SEEDS=3 DPO_TABLES=$(CURDIR)/runs/study.md DPO_FIGURES=$(CURDIR)/runs/figures
study: $(READY)
	mkdir -p runs && echo > runs/study.md
	for n in 05 06 07; do $(STUDY) $(PY) -m dpo_utils workbook $$n || exit 1; done
	sed '/^<!-- make study -->/q' figures/README.md > runs/head.md
	cat runs/head.md runs/study.md > figures/README.md

# Before and after over three seeds: make report PROFILE=smollm2 [ARGS='--name mine --data pairs.jsonl']
report: $(READY)
	$(PY) -m dpo_utils report --profile $(PROFILE) $(ARGS)

# Ours beside TRL and plain loops on CPU, two models, short and long pairs: an hour and a half.
# ARGS='--shapes C --rounds 1' is a third of it.
bench: $(READY)
	cd tests && ../$(PY) -m bench.run $(ARGS)
