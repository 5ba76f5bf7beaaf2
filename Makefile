# The verbs of this project; `make` alone lists them. Needs make and Python 3.11 or later (PYTHON=python3.12 chooses one).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# The stamp is younger than the two files it was made from exactly when the environment is what they say.
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
RESULT := benchmarks/results/full.json
VERSIONS ?= python3.12=2.6.0 python3.13=2.15.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-cuda check bench bench-quick bench-recovery bench-workers bench-cuda chaos soak versions
.PHONY: docs clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make .venv with everything that development needs

demo: $(STAMP)  ## train on damaged data, with torch's loader and with this one (under two minutes)
	@$(PY) -m robustloader demo

# The frameworks have a process of their own: they bring hundreds of megabytes and threads, which others should not fork.
test: $(STAMP)  ## run all tests
	$(PY) -m pytest --ignore=tests/frameworks
	$(PY) -m pytest tests/frameworks

test-cuda: $(STAMP)  ## run the tests that need a CUDA device, and say why where there is none
	$(PY) -m pytest -rs tests/cuda

check: $(STAMP)  ## format, lint, types and the fast tests (about a minute)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/unit

bench: $(BENCH_STAMP)  ## measure everything against its peers, redraw figures and tables (15 minutes, quiet machine)
	$(PY) -m benchmarks --out $(RESULT)
	$(PY) -m benchmarks.figures $(RESULT) docs/images
	$(PY) -m benchmarks.tables $(RESULT) docs/benchmarks.md

bench-quick: $(BENCH_STAMP)  ## the same with few rounds, printed only (two minutes)
	$(PY) -m benchmarks --quick --out build/bench-quick.json

bench-recovery: $(BENCH_STAMP)  ## measure what kills and bad samples cost (under four minutes, quiet machine)
	$(PY) -m benchmarks.recovery --out benchmarks/results/recovery.json --page docs/benchmarks.md

bench-workers: $(BENCH_STAMP)  ## how many workers: seven datasets, tune(), "auto", the simulator (20 minutes, quiet machine)
	$(PY) -m benchmarks.num_workers --out benchmarks/results/num_workers.json --plot docs/images
	$(PY) -m benchmarks.workers_page benchmarks/results/num_workers.json docs/guide/num-workers.md

bench-cuda: $(BENCH_STAMP)  ## measure copies to a CUDA device and how long it idles in training (needs one; ten minutes)
	$(PY) -m benchmarks.cuda --out benchmarks/results/cuda.json --page docs/benchmarks.md

versions: $(STAMP)  ## the fast suite under other versions, one environment at a time (hours; VERSIONS='python3.12=2.6.0 …')
	$(PY) -m tests.versions $(VERSIONS) -o benchmarks/results/versions.json --page docs/compatibility.md

chaos: $(STAMP)  ## every situation in every mode, 20 times over (hours; goes on where it stopped)
	$(PY) -m tests.chaos.full --rounds 20 -o benchmarks/results/chaos.json

soak: $(STAMP)  ## kill workers at random for half an hour, then convict nobody for twenty minutes
	$(PY) -m tests.soak --seconds 1800 --seed 7 -o benchmarks/results/soak.json
	$(PY) -m tests.soak --convict --seconds 1200 --seed 7 -o benchmarks/results/convict.json

docs: $(STAMP)  ## check the links and build the site into build/site (a quarter of a minute)
	$(PY) docs/check.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo open build/site/index.html

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BENCH_STAMP): $(STAMP)
	$(PY) -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0] + ": try make PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python's venv module is missing: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@
