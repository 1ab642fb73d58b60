# make demo    install and run the demonstration: demo_output/report.html
# make test    install and run all tests (what .ci/run does)
# make check   lint, types, formatting        make format  mend the formatting
# make bench   benchmarks on this CPU         make gpu     tests and benchmarks on a CUDA machine
# Everything but `make gpu` goes into .venv, by the versions of constraints.txt. PYTHON=... chooses the interpreter.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
DEMO_OUTPUT ?= demo_output

# one architecture builds in seconds: this machine's GPU, or the one whose machine code the tests read
CONELENS_CUDA_ARCHITECTURES ?= $(if $(shell command -v nvidia-smi),native,90)
export CONELENS_CUDA_ARCHITECTURES

SOURCES := $(shell find csrc kernels python -type f -not -name '*.pyc' -not -path '*/.*') \
  CMakeLists.txt pyproject.toml constraints.txt README.md LICENSE
CPP := $(shell find csrc kernels tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-interpreter test-main check format bench gpu clean

demo: $(VENV)/.stamp-demo
	$(BIN)/conelens demo --out $(DEMO_OUTPUT)

test: test-interpreter test-main

# Triton decides at import whether kernels are interpreted: a process of its own
test-interpreter: $(VENV)/.stamp-test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/triton

test-main: $(VENV)/.stamp-test
	$(BIN)/python -m pytest -q -m "not slow"

check: $(VENV)/.stamp-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.stamp-test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.stamp-test
	$(BIN)/python -m benchmarks.table

# no environment of its own: a CUDA build of torch is too large to fetch, so the machine's is used
gpu:
	PYTHON="$(PYTHON)" bash benchmarks/gpu.sh

clean:
	rm -rf $(VENV) build $(DEMO_OUTPUT)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "conelens needs Python 3.11 or newer; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-demo: $(BIN)/python $(SOURCES)
	$(INSTALL) '.[demo]'
	@touch $@

$(VENV)/.stamp-test: $(BIN)/python $(SOURCES)
	$(INSTALL) '.[test,cli,report,triton,dev]'
	@touch $@
