# make demo   cache a teacher, train students, compare them (a quarter of an hour on 2 cores)
# make test   the tests that CI runs    make test-all   the slow and thorough ones too
# make check  ruff, mypy                make lock       renew the lock files
#                                       make check-install  resolve each install line of docs/installation.md

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Two processes with one thread each, and whole files of tests: most of the time is spent in starting `kd`.
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

# torch is installed first and by itself, because its index is the user's choice (docs/installation.md). pip checks every
# other file against the hashes of the lock.
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
