# make demo    set up, train a solver on the embedded model, end with a table and pictures (75 to 100 seconds)
# make test    set up, run the tests, in WORKERS=2 processes of one thread
# make experiments  set up, run the experiments on the embedded models: experiments/RESULTS.md (three quarters of an hour on two cores)
# make bench   set up, run the benches, write bench/results/*.csv
# make fuzz    set up, fuzz the readers of foreign files for five minutes (FUZZ_SECONDS=300)
# make docs    set up, build the documentation into site/
# make lint    set up, check formatting, lints and types
.PHONY: demo test experiments bench fuzz docs lint format clean
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

$(READY): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch torchvision
	$(BIN)/pip install -q -e ".[test]"
	touch $@

demo: $(READY)
	$(BIN)/python -m gas_engine.train --checkpoint-every 1

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal tests

experiments: $(READY)
	$(BIN)/python experiments/run.py

bench: $(READY)
	$(BIN)/python -m pytest -q bench --save-csv

fuzz: $(READY)
	$(BIN)/python -c "import atheris" 2> /dev/null || $(BIN)/pip install -q atheris
	$(BIN)/python tests/fuzz/fuzz_files.py

docs: $(READY)
	$(BIN)/python -c "import mkdocs, material, mkdocstrings" 2> /dev/null || $(BIN)/pip install -q -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu csrc/tests/*.h csrc/tests/*.cpp
	$(BIN)/mypy
	$(BIN)/python experiments/readme.py --check

format: $(READY)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu csrc/tests/*.h csrc/tests/*.cpp

clean:
	rm -rf $(VENV) build *.egg-info gas_engine/_native*.so site
