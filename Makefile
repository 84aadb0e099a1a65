# make demo    install, then watch the embedded model answer with and without drafts
# make test    install, then run the tests
# make check   install, then format, lint and types, as CI does
# make format  rewrite the sources in the project's format
#
# Each target makes and fills .venv by itself. TORCH picks the torch build; the default is the version
# that the figures in docs/ were measured with. TRANSFORMERS tries another transformers: make test
# TRANSFORMERS=transformers==5.17.0

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers
BIN := .venv/bin
SOURCES := src tests benchmarks scripts

# Another build or version is another installation.
INSTALLED := .venv/installed-$(subst =,-,$(TORCH)-$(TRANSFORMERS))

.PHONY: demo test check format
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/selfdraft demo

test: $(INSTALLED)-dev
	$(BIN)/python -m pytest -q

check: $(INSTALLED)-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

format: $(INSTALLED)-dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

$(INSTALLED): pyproject.toml
	@echo "Filling .venv (torch and transformers: some minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "$(TRANSFORMERS)" -e .
	@touch $@

$(INSTALLED)-dev: $(INSTALLED)
	$(BIN)/python -m pip install -q "$(TRANSFORMERS)" -e ".[dev]"
	@touch $@
