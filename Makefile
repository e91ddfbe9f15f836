# make demo   the whole job on the embedded example, in about three minutes after installation
# make test   lint, types and tests, in about five minutes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint mutants drill test-all claims asset clean

demo: $(STAMP)
	$(BIN)/fewstep demo

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py

# 200 kills, every part of the state forgotten once, 1,000 damaged files: 5 to 15 minutes
drill: $(STAMP)
	$(BIN)/python tools/drill.py --kills 200 --corruptions 1000 --out runs/drill

test-all: test mutants drill

# the published claims on digits, an hour and a half on one core; finished trials are kept
claims: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/claims/digits.py
	$(BIN)/python benchmarks/claims/figures.py

asset: $(STAMP)
	$(BIN)/python tools/train_digit_features.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fewstep needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
