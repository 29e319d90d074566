# Two commands: `make train` and `make test`. Each makes .venv first and installs what it needs.
# `make test-fast` is what to run while editing: below a minute on two cores. Both take WORKERS, the processes that test.
# `make docs` builds the site of README.md, docs/ and the docstrings into build/docs; it reads sources alone, so no torch.
# Jobs of their own: `make test-kernels`, `make test-install`, `make test-transformers`, `make test-transformers-suite`,
# `make test-newest-triton`, `make fuzz`, `make fuzz-files`, `make faults`, `make sanitize`, `make wheels`, `make release`,
# `make hub`, `make test-hub` (CONTRIBUTING.md).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The options of the run: a minute on two cores. Another one: make train TRAIN="--model gpt2 --steps 20"
TRAIN ?= --steps 200 --context 128 --lr 2e-3 --eval-batches 10
WORKERS ?= 2
# Several processes with as many threads as there are cores: a thread that waits must leave its core to another.
# pytest-benchmark times nothing beside other processes, and would say so in a warning.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

# Another release of one package, in a folder that comes before .venv's packages: the torch beside it stays one and the
# same, and .venv stays as pinned. The oldest transformers comes with the newest hub and tokenizers that it takes.
OVERLAY := $(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target
OLDEST_TRANSFORMERS := transformers==4.57.1 huggingface_hub==0.36.2 tokenizers==0.22.2
# $(call with,FOLDER,PACKAGE): every test file that names the package, run with the release that lies in the folder.
with = export PYTHONPATH=$(abspath $(VENV))/$(1); \
	$(BIN)/python -c 'import $(2); print("$(2)", $(2).__version__)' && \
	$(PYTEST) $$(grep -rlw '$(2)' tests --include='test_*.py' --exclude=test_install.py)

.PHONY: train test test-fast test-kernels lint fuzz fuzz-files faults sanitize docs clean test-install \
	test-transformers test-oldest-transformers test-newest-transformers test-transformers-suite test-newest-triton \
	wheels release hub test-hub

train: $(VENV)/.installed
	$(BIN)/gpt2-fast train $(TRAIN)

test: $(VENV)/.installed-test lint
	$(PYTEST)

# Without what tests/conftest.py marks slow: whole commands, compilers, other processes, Triton in its interpreter.
test-fast: $(VENV)/.installed-test lint
	$(PYTEST) -m 'not install and not slow'

# Every Triton configuration of every architecture, compiled and compared with the kept machine code: half an hour of one core
# for 600 configurations, of which there are three times as many.
test-kernels: $(VENV)/.installed-test
	$(BIN)/python tests/golden/kernels.py
	$(BIN)/gpt2-fast doctor --kernels

# Generated inputs: make fuzz FUZZ="--examples 500 --ops linear --seed 3"
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m tests.generated $(FUZZ)

# Damaged files of every format: make fuzz-files FUZZ_FILES="--files 500 --formats config.json --seed 3"
fuzz-files: $(VENV)/.installed-test
	$(BIN)/python -m tests.fuzz_files $(FUZZ_FILES)

# csrc/ with AddressSanitizer and UndefinedBehaviorSanitizer (g++), under the operations' tests and generated inputs.
sanitize: $(VENV)/.installed-test
	$(BIN)/python -m tests.sanitize $(SANITIZE)

# Runs that are killed, or see a full or broken disk, and are resumed: make faults FAULTS="--kills 1000 --seed 2"
faults: $(VENV)/.installed-test
	$(BIN)/python -m tests.faults $(FAULTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The source distribution and the wheels into dist/, each wheel tried in clean environments: CONTRIBUTING.md, "Releases".
# make wheels WHEELS="--arch x86_64 --arch aarch64 --root build/arm64"
wheels: $(VENV)/release/.installed
	$(VENV)/release/bin/python -m release.wheels $(WHEELS)

# make release TAG=v0.2.0: the checks, the tests, the wheels, and the commands that publish. It publishes nothing.
release: $(VENV)/release/.installed
	$(VENV)/release/bin/python -m release.check "$(TAG)"
	$(MAKE) test
	$(MAKE) wheels
	$(VENV)/release/bin/python -m release.check "$(TAG)" --built

docs: $(VENV)/docs/.installed
	$(VENV)/docs/bin/mkdocs build --strict --clean

test-install: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m install tests/test_install.py

test-transformers: test-oldest-transformers test-newest-transformers

test-oldest-transformers: $(VENV)/.installed-test
	$(OVERLAY) $(VENV)/transformers-oldest --no-deps $(OLDEST_TRANSFORMERS)
	@$(call with,transformers-oldest,transformers)

test-newest-transformers: $(VENV)/.installed-test
	$(OVERLAY) $(VENV)/transformers-newest transformers
	@$(call with,transformers-newest,transformers)

# transformers' own GPT-2 tests: make test-transformers-suite SUITE=../transformers, a checkout of the installed release.
test-transformers-suite: $(VENV)/.installed-test
	$(PIP) parameterized datasets httpx
	$(BIN)/python -m tests.transformers_suite --suite $(SUITE)

# The folder for Hugging Face `kernels`, loaded by the newest release of that package.
test-hub: $(VENV)/.installed-test
	$(OVERLAY) $(VENV)/kernels-newest kernels
	PYTHONPATH=$(abspath $(VENV))/kernels-newest $(BIN)/python -m pytest -m 'install or not install' tests/test_hub.py

# The folder itself: make hub HUB=some/folder
hub:
	$(PYTHON) -m release.hub $(HUB)

test-newest-triton: $(VENV)/.installed-test
	$(OVERLAY) $(VENV)/triton-newest --no-deps triton
	@$(call with,triton-newest,triton)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r docs/requirements.txt
	touch $@

$(VENV)/release/.installed: release/requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)/release
	$(VENV)/release/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r release/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info gpt2_fast/*.so gpt2_fast/*.fatbin gpt2_fast/no_extension.txt
