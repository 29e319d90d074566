# Two commands: `make train` and `make test`. Each makes .venv first and installs what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The options of the run: a minute on two cores. Another one: make train TRAIN="--model gpt2 --steps 20"
TRAIN ?= --steps 200 --context 128 --lr 2e-3 --eval-batches 10
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: train test lint clean

train: $(VENV)/.installed
	$(BIN)/gpt2-fast train $(TRAIN)

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info gpt2_fast/*.so gpt2_fast/*.fatbin
