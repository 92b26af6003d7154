# `make test` and `make demo` do all their own set-up in this directory: a virtual environment in .venv with pinned
# packages, the C extension, the demo model in models/. Nothing is installed anywhere else.
# Needed beforehand: Python 3.11 or newer with venv, a C compiler, make.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup model test demo relu-demo lint types bench docs clean distclean FORCE

# The first Python that is new enough; choose another with `make PYTHON=…`.
PYTHON ?= $(firstword $(foreach python,python3.11 python3.12 python3.13 python3,$(shell \
	$(python) -c 'import sys; print("$(python)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
BIN := .venv/bin
STAMPS := .venv/.stamps
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
CODE := cli powerinfer_tools formats kernels
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Where tests find helpers of their own folder; the package itself is imported from where it is installed.
TEST_FOLDERS := tests/formats tests/kernels tests/tools tests/cli

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1	/'

setup: $(STAMPS)/powerinfer  ## .venv with powerinfer and everything that tests need

model: $(STAMPS)/requirements  ## the demo model, in models/
	@$(BIN)/python scripts/fetch_model.py $(MODEL)

test: setup model  ## all tests, on the installed package
	POWERINFER_MODEL= $(BIN)/pytest -o "pythonpath=$(TEST_FOLDERS)" $(PYTEST_ARGS)

demo: setup model  ## profile, plan, convert and run on the demo model (DEMO_SHORT=1: a small piece of it)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh $(MODEL)

relu-demo: setup model  ## the same with predictors, on a model with true zeros that relufy made from the demo model
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/relu_demo.sh $(MODEL)

lint: $(STAMPS)/requirements  ## ruff
	$(BIN)/ruff check

types: $(STAMPS)/requirements  ## mypy --strict
	$(BIN)/mypy

bench: setup model  ## memory, kernels, tok/s of the demo model, beside llama.cpp where it is installed; JSON in build/
	$(BIN)/python benchmarks/compare.py -m $(MODEL) --kernels --json build/bench.json $(BENCH_ARGS)

docs: setup  ## docs/cli.md, from the --help of every command
	$(BIN)/python scripts/write_cli_docs.py docs/cli.md

clean:  ## remove what was built
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMPS)/powerinfer $(STAMPS)/sources

distclean: clean  ## remove .venv, too
	rm -rf .venv

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/requirements: requirements/dev.txt $(STAMPS)/venv
	$(PIP) install -r requirements/dev.txt
	touch $@

# The list of source files, rewritten only when it changes: a file that is removed is a reason to install again.
$(STAMPS)/sources: FORCE | $(STAMPS)/venv
	@find $(CODE) -type f \( -name '*.py' -o -name '*.pyi' -o -name 'py.typed' -o -path '*/csrc/*' -o -path '*/data/*' \
		-o -name CMakeLists.txt \) | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

SOURCES := $(shell find $(CODE) -type f \( -name '*.py' -o -name '*.pyi' -o -name 'py.typed' -o -path '*/csrc/*' \
	-o -path '*/data/*' -o -name CMakeLists.txt \))

# Installed as a wheel, not linked to the sources: what is tested and shown is what is shipped.
$(STAMPS)/powerinfer: $(STAMPS)/requirements $(STAMPS)/sources $(SOURCES) pyproject.toml
	$(PIP) install --no-build-isolation --no-deps --force-reinstall .
	touch $@
