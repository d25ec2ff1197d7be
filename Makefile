# make reproduce   everything from nothing to the table and heat map (PRESET=smoke)
# make test        everything that must hold: style, notebooks, export, README, tests
PYTHON ?= python3
PRESET ?= smoke
BIN    := .venv/bin

.PHONY: reproduce test export readme

reproduce: .venv/installed
	$(BIN)/calib-prune fetch
	$(BIN)/calib-prune reproduce --preset $(PRESET)

test: .venv/installed
	$(BIN)/calib-prune fetch
	$(BIN)/ruff check .
	$(BIN)/python -m pytest
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --timing

# notebooks are the source: write calib_prune/ from them, strip what is not worth keeping
export: .venv/installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_clean --fname nbs/paper

readme: .venv/installed
	$(BIN)/python scripts/readme.py

.venv/installed: pyproject.toml scripts/setup.sh
	bash scripts/setup.sh $(PYTHON) .venv
	touch $@
