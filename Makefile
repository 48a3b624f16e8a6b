# `make demo` and `make test` work from a clean clone: they make .venv and install into it what constraints.txt pins.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-all lint types benchmark clean

demo: $(INSTALLED)
	$(BIN)/python -m shardwright run --devices 8 examples/mnist_ops.py

# One thread per process: the two test processes would otherwise fight over the cores. Of generated cases a sample.
test: lint types
	SHARDWRIGHT_TEST_SAMPLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=40

# Every generated case, on every number of ranks: more than an hour.
test-all: lint types
	SHARDWRIGHT_TEST_ALL=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

types: $(INSTALLED)
	$(BIN)/mypy

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/redistribution.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/plan_quality.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first, by itself, so that nothing else can have a say in which torch it is. The build backend is installed
# beside it and used from there, so that it too is the pinned one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "shardwright needs Python 3.10 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another interpreter, for example: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH) setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test,examples,draw]'
	@touch $@
