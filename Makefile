# Two commands set everything up on a machine with Python 3.11+ and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-thorough test-latest test-oldest lint bench docs clean

# pip takes torch from the constraints first, so that no other package's range pulls in a second build of it.
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.quantize: $(VENV)/.core
	$(PIP) install --quiet --constraint constraints.txt --editable '.[quantize]'
	touch $@

$(VENV)/.test: $(VENV)/.quantize
	$(PIP) install --quiet --constraint constraints.txt --editable '.[quantize,diffusion,onnx,ray,search,test]'
	touch $@

## Fetch the built-in model, profile it on this device, plan, quantize it to 4 bits, and say where everything is.
demo: $(VENV)/.quantize
	mkdir -p demo
	$(BIN)/effcli profile smollm2-135m -o demo/profile.json -o demo/profile.html
	$(BIN)/effcli plan smollm2-135m --profile demo/profile.json --pass quantize:scheme=w4a16 -o demo/plan.html
	$(BIN)/effcli optimize smollm2-135m --profile demo/profile.json --pass quantize:scheme=w4a16 -o demo/out --force
	@echo "Checkpoint: $(CURDIR)/demo/out"
	@echo "Open $(CURDIR)/demo/out/report.html in a browser."

## Lint, types, and every test that protects the main jobs.
test: $(VENV)/.test lint
	$(BIN)/effcli models --fetch smollm2-135m --quiet
	$(PYTEST) --numprocesses 2 --dist loadfile -m "not thorough"

## What takes longer: the same on further architectures, schemes and faults.
test-thorough: $(VENV)/.test
	$(PYTEST) --numprocesses 2 --dist loadfile -m thorough

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A fresh environment takes the newest release of everything; TORCH="==2.13.0" keeps a certain torch build.
define in-fresh-venv
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install --quiet $(2)
	$(1)/bin/python -m pip install --quiet --editable '.[test]'
	$(1)/bin/python -m pip list | grep -E '^(torch|transformers) '
	$(1)/bin/python -m pytest -m "not slow and not browser and not builtin"
endef

## The core tests on the newest releases.
test-latest:
	$(call in-fresh-venv,.venv-latest,'torch$(TORCH)')

## The core tests on the oldest releases that pyproject.toml admits.
test-oldest:
	$(call in-fresh-venv,.venv-oldest,'torch$(or $(TORCH),==2.11.0)' 'transformers==5.15.0')

## Measure what the project promises; ratios within one run. Writes JSON lines to stdout.
bench: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks

## Regenerate the CLI reference and the JSON Schema that the tests compare with.
docs: $(VENV)/.test
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) .venv-latest .venv-oldest demo build dist *.egg-info
