# Two commands, each complete in itself on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# Idle threads sleep instead of spinning: on cores that something else needs too, spinning costs four times the time.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test pytest slow results claims lint clean

help:
	@echo "make demo   install, then train, quantize and compare (under 5 minutes on 2 cores)"
	@echo "make test   install, then run linters and tests"
	@echo "make slow   the tests that take more than a minute each"
	@echo "make claims  what the papers claim, on small models, written into tests/claims/RESULTS.md"
	@echo "make results   the demonstrations over three seeds, written into the README"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	touch $@

demo: install
	$(BIN)/qlightning fit --config configs/quickstart.yaml

# mypy keeps one core busy for a minute or two: the tests run beside it.
test: install
	$(MAKE) --no-print-directory -j 2 lint pytest

# One thread per process: two busy cores shared by two times two threads wait for each other most of the time.
pytest: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal --timeout 600 -m "not slow"

slow: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --timeout 3600 -m slow

# The demonstrations over three seeds: tests/benchmarks/RESULTS.md and the table in the README.
results: install
	$(BIN)/python tests/benchmarks/demo.py

# What the papers claim, on small models: tests/claims/RESULTS.md.
claims: install
	$(BIN)/python tests/claims/run.py --jobs $(WORKERS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
