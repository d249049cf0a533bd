# Every target makes what it needs; `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_PROGRAMS := chromium=chromium
LOCKS := requirements/cpu.lock requirements/dev.lock

.PHONY: help setup demo test check lock soak

help:
	@echo "make setup  install everything into $(VENV) from the pinned locks"
	@echo "make demo   serve the default model, chat and harvest, leave a table and a picture in out/demo"
	@echo "make test   run the test suite"
	@echo "make check  ruff, mypy --strict, import-linter"
	@echo "make soak   run the long tests"
	@echo "make lock   resolve requirements/*.in into requirements/*.lock again"

setup: $(STAMP)
	@echo "setup: $(VENV) is up to date"

$(VENV)/bin/python:
	@scripts/make_venv.sh $(VENV)

$(STAMP): $(LOCKS) pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || scripts/make_venv.sh $(VENV)  # a broken one
	@echo "setup: installing $(LOCKS) into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/cpu.lock -r requirements/dev.lock
	@echo "setup: installing conserve itself"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/conserve demo

test: $(STAMP)
	@scripts/test_packages.sh $(TEST_PROGRAMS)
	$(BIN)/python -m pytest

soak: $(STAMP)
	$(BIN)/python -m pytest -m long

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lock: $(STAMP)
	$(BIN)/python scripts/lock.py
