# make demo    build, then run the main job
# make test    build, then all tests, lint, format and type checks
# make test-kernels    the C++ tests of csrc/kernels;  make test-sanitized  the same under ASan, UBSan and TSan
# make test-long   the tests that take minutes, such as long fuzzing
# make test-torch TORCH=torch==2.14.1    build and the short tests under another torch, in a copy of the sources
# make bench   build, then the benchmarks beside the baselines
# make build   compile what changed, in place
# make lint    ruff, clang-format and mypy;  make format  mends what the first two can
#
# All of it happens in a virtual environment of its own. PYTHON=python3.12 chooses the interpreter, VENV=folder
# the environment, TORCH='...' what pip is given to install torch. DYNQUANT_CUDA=1 compiles the CUDA part too.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
JOBS := $(shell nproc)
comma := ,
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CPP = $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-kernels test-sanitized test-torch test-short test-long bench build lint format clean
.NOTPARALLEL:

demo: $(VENV)/demo.stamp build
	$(BIN)/python -m dynquant demo

test: $(VENV)/test.stamp build lint test-kernels
	$(BIN)/python -m pytest

# csrc/kernels by its own CMakeLists.txt. doctest is the system's, or Debian's package unpacked in $(VENV).
define KERNEL_TESTS
	@prefix=$$($(BIN)/python -m tests.support.doctest_header $(VENV)/doctest) && \
	$(BIN)/cmake --log-level=WARNING -G Ninja -S csrc/kernels -B $(1) -DCMAKE_PREFIX_PATH=$$prefix \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja $(2) && \
	$(BIN)/cmake --build $(1) --parallel $(JOBS) -- --quiet && \
	$(BIN)/ctest --test-dir $(1) --verbose --no-tests=error
endef

test-kernels: $(VENV)/test.stamp
	$(call KERNEL_TESTS,build/kernels)

test-sanitized: $(VENV)/test.stamp
	$(call KERNEL_TESTS,build/kernels-address,-DDYNQUANT_SANITIZE=address$(comma)undefined)
	$(call KERNEL_TESTS,build/kernels-thread,-DDYNQUANT_SANITIZE=thread)

# A copy, so that the extension of this folder's own torch stays.
OTHER_TORCH := build/other-torch
SHORT_TESTS := tests/ops tests/modules tests/checkpoint tests/conversion tests/fusion tests/calibration tests/fixtures

test-torch:
	mkdir -p $(OTHER_TORCH)
	git ls-files -z | xargs -0 cp --parents --preserve=timestamps --target-directory $(OTHER_TORCH)
	$(MAKE) -C $(OTHER_TORCH) test-short VENV=$(abspath $(VENV)-$(subst ==,-,$(firstword $(TORCH)))) TORCH='$(TORCH)'

test-short: $(VENV)/test.stamp build
	$(BIN)/python -m pytest $(SHORT_TESTS)

test-long: $(VENV)/test.stamp build
	$(BIN)/python -m pytest -m long

bench: $(VENV)/bench.stamp build
	$(BIN)/python -m dynquant bench

build: $(VENV)/torch.stamp
	$(BIN)/python setup.py --quiet build_ext --inplace

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

$(VENV)/torch.stamp: Makefile
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV)"
	$(PIP) 'setuptools>=77' ninja $(TORCH)
	@touch $@

# The extras of pyproject.toml by name. The extension is left out here: `build` compiles it in place.
$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml setup.py
	DYNQUANT_BUILD=0 $(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

clean:
	rm -rf build $(VENV) *.egg-info dynquant/_C.*.so dynquant/_build.json
