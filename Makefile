# Everything a fresh machine needs is made here: python3 (3.11 or later), pip, make and gcc are enough.
#   make demo    personalise the embedded model on a photograph and look at outputs/demo/demo.png
#   make test    every test that this machine can run
#   make bench   one adapted layer beside its peers

PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
READY  := .venv/.ready

.PHONY: demo test bench lint wheel clean

demo: $(READY)
	$(BIN)/deft demo

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-sort=name

lint: $(READY)
	$(BIN)/ruff check .

wheel: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --wheel --no-isolation

# Where there is no NVIDIA GPU the CPU build of torch is tried first: an index that has it (PIP_EXTRA_INDEX_URL) saves
# gigabytes of CUDA libraries. The plain package works too.
$(READY): requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@if command -v nvidia-smi >/dev/null; then set -- $(TORCH); else set -- $(TORCH)+cpu; fi; \
	echo "installing $$1"; \
	$(BIN)/pip install --quiet "$$1" || { \
	echo "$$1 is in none of your package indexes: installing $(TORCH) with whatever it brings"; \
	$(BIN)/pip install --quiet "$(TORCH)"; }
	$(BIN)/pip install --quiet -r requirements-dev.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf .venv build dist outputs *.egg-info
