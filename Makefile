# make demo and make test do all the set-up they need: a .venv, and every dependency at its pinned version.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo federation test test-all check bench docs
.DEFAULT_GOAL := demo

$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("comigs needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(BIN)/.ready  ## train four clients on the bundled text and write a report (about two minutes)
	$(BIN)/comigs run configs/quickstart.toml

federation: $(BIN)/.ready  ## the same over a network: a server and four devices, all on this machine (about five minutes)
	$(BIN)/python scripts/federation_demo.py

test: $(BIN)/.ready  ## everything but the slow tests
	$(BIN)/python -m pytest -m 'not slow and not gpu' --timeout 300 --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-all: $(BIN)/.ready
	$(BIN)/python -m pytest

check: $(BIN)/.ready
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/mypy

bench: $(BIN)/.ready  ## ratios to plain LoRA, a naive mixture and the base alone; time to start
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/startup.py

docs: $(BIN)/.ready  ## write docs/config.md from the config's own descriptions
	$(BIN)/python scripts/config_docs.py
