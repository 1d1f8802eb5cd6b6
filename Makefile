# Every target works on a fresh clone: it makes the virtual environment it needs, once, and again when pyproject.toml changes.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
RUN := $(BIN)/python
USER_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
APP_STAMP := $(VENV)/.installed-app
PIP := $(RUN) -m pip --disable-pip-version-check install --progress-bar on

.PHONY: help demo test lint format-check rules types layers docs golden bench app

help:  ## list the targets
	@echo "diffguide: steer attention in diffusers pipelines"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>&1) || found="not there"; \
	  echo "diffguide needs Python 3.11 or newer, and '$(PYTHON)' is $$found."; \
	  echo "Name another one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.11"; exit 1; } >&2
	@echo "==> creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; \
	  echo "No virtual environment was made: on Debian and Ubuntu, apt-get install python3-venv, then run this again." >&2; exit 1; }

$(USER_STAMP): pyproject.toml | $(RUN)
	@echo "==> installing diffguide (the first time PyTorch is downloaded: several GB, some minutes)"
	@$(PIP) -e .
	@touch $@

$(DEV_STAMP): pyproject.toml | $(RUN)
	@echo "==> installing diffguide and its tools (the first time PyTorch is downloaded: several GB, some minutes)"
	@$(PIP) -e ".[dev]"
	@touch $@ $(USER_STAMP) $(APP_STAMP)

demo: $(USER_STAMP)  ## a picture from a layout, guided and unguided side by side
	@mkdir -p outputs
	@$(RUN) -m diffguide demo --out outputs/demo.png
	@echo
	@echo "  $(BIN)/diffguide generate --help    draw your own"
	@echo "  make test                           run every test"

test: $(DEV_STAMP)  ## run every test
	@$(RUN) -m pytest -n $(WORKERS) --dist worksteal --durations=10 || { \
	  echo; echo "Something failed. One test alone, with its output: $(BIN)/python -m pytest tests/test_NAME.py -k WORD -s" >&2; exit 1; }
	@echo
	@echo "All tests passed. Next:"
	@echo "  make demo    draw a picture from a layout"
	@echo "  make lint    what the commit hook checks; install it with $(BIN)/pre-commit install"

lint: format-check rules types layers  ## formatting, rules, types and import layers

format-check: $(DEV_STAMP)
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .

rules: $(DEV_STAMP)
	@echo "==> ruff check"
	@$(BIN)/ruff check .

types: $(DEV_STAMP)
	@echo "==> pyright"
	@$(BIN)/pyright --pythonpath $(RUN)

layers: $(DEV_STAMP)
	@echo "==> lint-imports"
	@$(BIN)/lint-imports --no-logo

docs: $(DEV_STAMP)  ## build the documentation, warnings are errors
	@$(RUN) -m diffguide families --page docs/families.md
	@$(RUN) -m sphinx -W --keep-going -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

golden: $(DEV_STAMP)  ## draw the reference pictures of the tests again
	@$(RUN) tests/golden/draw.py
	@echo "Look at each changed picture before committing it: git status tests/golden"

bench: $(USER_STAMP)  ## measure the layout methods on the embedded model
	@$(RUN) -m diffguide bench layout

$(APP_STAMP): pyproject.toml | $(RUN)
	@echo "==> installing diffguide and its editor (the first time PyTorch is downloaded: several GB, some minutes)"
	@$(PIP) -e ".[app]"
	@touch $@ $(USER_STAMP)

app: $(APP_STAMP)  ## the editor in a browser
	@$(RUN) -m diffguide app
