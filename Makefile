# Every target makes what it needs; `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.tools-installed
TEST_PROGRAMS := chromium=chromium
INTERPRETER := $(VENV)/interpreter
RUN_LOCKS := requirements/cpu.lock
LOCKS := $(RUN_LOCKS) requirements/dev.lock requirements/ray.lock requirements/docs.lock requirements/examples.lock

# Empty where the environment has no Python that runs: it is made anew then, with all in it.
RUNS := $(shell $(BIN)/python -c "print('yes')" 2> /dev/null)

.PHONY: help setup venv demo docs test check examples lock matrix soak fleet wheel image vllm-next image-test

help:
	@echo "make setup  install everything into $(VENV) from the pinned locks (PYTHON=python3.13 to choose)"
	@echo "make demo   serve the default model, chat and harvest, leave a table and a picture in out/demo"
	@echo "make docs   build the documentation site into out/site"
	@echo "make test   run the test suite"
	@echo "make check  ruff, mypy --strict of every Python file, import-linter"
	@echo "make examples run the programs of examples/ against servers of their own"
	@echo "make matrix play every family of models, beside bursts, with stops and displacement"
	@echo "make soak   run the long tests"
	@echo "make fleet  run the tests with several real servers on one database"
	@echo "make wheel  build the wheel and the sdist into dist"
	@echo "make image  build a container image (KIND=cpu or gpu, TAG, BASE); needs docker, podman or buildah"
	@echo "make vllm-next  say what an upgrade of vLLM breaks (VERSION=0.33.0; without one, the newest)"
	@echo "make image-test build and run the image for CPUs, and the compose file; needs docker or podman"
	@echo "make lock   resolve what pyproject.toml declares into requirements/*.lock again"

setup: $(TOOLS)
	@echo "setup: $(VENV) is up to date"

# What runs ConServe, and behind it what its tests, pages and examples need.
$(STAMP): $(RUN_LOCKS) pyproject.toml $(if $(RUNS),,venv)
	@$(BIN)/python -m scripts.install $(RUN_LOCKS)
	@touch $@

$(TOOLS): $(LOCKS) $(STAMP)
	@$(BIN)/python -m scripts.install $(LOCKS)
	@touch $@

venv:
	@scripts/make_venv.sh $(VENV) $(PYTHON)

demo: $(STAMP)
	$(BIN)/conserve demo

docs: $(TOOLS)
	@$(BIN)/python -m scripts.site

test: $(TOOLS)
	@scripts/test_packages.sh $(TEST_PROGRAMS)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

examples: $(TOOLS)
	$(BIN)/python -m pytest tests/examples

matrix: $(TOOLS)
	CONSERVE_KEEP_RESULTS=1 $(BIN)/python -m pytest tests/models -m engine --deselect tests/models/test_page.py
	$(BIN)/python -m tests.models.page
	$(BIN)/python -m pytest tests/models/test_page.py

$(INTERPRETER)/.installed: requirements/interpreter.lock $(TOOLS)
	@echo "soak: Triton, in whose interpreter Model Runner V2 runs on a CPU (300 MB)"
	@$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(INTERPRETER) -r $<
	@touch $@

soak: $(TOOLS) $(INTERPRETER)/.installed
	$(BIN)/python -m pytest -m long

fleet: $(TOOLS)
	@scripts/test_packages.sh pg_ctlcluster=postgresql
	$(BIN)/python -m pytest -m fleet

# Any Python with pip does: what is installed goes into the image.
KIND ?= cpu
image:
	@python3 -m scripts.image $(KIND) $(if $(TAG),--tag "$(TAG)") $(if $(BASE),--base "$(BASE)")

vllm-next: $(TOOLS)
	@$(BIN)/python -m scripts.vllm_next $(ONLY) $(VERSION)

image-test: $(TOOLS)
	$(BIN)/python -m pytest -m image

check: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The wheel is built from the sdist, with the setuptools of $(VENV): no index is asked.
wheel: $(TOOLS)
	@rm -f dist/conserve_llm-*
	$(BIN)/python -m build --no-isolation

lock: $(TOOLS)
	$(BIN)/python -m scripts.lock
