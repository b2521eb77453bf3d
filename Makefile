# make demo   sample the bundled pipeline      make test   run the tests
# make lint   ruff                             make readme rewrite the table of systems in README.md
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --constraint constraints.txt --editable

.PHONY: install demo test lint readme dist clean

$(VENV)/.hfgen: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hfgen: constraints.txt needs Python 3.11 or newer; pass one as PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); torch is large, so the first time takes some minutes"
	$(INSTALL) .
	@touch $@

$(VENV)/.hfgen-test: $(VENV)/.hfgen
	$(INSTALL) ".[test]"
	@touch $@

install: $(VENV)/.hfgen

demo: $(VENV)/.hfgen
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

test: $(VENV)/.hfgen-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.hfgen-test
	$(BIN)/ruff check .

readme: $(VENV)/.hfgen
	$(BIN)/python -m hfgen.systems --markdown README.md

dist: $(VENV)/.hfgen-test
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist *.egg-info outputs
