# One virtual environment for everything; PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-oldest test-newest release-check lint format docs bench bench-peers faults clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-quickstart: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[quickstart]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps pyannote.audio==4.0.7  # half a minute of speech, for configs/two_speakers.yaml
	touch $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	mkdir -p build
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > build/docs.txt
	$(BIN)/python -m pip install --quiet -r build/docs.txt
	touch $@

quickstart: $(VENV)/.installed-quickstart  ## train a small multimodal LLM on real digits, two pipeline ranks on the CPU
	$(BIN)/bigmac fit --config configs/digits.yaml

# Tests of one process each, which may run beside each other; those that look at how long something takes, or use a GPU;
# the others start several processes each, and two files of them run beside each other.
SINGLE = tests/schedule tests/datamodules tests/models tests/cli tests/benchmarks $(wildcard tests/test_*.py)
TIMED = tests/gpu $(wildcard $(addprefix tests/training/test_,errors.py stopping.py killed.py elastic.py processes.py \
	measuring.py monitor.py profiling.py saving.py)) tests/runtime/test_meeting.py tests/runtime/test_timing.py

test: $(VENV)/.installed-dev  ## the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(SINGLE)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(SINGLE:%=--ignore=%) $(TIMED:%=--ignore=%)
	$(BIN)/python -m pytest $(TIMED)

test-oldest test-newest: test-%: $(VENV)/.installed-dev  ## some tests with the oldest or newest versions that pyproject.toml allows
	$(BIN)/python -m tests.versions $* $(PIN:%=--pin=%) $(INTERPRETER:%=--python=%)

release-check: $(VENV)/.installed-dev  ## wheel and sdist are whole, and what is installed from them works (minutes)
	$(BIN)/python -m tests.release_check

lint: $(VENV)/.installed-dev  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs  ## the pages of docs/ and the reference, in build/site; a dead link is an error
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.installed-dev  ## measured against simulated step time; memory against the number of microbatches
	$(BIN)/python -m benchmarks.schedule_fidelity
	$(BIN)/python -m benchmarks.memory_vs_microbatches
	$(BIN)/python -m benchmarks.data_loading

bench-peers: $(VENV)/.installed-dev  ## this framework beside its peers, and the tables in README.md and docs (40 minutes)
	$(BIN)/python -m benchmarks.paper_workload
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.peers.report --write

faults: $(VENV)/.installed-dev  ## a table of faults, and how a run ends after each (half an hour)
	$(BIN)/python -m benchmarks.faults

clean:
	rm -rf $(VENV) build runs .pytest_cache .ruff_cache .hypothesis
