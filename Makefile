# make demo   the whole job on generated data        make test   the test suite
# make docs   this documentation, in docs/site       make lint   ruff, mypy, import contracts
# make cache | train | export | benchmark            one stage on your own data (DATASET= CONFIG= FOLD= R=)
PYTHON   ?= python3
VENV     ?= .venv
DATASET  ?= 4
CONFIG   ?= 3d_fullres
FOLD     ?= 0
R        ?= 2 4
BUNDLES  ?= bundles
EXTRA    ?=
BIN      := $(VENV)/bin
export PYTHONUNBUFFERED = 1

.PHONY: help install demo test lint docs cache train export benchmark clean

help:
	@sed -n '1,3s/^# //p' Makefile

# One environment for everything; the stamp makes a second run start at once. The native core is part of the install.
$(VENV)/.installed: pyproject.toml $(shell find fastnnunet/native -name '*.?pp' -o -name CMakeLists.txt)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[train,openvino,dev]'
	touch $@

install: $(VENV)/.installed

# threads of torch that wait asleep: loaders and other work get the cores (two busy cores: a step in a fifth of the time)
demo: export OMP_WAIT_POLICY = passive
demo: install
	$(BIN)/python -m pipelines.demo

# two processes, each test file in one of them
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Its tools are installed the first time, about ten seconds that nothing else needs; not as .[docs], which would compile the core.
$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
	  | xargs $(BIN)/python -m pip install --quiet
	touch $@

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/mkdocs.yml
	@echo docs/site/index.html

cache: install
	$(BIN)/python -m pipelines.cache $(DATASET) $(CONFIG) $(EXTRA)

train: install
	$(BIN)/python -m pipelines.train $(DATASET) $(CONFIG) $(FOLD) $(R) $(EXTRA)

export: install
	$(BIN)/python -m pipelines.export $(DATASET) $(CONFIG) $(FOLD) $(R) --to $(BUNDLES) $(EXTRA)

benchmark: install
	$(BIN)/python -m pipelines.benchmark $(DATASET) $(CONFIG) $(FOLD) $(R) --bundles $(BUNDLES) $(EXTRA)

clean:
	rm -rf demo_out docs/site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
