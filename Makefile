# Every target sets up what it needs: `make demo` and `make test` work on a machine with nothing but Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: docs gpu-packages demo test slow mutants coverage setup check golden bench bench-grpo gpu build clean

demo: setup  ## train five architectures at matched compute and write the report (six minutes on two quiet cores)
	$(BIN)/finemoe compare recipes/demo.toml --out runs/demo

test: setup  ## the default test suite
	$(BIN)/pytest -n auto

slow: setup  ## the tests that take minutes: narrower vectors, every published configuration, llama.cpp where it is installed
	$(BIN)/pytest -n auto -m slow

mutants: setup  ## break one line at a time and see the tests notice, about ten minutes; ARGS="--only NAME"
	$(BIN)/python tests/mutants/run.py $(ARGS)

coverage: setup  ## which lines the default suite runs
	$(BIN)/pip install --quiet --constraint constraints.txt coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n auto -q
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --ignore-errors --skip-covered --include 'src/*'

setup: $(VENV)/.installed  ## create .venv and install finemoe with its development tools

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("finemoe needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	@echo "finemoe: making $(VENV), once; nothing outside this folder is changed"
	@$(PYTHON) -m venv $(VENV)
	@echo "finemoe: installing torch and the rest into it; the first time a gigabyte or so is fetched, which takes minutes"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@echo "finemoe: installed; . $(BIN)/activate puts it on your path"
	@touch $@

check: setup  ## formatting, lint, types, floors and budgets
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin  # what macOS lacks
	$(BIN)/pytest -q -n auto tests/architecture

golden: setup  ## re-record the golden trajectories; review the difference before committing it
	$(BIN)/python tests/golden/record.py
	git diff --stat -- tests/golden

bench: setup  ## speed beside transformers and llama.cpp, 15 to 20 minutes; PEER=python that has them, ARGS=--quick
	$(BIN)/python -m benchmarks.speed $(if $(PEER),--peer $(PEER)) $(ARGS)

bench-grpo: setup  ## speed of GRPO beside the bare engine and TRL, about ten minutes; TRL=python that has it, ARGS=--quick
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.grpo_speed $(if $(TRL),--trl $(TRL)) $(ARGS)

gpu:  ## gpu tests, then speed on a CUDA device beside transformers, under nine minutes; installs nothing where torch is there
	@python=$$(for python in $(PYTHON) $(BIN)/python; do $$python -c 'import torch' 2>/dev/null && echo $$python && break; done); \
	if [ -z "$$python" ]; then $(MAKE) setup && python=$(BIN)/python || exit; fi; \
	PYTHONPATH="src:.:.gpu$${PYTHONPATH:+:$$PYTHONPATH}" $$python -m benchmarks.gpu $(ARGS)

gpu-packages: setup  ## what a GPU machine without a package index lacks, into .gpu; FOR=3.12 is its Python, carry the folder along
	$(BIN)/pip install --quiet --upgrade --target .gpu --python-version $(FOR) --only-binary=:all: pydantic zstandard
FOR ?= 3.12

docs: setup  ## the documentation as a site; a link that leads nowhere fails
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build -q -W --keep-going -b html -c docs . docs/_build/html
	@echo open docs/_build/html/docs/index.html

build: setup  ## the wheel, in dist/
	$(BIN)/python -m build --wheel --outdir dist .

clean:  ## remove everything that is made here, runs excepted
	rm -rf $(VENV) dist build docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
