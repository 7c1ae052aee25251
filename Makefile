# Everything a fresh machine needs is made here: python3 (3.11 or later), pip, make and gcc are enough.
#   make demo    personalise the embedded model on a photograph and look at outputs/demo/demo.png
#   make methods every method on one subject of five pictures, side by side in outputs/methods/bear_plushie.png
#   make compare the supplement's tables, figures and a report on the embedded model, in outputs/compare; make compare-quick less
#   make test    every test that this machine can run
#   make bench   what everything costs beside its peers, in minutes: tables and plots in benchmarks/results/<device>

PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
READY  := .venv/.ready
comma  := ,

.PHONY: demo methods compare compare-quick test bench lint wheel sanitize sanitize-gpu clean

demo: $(READY)
	$(BIN)/deft demo

methods: $(READY)
	$(BIN)/python -m deft_diffusers.toyworld.subjects --output_dir outputs/subjects
	$(BIN)/deft sweep --plan benchmarks/methods.yaml --subject bear_plushie --output_dir outputs/methods

# Two processes share the work; both targets go on where they were.
compare: PLAN = toyworld
compare-quick: PLAN = toyworld-quick
compare compare-quick: $(READY)
	$(BIN)/python -m deft_diffusers.toyworld.subjects --output_dir outputs/subjects
	$(BIN)/python -m deft_diffusers.toyworld.subjects --output_dir outputs/plus --layout dreambench++
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m deft_diffusers compare \
	--plan benchmarks/quality/$(PLAN).yaml --output_dir outputs/$@

test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

bench: $(READY)
	$(BIN)/python -m benchmarks

lint: $(READY)
	$(BIN)/ruff check .

# csrc under AddressSanitizer with UndefinedBehaviorSanitizer, then under ThreadSanitizer: a library of its own for each
NATIVE_TESTS = -m pytest -q -x tests/deft_kernels/test_native.py tests/deft_kernels/test_backends.py -k 'native or cpp'
PRELOAD = $(shell $(or $(CXX),c++) -print-file-name=lib$(1).so)
SANITIZED = PATH="$(CURDIR)/$(BIN):$$PATH" DEFT_KERNELS_BUILD=cpu CXXFLAGS="-g -O1 $(2)" LDFLAGS="$(2)" \
	$(BIN)/python setup.py -q build_ext --build-lib build/$(1) --build-temp build/$(1)/temp

sanitize: $(READY)
	$(call SANITIZED,asan,-fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined)
	LD_PRELOAD="$(call PRELOAD,asan) $(call PRELOAD,stdc++)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=4 \
	DEFT_KERNELS_LIBRARY="$(CURDIR)/build/asan/deft_kernels/_cpu.abi3.so" $(BIN)/python $(NATIVE_TESTS)
	$(call SANITIZED,tsan,-fsanitize=thread)
	LD_PRELOAD="$(call PRELOAD,tsan)" TSAN_OPTIONS="exitcode=66 ignore_noninstrumented_modules=1" OMP_NUM_THREADS=4 \
	DEFT_KERNELS_LIBRARY="$(CURDIR)/build/tsan/deft_kernels/_cpu.abi3.so" $(BIN)/python $(NATIVE_TESTS)

# the kernels on a GPU under NVIDIA's tools
sanitize-gpu: $(READY)
	for tool in memcheck racecheck; do \
	compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest -q -k 'triton or gpu' \
	tests/deft_kernels/test_backends.py tests/deft_kernels/test_cuda.py || exit 1; done

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
