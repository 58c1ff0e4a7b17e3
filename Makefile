# make demo   everything, from nothing: teacher cached, students trained, compared (a quarter of an hour on 2 cores)
# make test   the tests CI runs         make test-all   the slow and thorough ones too
# make check  ruff, mypy                make lock       renew the lock files
#                                       make check-install  resolve each install line of the README

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Two processes, each with whole files of tests and one thread: most of the time goes into starting `kd`.
SIDE_BY_SIDE := -n 2 --dist loadfile

.PHONY: demo test test-all check lock check-install install clean

demo: $(VENV)/ready
	$(BIN)/kd demo

test: check
	$(BIN)/pytest -m "not slow" $(SIDE_BY_SIDE)

test-all: check
	$(BIN)/pytest $(SIDE_BY_SIDE)

check: $(VENV)/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/ready

# torch first, by itself: the index it comes from is the user's choice (see docs/installation.md). Of the rest pip checks
# every file against the hashes of the lock.
$(VENV)/ready: requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kdcache needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/cpu.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m kdcache.models.embedded
	touch $@

$(VENV)/ready-to-test: $(VENV)/ready requirements/test.lock
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements/test.lock
	touch $@

lock:
	$(PYTHON) -m pip install --quiet uv
	$(PYTHON) requirements/lock.py

check-install: $(VENV)/ready-to-test
	$(BIN)/python requirements/resolve.py

clean:
	rm -rf $(VENV)
