# Every target prepares what it needs; a second call starts at once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(VENV)/uv/bin/uv
READY  := $(VENV)/.ready
# A part of the tests: make test PYTEST="-k resume"
PYTEST ?=

.PHONY: setup demo lint test test-slow lock

demo: $(READY)
	@$(BIN)/nightshift demo

# Tests without Ray run side by side; those with it need all cores for themselves. (5 says that none was chosen.)
test: $(READY)
	$(BIN)/pytest -m "not slow" -n auto --dist loadfile --ignore tests/jobs $(PYTEST) || test $$? -eq 5
	$(BIN)/pytest -m "not slow" tests/jobs $(PYTEST) || test $$? -eq 5

test-slow: $(READY)
	$(BIN)/pytest -m slow -n auto --dist worksteal --ignore tests/jobs $(PYTEST) || test $$? -eq 5
	$(BIN)/pytest -m slow tests/jobs $(PYTEST) || test $$? -eq 5

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

setup: $(READY)

# uv prepares the environment in a minute; where it cannot be had, pip does the same from the same lock file. Compiled once
# here: where PYTHONDONTWRITEBYTECODE is set, as in many images, each process of Ray's would compile PyTorch for itself.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "nightshift needs Python 3.11 to 3.13, and $(PYTHON) is another: make PYTHON=python3.11" >&2; exit 1; }
	@echo "preparing $(VENV)" >&2
	@$(PYTHON) -m venv --without-pip --clear $(VENV)
	@if $(PYTHON) -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target $(VENV)/uv uv; then \
	  $(UV) pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock && \
	  $(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .; \
	else \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet -r requirements.lock && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet --no-deps --editable .; \
	fi
	@touch $@

# The lock holds versions only, no hashes of one platform's files and no addresses: any index and any mirror will do.
lock: $(READY)
	$(UV) pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header \
	  --upgrade --group dev --extra demo pyproject.toml --output-file requirements.lock
