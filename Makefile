# `make demo` and `make test` do all their own set-up in this directory: a virtual environment in .venv with pinned
# packages, the C extension, the demo model in models/. Nothing is installed anywhere else. The demo takes what a user
# needs (requirements/run.txt); what checks the code adds the rest (requirements/dev.txt).
# Needed beforehand: Python 3.11 or newer with venv, a C compiler, make.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup setup-dev model test clients ray demo relu-demo lint types bench bench-table docs site wheel unpinned sanitize neon fuzz kill-test clean distclean FORCE

# The first Python that is new enough; choose another with `make PYTHON=…`.
PYTHON ?= $(firstword $(foreach python,python3.11 python3.12 python3.13 python3,$(shell \
	$(python) -c 'import sys; print("$(python)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
BIN := .venv/bin
STAMPS := .venv/.stamps
# WERROR=ON makes warnings of the C compiler errors. A user's compiler may know more warnings than ours: off by default.
WERROR ?= OFF
# Tests run in so many processes, file by file. Each takes a core and some 2 GB.
WORKERS ?= 2
WHEELS := build/wheel
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
CODE := cli powerinfer powerinfer_tools formats kernels
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Where tests find helpers of their own folder; the package itself is imported from where it is installed.
TEST_FOLDERS := tests/formats tests/kernels tests/tools tests/cli

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1	/'

setup: $(STAMPS)/powerinfer  ## powerinfer and the packages that it needs, in .venv
setup-dev: setup $(STAMPS)/requirements  ## the same, and the packages for tests and checks

model: $(STAMPS)/run-requirements  ## the demo model, in models/
	@$(BIN)/python scripts/fetch_model.py $(MODEL)

test: setup-dev model  ## all tests, on the installed package
	POWERINFER_MODEL= POWERINFER_WHEEL="$$(echo $(CURDIR)/$(WHEELS)/powerinfer-*.whl)" OMP_NUM_THREADS=1 \
		$(BIN)/pytest -o "pythonpath=$(TEST_FOLDERS)" -n $(WORKERS) --dist loadfile --durations=25 $(PYTEST_ARGS)

clients: setup-dev  ## tests of client programs against the server (installs about 1 GB into build/clients)
	python3 -m venv build/clients && build/clients/bin/pip install -q -r requirements/clients.txt
	POWERINFER_CLIENTS=build/clients OMP_NUM_THREADS=1 \
		$(BIN)/pytest -o "pythonpath=$(TEST_FOLDERS)" tests/tools/test_serving_programs.py

ray: setup-dev  ## tests of profile --ray and replicas on a local Ray (installs it into .venv)
	$(PIP) install -q -r requirements/ray.txt
	OMP_NUM_THREADS=1 $(BIN)/pytest -o "pythonpath=$(TEST_FOLDERS)" tests/tools/test_profiling_on_ray.py \
		tests/tools/test_serving_replicas.py

demo: setup model  ## profile, plan, convert and run on the demo model (DEMO_SHORT=1: a small piece of it)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh $(MODEL)

relu-demo: setup-dev model  ## the same with predictors, on the demo model made sparse by relufy
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/relu_demo.sh $(MODEL)

lint: $(STAMPS)/requirements  ## ruff and clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror kernels/csrc/*.[ch] kernels/csrc/*.inc tests/kernels/sanitize/*.c

types: $(STAMPS)/requirements  ## mypy --strict
	$(BIN)/mypy

bench: setup model bench-table  ## speed of memory, kernels and models compared with llama-cpp-python; JSON in build/
	$(BIN)/python benchmarks/compare.py -m $(MODEL) --kernels --json build/bench.json $(BENCH_ARGS)

bench-table: setup model  ## every speed ratio that the documentation names, AVX2 and AVX-512 (an hour, 12 GB); PIECES="ffn token …"
	$(BIN)/python benchmarks/whole_table.py $(PIECES) --isa all --json build/table.json $(TABLE_ARGS)

docs: setup-dev  ## docs/cli.md, from the --help of every command
	$(BIN)/python scripts/write_cli_docs.py docs/cli.md

site: $(STAMPS)/site  ## the documentation as a site in build/site; a broken link is an error
	build/site-venv/bin/python scripts/gather_site.py build/site-source
	NO_MKDOCS_2_WARNING=1 build/site-venv/bin/mkdocs build --quiet

wheel: setup-dev  ## one wheel for Python 3.11 and later on any Linux with the same kind of CPU, in dist/
	rm -rf dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair -w dist $(WHEELS)/powerinfer-*.whl

sanitize: setup-dev  ## the kernels' tests under ASan and UBSan, the thread pool's under TSan
	bash scripts/sanitize.sh

neon: setup-dev  ## the kernels' tests with NEON in an emulator, on Debian for x86-64
	bash scripts/neon.sh

unpinned: model  ## a short pipeline with the newest packages that pyproject.toml allows, in an environment of its own
	PYTHON="$(PYTHON)" bash scripts/unpinned.sh $(MODEL)

SECONDS ?= 60

KILLS ?= 100

kill-test: setup-dev  ## kills every stage at random moments, KILLS=100 times (moments depend on SEED=1)
	$(BIN)/python scripts/kill_test.py --kills $(KILLS) --seed $(or $(SEED),1)

fuzz: setup  ## damaged files for every reader, for SECONDS=60 (inputs depend on SEED=1 alone)
	$(BIN)/python scripts/fuzz.py --seconds $(SECONDS) --seed $(or $(SEED),1)

clean:  ## remove what was built
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(STAMPS)/powerinfer $(STAMPS)/sources $(STAMPS)/site

distclean: clean  ## remove .venv, too
	rm -rf .venv

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/site: requirements/site.txt $(STAMPS)/venv
	$(PYTHON) -m venv build/site-venv
	build/site-venv/bin/python -m pip --disable-pip-version-check install -r requirements/site.txt
	touch $@

$(STAMPS)/run-requirements: requirements/run.txt $(STAMPS)/venv
	$(PIP) install -r requirements/run.txt
	touch $@

$(STAMPS)/requirements: requirements/dev.txt $(STAMPS)/run-requirements
	$(PIP) install -r requirements/dev.txt
	touch $@

# The list of source files, rewritten only when it changes: a file that is removed is a reason to install again.
$(STAMPS)/sources: FORCE | $(STAMPS)/venv
	@find $(CODE) -type f \( -name '*.py' -o -name '*.pyi' -o -name 'py.typed' -o -path '*/csrc/*' -o -path '*/data/*' \
		-o -path '*/page/*' -o -name CMakeLists.txt \) | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

SOURCES := $(shell find $(CODE) -type f \( -name '*.py' -o -name '*.pyi' -o -name 'py.typed' -o -path '*/csrc/*' \
	-o -path '*/data/*' -o -path '*/page/*' -o -name CMakeLists.txt \))

# Installed as a wheel, not linked to the sources: what is tested and shown is what is shipped.
$(STAMPS)/powerinfer: $(STAMPS)/run-requirements $(STAMPS)/sources $(SOURCES) pyproject.toml
	rm -rf $(WHEELS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel --no-build-isolation --no-deps -w $(WHEELS) \
		--config-settings=cmake.define.POWERINFER_WERROR=$(WERROR) .
	$(PIP) install --no-deps --force-reinstall $(WHEELS)/powerinfer-*.whl
	touch $@
