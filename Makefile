# `make demo` and `make test` do all their own set-up: Python 3.11+ and this checkout suffice.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow check bench compare setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[compile,qnn,hf,ethos-u,webgpu,energy,dev]"
	touch $@

demo: setup
	$(BIN)/edgebudget compile uhd-iqa --target npu --macs 50G --out build/uhd-iqa --force
	$(BIN)/edgebudget explain build/uhd-iqa

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.all

compare: setup
	$(BIN)/python -m benchmarks.compare

clean:
	rm -rf build $(VENV)
