# Two commands set everything up on a machine with Python 3.11+ and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-all test-latest lint bench docs clean

# pip takes torch from the constraints first, so that no other package's range pulls in a second build of it.
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

## Fetch the built-in model, profile it on this device, write the HTML report and say where.
demo: $(VENV)/.core
	mkdir -p demo
	$(BIN)/effcli profile smollm2-135m -o demo/profile.json -o demo/profile.html
	@echo "Open $(CURDIR)/demo/profile.html in a browser."

## Lint, types, and every test that protects the main jobs.
test: $(VENV)/.test lint
	$(BIN)/effcli models --fetch smollm2-135m --quiet
	$(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## The core tests on the newest releases of everything but torch, whose newest build is the one installed first.
test-latest:
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --upgrade pip
	.venv-latest/bin/python -m pip install --quiet torch$(TORCH)
	.venv-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --constraint $(or $(LATEST_CONSTRAINTS),/dev/null) --editable '.[test]'
	.venv-latest/bin/python -m pytest -m "not slow and not browser"

## Measure what the project promises; ratios within one run. Writes JSON lines to stdout.
bench: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks

## Regenerate the CLI reference and the JSON Schema that the tests compare with.
docs: $(VENV)/.test
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) .venv-latest demo build dist *.egg-info
