# Two commands do everything on a fresh machine with Python >= 3.10 and a C++ compiler:
#   make audit   makes the environment, builds, audits the network that ships with the package
#   make test    lint, types, tests, doctests

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*/*) setup.py pyproject.toml

.PHONY: audit test test-full bench wheel clean

audit: $(VENV)/.installed
	$(BIN)/torchflat audit

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

test-full: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "slow or not slow"

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

wheel: $(VENV)/.installed
	$(BIN)/python -m build --no-isolation

# torch comes first and the build runs without isolation, so that the kernels are compiled against this very torch.
$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "setuptools>=77" ninja
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
