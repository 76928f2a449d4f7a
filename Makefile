# make demo   build into an own virtual environment and run the main job
# make test   build, all tests, lint, format and type checks
# make bench  the benchmarks, against every rival that is installed
#
# PYTHON=python3.12 chooses the interpreter, VENV=folder the environment,
# TORCH="torch==2.13.0 ..." what pip installs torch from.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check
RUN := $(VENV)/bin/python
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.PHONY: demo test bench build lint types format clean

demo: $(VENV)/demo.stamp build
	$(RUN) -m dynquant demo

test: $(VENV)/test.stamp $(VENV)/lint.stamp build lint
	$(RUN) -m pytest

bench: $(VENV)/demo.stamp $(VENV)/bench.stamp build
	$(RUN) -m dynquant bench

# The environment's own torch decides what is built; BuildExtension recompiles what changed.
build: $(VENV)/torch.stamp
	$(RUN) setup.py --quiet build_ext --inplace

lint: $(VENV)/lint.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(if $(CPP),$(VENV)/bin/clang-format --dry-run -Werror $(CPP))
	$(VENV)/bin/mypy

format: $(VENV)/lint.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(if $(CPP),$(VENV)/bin/clang-format -i $(CPP))

$(VENV)/torch.stamp: Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' ninja $(TORCH)
	touch $@

# An editable install without the extension: `build` makes that in place.
$(VENV)/%.stamp: $(VENV)/torch.stamp pyproject.toml setup.py
	DYNQUANT_BUILD=0 $(PIP) --no-build-isolation --editable '.[$*]'
	touch $@

clean:
	rm -rf build $(VENV) dynquant/_C.*.so dynquant/_build.json *.egg-info
