# `make demo` and `make test` do everything from a fresh clone: they need Python 3.10 or later, g++ and make.
# The environment is .venv/ in this folder. PYTHON names the Python that it is created with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Of the thousands of modules that come along only those that are imported are ever compiled, and then for good.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(PIP) install -q --no-compile -c constraints.txt
TOOLS := $(VENV)/.tools
INSTALLED := $(VENV)/.installed
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt drsl_kernels/_version.py $(wildcard csrc/* csrc/*/*)
CPP_FILES = $$(find csrc tests/cpp benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
PYTEST_ARGS ?= -n 2 --maxschedchunk 4

# pip leaves a core idle, on which the sanitized C++ tests can be built meanwhile.
MAKEFLAGS += -j2

# cmake and ninja may be in the environment only.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install demo test lint format cpp-test plain sanitized docs bench clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(INSTALLED) ## Create .venv/ and install the package into it, in place

demo: $(INSTALLED) ## Train on handwritten digits, attack the models, write results/demo/
	$(BIN)/drsl compare --out results/demo

test: lint cpp-test ## Linters, C++ tests (plain and sanitized), Python tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(INSTALLED) ## Apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

cpp-test: plain sanitized ## C++ tests, plain and under AddressSanitizer and UndefinedBehaviorSanitizer

plain: $(INSTALLED)
# With the object files of the extension, where it was built.
	test -e build/extension/build.ninja || cmake -S . -B build/extension -G Ninja -DDRSL_BUILD_EXTENSION=OFF
	$(call run_ctest,build/extension,-DDRSL_BUILD_TESTS=ON)

sanitized: $(TOOLS)
	$(call run_ctest,build/sanitized,-DDRSL_BUILD_TESTS=ON -DDRSL_BUILD_EXTENSION=OFF -DDRSL_SANITIZE=ON)

docs: $(INSTALLED) ## Build the documentation into build/docs/
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

bench: $(INSTALLED) ## Speed against F.cross_entropy: pytest-benchmark, then ratios and whether the targets are met
	$(BIN)/python -m pytest benchmarks
	$(BIN)/python benchmarks/ratios.py

clean: ## Remove everything that was built, and .venv/
	rm -rf $(VENV) build dist *.egg-info drsl_kernels/_C*.so drsl_kernels/_build_info.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

define run_ctest
cmake -S . -B $(1) -G Ninja $(2) && cmake --build $(1) && cd $(1) && ctest -j 2 --output-on-failure
endef

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "drsl_kernels needs Python 3.10 or later; $(PYTHON) is not: name another with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(TOOLS): $(BIN)/python
	$(INSTALL) ninja
	command -v cmake > /dev/null || $(INSTALL) cmake
	@touch $@

# --no-build-isolation builds against the torch of this environment, so that comes first.
$(INSTALLED): $(TOOLS) $(BUILD_INPUTS)
	$(INSTALL) torch 'setuptools>=77' pybind11
	$(INSTALL) --no-build-isolation -e '.[lab,test,docs,dev]'
	@$(BIN)/python -W ignore -c 'import drsl_kernels; print(drsl_kernels.info())'
	@touch $@
