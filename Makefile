# make demo: a digital DSI subject through the whole pipeline; make test: the tests; make docs: the site.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint docs image clean

demo: $(VENV)/.installed
	$(BIN)/dsiprep-tools demo demo

# One thread each: tests are small, and waiting threads cost more than they gain.
TEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: $(VENV)/.tested
	$(TEST)

test-slow: $(VENV)/.tested
	$(TEST) -m slow

lint: $(VENV)/.linted
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.documented
	$(BIN)/mkdocs build --strict --quiet --site-dir site

# The packages of the container in a folder, and a phantom preprocessed in it; needs root and mmdebstrap.
image:
	rm -rf build/image
	containers/chroot.sh build build/image
	containers/chroot.sh try build/image

clean:
	rm -rf $(VENV) demo site

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("dsiprep needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
# On Python 3.11 a local package index may offer this version of torch as a CPU build, which is much smaller.
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' && \
	  $(BIN)/python -m pip install --quiet torch==2.13.0 || true

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

$(VENV)/.linted: $(VENV)/.tested
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

$(VENV)/.documented: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@
