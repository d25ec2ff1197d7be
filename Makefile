# make reproduce    everything from nothing to tables and figures (PRESET=claims/smollm2-135m takes hours and goes on where it was cut off)
# make figures      tables and figures from existing rows alone (PRESET=claims/smollm2-135m): no model is run
# make setup        the virtual environment .venv with the package and its tools (PYTHON=python3.12; LOCK=: newest versions); every target needs it
# make check        style, types and the tests of tests/unit, in about two minutes
# make test         everything that must hold: style, types, notebooks, export, pages, tests
# make test-slurm   a study on a Slurm of one node, as root on Debian (it writes /etc/slurm/slurm.conf)
# make torture      kills at any moment, bad inputs, two runs at once: thousands of tries, about an hour
# make bench        side by side with peers and with the limit (FRESH=--fresh to start anew)
# make export       calib_prune/ from the notebooks, which are the source
# make lock         requirements.lock, exact versions with hashes, from pyproject.toml
# make readme       README.md, docs/results.md and docs/questions from their notebooks
# make docs         the site, in build/site/html
# make lab          the notebooks in JupyterLab
PYTHON ?= python3
PRESET ?= smoke
LOCK   ?= requirements.lock
BIN    := .venv/bin
# Two processes; a file stays in one of them, for its fixtures. Tests take one core each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: reproduce figures setup check test test-slurm torture bench export lock readme docs lab

reproduce: .venv/installed
	$(BIN)/calib-prune fetch
	$(BIN)/calib-prune reproduce --preset $(PRESET)

figures: .venv/installed
	$(BIN)/calib-prune reproduce --preset $(PRESET) --tables-only

setup: .venv/installed

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not real" tests/unit

test: .venv/installed
	$(BIN)/calib-prune fetch
	$(BIN)/ruff check .
	$(BIN)/mypy
	bash scripts/browser.sh
	$(PYTEST)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/nbdev_test --n_workers 2 --do_print --timing

test-slurm: .venv/installed
	$(BIN)/calib-prune fetch
	$(BIN)/python -m pytest -rP tests/system/cluster

torture: .venv/installed
	$(BIN)/calib-prune fetch
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.torture

bench: .venv/installed bench/.venv/installed
	$(BIN)/calib-prune fetch
	$(BIN)/calib-prune fetch qwen2.5-coder-0.5b
	$(BIN)/python -m bench.run all $(FRESH)
	$(BIN)/python -m bench.writing all $(FRESH)
	$(BIN)/python -m bench.quantising all $(FRESH)
	$(BIN)/python -m bench.recovering all $(FRESH)
	$(BIN)/python -m bench.splitting all $(FRESH)
	mkdir -p build/bench
	$(BIN)/python -m papermill --no-progress-bar nbs/paper/bench.ipynb build/bench/bench.ipynb

# Also strips from the notebooks what is not worth keeping.
export: .venv/installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_clean --fname nbs/paper

# Jupyter refuses to run as root unless it is told that this is meant.
lab: .venv/installed
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs

docs: .venv/installed
	$(BIN)/python scripts/site.py
	@echo "open build/site/html/index.html"

lock:
	bash scripts/lock.sh

readme: .venv/installed
	$(BIN)/python scripts/readme.py

.venv/installed: pyproject.toml requirements.lock scripts/setup.sh
	bash scripts/setup.sh $(PYTHON) .venv "$(LOCK)"

bench/.venv/installed: bench/setup_peers.sh
	bash bench/setup_peers.sh $(PYTHON)
	touch $@
