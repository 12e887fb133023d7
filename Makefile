# `make demo` and `make test` set up everything they need first; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
UV ?= uv
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(BIN) -m pip --disable-pip-version-check
LOCK := $(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes \
	--custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint lock clean

help: ## show this list
	@echo "make TARGET [PYTHON=python3] [VENV=.venv]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with pinned torch, Detectron2 and this project

demo: $(STAMP) ## train, score and draw on generated images (less than eight minutes on two cores)
	$(BIN) tools/demo.py $(DEMO_ARGS)

test: lint ## ruff, then pytest; e.g. PYTEST_ARGS="-m 'not slow' -n 2"
	$(BIN) -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## ruff only
	$(BIN) -m ruff check .

lock: ## pin requirements/*.in again, with hashes (needs uv on the PATH)
	@command -v $(UV) >/dev/null || { echo "make lock needs uv: python -m pip install uv"; exit 1; }
	$(LOCK) requirements/build.in -o requirements/build.txt
	$(LOCK) requirements/requirements.in -o requirements/lock.txt

clean: ## remove build leftovers and caches; keeps .venv, output/ and datasets/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find il_net sbr_cnn tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted set-up starts again, a finished one is not repeated
# until one of these files changes.
$(STAMP): requirements/build.txt requirements/lock.txt setup.py tools/install_detectron2.py
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) was not found. Install Python 3.10 or newer, or name one:"; \
		echo "  make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another:"; \
		echo "  make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv or ensurepip, so it cannot make $(VENV)."; \
		echo "On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	@# An existing environment is kept: another $(PYTHON) would spoil it.
	$(BIN) -c 'import pip' 2>/dev/null || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --require-hashes -r requirements/build.txt
	$(PIP) install --require-hashes --no-build-isolation -r requirements/lock.txt
	$(BIN) tools/install_detectron2.py
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	touch $@
