# Two commands for a new machine with Python 3.10 or newer: `make demo` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint types contracts pytest wheel fuzz benchmark world clean

help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/.run $@

demo: .venv/.run  ## audit the bundled model and write a report
	$(BIN)/mnemoscope demo

test: lint types contracts pytest wheel  ## everything CI checks

lint: .venv/.dev  ## format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.dev  ## types of src
	$(BIN)/mypy

contracts: .venv/.dev  ## which rooms may know each other
	$(BIN)/lint-imports

pytest: .venv/.dev  ## the tests; warnings are errors
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto  # one thread each: workers and threads would fight for the cores

wheel: .venv/.dev  ## build the wheel and use it away from this folder
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel > /dev/null
	$(BIN)/python tests/check_wheel.py build/wheel

SEED ?= 0
MINUTES ?= 15
fuzz: .venv/.dev  ## altered documents, strange requests and kills; SEED=, MINUTES=, KIND='run folders' (docs/fuzz.md; Linux)
	$(BIN)/python -m fuzz --seed $(SEED) --minutes $(MINUTES) $(if $(KIND),--kind '$(KIND)') --json build/fuzz.json --markdown build/fuzz.md

benchmark: .venv/.dev  ## measure again what docs/benchmark.md, descriptors.md, mitigations.md and model-card.md state (two hours)
	for script in world copies descriptors captions benchmark; do $(BIN)/python bench/$$script.py || exit 1; done
	$(BIN)/python bench/controls.py --write docs/benchmark.md
	$(BIN)/python bench/mitigations.py --seeds 2 --steps 25

world: .venv/.run  ## rebuild the bundled pictures from their packages (needs npm) and compare
	$(BIN)/python -m mnemoscope.demo.build build/world --check

clean:  ## remove everything that was made
	rm -rf .venv build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
