# make demo: set up, then the whole recipe in miniature on real text (continues where it stopped)
# make test: set up, then all the tests, with small real data
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all test-parity lint setup clean

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else "error: Python %d.%d found, 3.11 to 3.13 needed: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m experiments.demo.run

# Slow tests (marked "slow") only run in test-all; "parity" ones need torch and transformers.
test: $(STAMP)
	$(BIN)/ruff check -q .
	$(BIN)/ruff format --check -q .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not parity'

test-all: $(STAMP)
	$(BIN)/ruff check -q .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not parity'

# torch's plain wheel brings gigabytes of CUDA: install a CPU build beforehand to avoid that.
test-parity: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[parity]'
	$(BIN)/python -m pytest -m parity

clean:
	rm -rf $(VENV) runs/demo
