# make train and make test are all a fresh machine needs: Python 3.10 or later and a C++17 compiler.
PYTHON ?= python3
# The torch requirement to install and build against, such as TORCH="torch==2.15.0".
TORCH ?= torch==2.13.0
VENV ?= .venv
# NATIVE builds the CUDA library where there are nvcc and a GPU, for that GPU; ON insists on it, for every GPU that
# moeops supports; AUTO builds it for every GPU where there is nvcc; OFF leaves it out.
MOEOPS_CUDA ?= NATIVE
MOEOPS_WERROR ?= OFF
# ON compiles the general CUDA kernels in half the time, and makes them slow: for checks, not for use.
MOEOPS_QUICK_CUDA ?= OFF
# Options for the program that train, test or bench starts, such as ARGS="--no-compare".
ARGS ?=

BIN := $(VENV)/bin
TORCH_STAMP := $(VENV)/torch.stamp
OPTIONS_STAMP := $(VENV)/options.stamp
BUILD_STAMP := $(VENV)/build.stamp
DOCS_STAMP := $(VENV)/docs.stamp
# What the compiled libraries and the list of installed packages depend on.
BUILD_INPUTS := pyproject.toml CMakeLists.txt cmake/native_gpu.cmake \
  $(shell find moeops -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name __init__.py)
CPP_SOURCES := $(shell find moeops/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help train test build docs lint format bench cuda-check dist-check sanitize lowest wheels clean FORCE

help:
	@echo "make train        train the example language model; ARGS=\"--help\" lists its options"
	@echo "make test         run every test that this machine can run"
	@echo "make build        build and install moeops in $(VENV), with TORCH=\"$(TORCH)\""
	@echo "make docs         build the site into build/site, with every link checked; needs Python 3.11"
	@echo "make lint         ruff, clang-format, mypy and the floors of the layout"
	@echo "make format       apply ruff and clang-format"
	@echo "make bench        measure; ARGS=\"--help\" lists its options"
	@echo "make cuda-check   compile every CUDA source and check the libraries' symbols; needs nvcc, no GPU"
	@echo "make dist-check   sdist, wheel, pip install and editable install, each in its own environment"
	@echo "make sanitize     the op tests under AddressSanitizer and UndefinedBehaviorSanitizer; needs GCC"
	@echo "make lowest       tests with the oldest versions that pyproject.toml allows; needs Python 3.10 and 3.11"
	@echo "make wheels       build the CPU and the CUDA wheel, check and use them; needs nvcc, no GPU"
	@echo "make clean        remove $(VENV), build folders and caches"

train: build
	$(BIN)/python examples/train_lm.py $(ARGS)

test: build
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20 $(ARGS)

build: $(BUILD_STAMP)

# Another TORCH or PYTHON makes the environment anew; the same ones leave the stamp untouched.
$(TORCH_STAMP): FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != "$(PYTHON) $(TORCH)" ]; then \
	  set -ex; \
	  rm -rf "$(VENV)"; \
	  "$(PYTHON)" -m venv "$(VENV)"; \
	  $(BIN)/python -m pip install --quiet --upgrade "pip>=24"; \
	  $(BIN)/python -m pip install "$(TORCH)"; \
	  $(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" \
	    > $(VENV)/constraints.txt; \
	  echo "$(PYTHON) $(TORCH)" > $@; \
	fi

$(OPTIONS_STAMP): $(TORCH_STAMP) FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != "$(MOEOPS_CUDA) $(MOEOPS_WERROR) $(MOEOPS_QUICK_CUDA)" ]; then \
	  echo "$(MOEOPS_CUDA) $(MOEOPS_WERROR) $(MOEOPS_QUICK_CUDA)" > $@; \
	fi

# Without build isolation moeops is compiled against the torch in $(VENV); the constraint keeps that torch in place.
$(BUILD_STAMP): $(TORCH_STAMP) $(OPTIONS_STAMP) $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt \
	  "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11.1"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation \
	  -c $(VENV)/constraints.txt \
	  --config-settings=cmake.define.MOEOPS_CUDA=$(MOEOPS_CUDA) \
	  --config-settings=cmake.define.MOEOPS_WERROR=$(MOEOPS_WERROR) \
	  --config-settings=cmake.define.MOEOPS_QUICK_CUDA=$(MOEOPS_QUICK_CUDA) \
	  --config-settings=cmake.define.CMAKE_EXPORT_COMPILE_COMMANDS=ON \
	  -e ".[examples,dev,megatron,numba,onnx,peft,transformers]"
	@touch $@

FORCE:

# The requirements of the extra alone: to install moeops with it would compile moeops once more.
$(DOCS_STAMP): $(BUILD_STAMP) pyproject.toml
	$(BIN)/python -c "import tomllib; f = open('pyproject.toml', 'rb'); \
	  print(*tomllib.load(f)['project']['optional-dependencies']['docs'], sep='\n')" > $(VENV)/docs.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -r $(VENV)/docs.txt
	@touch $@

docs: $(DOCS_STAMP)
	$(BIN)/python scripts/site/build.py $(ARGS)

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: build
	$(BIN)/python -m benchmarks.run $(ARGS)

cuda-check:
	@command -v "$${CUDACXX:-nvcc}" > /dev/null || { \
	  echo "cuda-check: nvcc must be on PATH, or in CUDACXX, to compile the CUDA sources." >&2; exit 1; }
	$(MAKE) build MOEOPS_CUDA=ON MOEOPS_WERROR=ON
	$(BIN)/python scripts/check_libraries.py --cuda

dist-check: build
	$(BIN)/python scripts/check_dist.py

sanitize: build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/sanitize_cpu.py -n 2 -q -m "not cuda" $(ARGS)

# The environment of the oldest versions has a Python of its own: ARGS="--python PATH" names it.
lowest: build
	$(BIN)/python scripts/check_lowest.py $(ARGS)

wheels: build
	$(BIN)/python scripts/build_wheels.py $(ARGS)

clean:
	rm -rf "$(VENV)" build dist .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
