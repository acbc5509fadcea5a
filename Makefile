# Every target sets itself up from nothing: the virtual environment is made when constraints.txt or setup.py is newer than
# it, and so are those of the oldest and the newest torch that setup.py names. `make gpu` alone uses the Python it finds,
# because a GPU machine brings its own torch and triton and may have no network.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(VENV)-oldest-$(notdir $(PYTHON))
NEWEST := $(VENV)-newest-$(notdir $(PYTHON))
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: help train test test-full test-oldest test-newest lint bench resources resources-3.6 mutants sanitize gpu rehearse prepare clean

help:  ## list the targets
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

NEEDS := import sys; sys.version_info < (3, 11) and sys.exit("fusednn needs Python 3.11 or newer: make PYTHON=python3.11")

$(READY): setup.py constraints.txt $(wildcard kernels/native/*)
	@$(PYTHON) -c '$(NEEDS)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	touch $@

# $(1) is the environment, $(2) torch and numpy (Triton 3.6's interpreter needs an older one), $(3) Triton, which need not
# be the one that this torch asks for. 5 GB.
define install
	@$(PYTHON) -c '$(NEEDS)'
	$(PYTHON) -m venv $(1)
	grep -vE '^(torch|triton|numpy|setuptools)==' constraints.txt > $(1)/constraints.txt
	$(1)/bin/python $(PIP) -c $(1)/constraints.txt $(2) -e '.[app,test]'
	$(1)/bin/python $(PIP) --no-deps $(3)
	touch $@
endef

$(OLDEST)/.ready: setup.py constraints.txt $(wildcard kernels/native/*)
	$(call install,$(OLDEST),torch==2.11.0 'numpy<2.4',triton==3.6.0)

$(NEWEST)/.ready: setup.py constraints.txt $(wildcard kernels/native/*)
	$(call install,$(NEWEST),torch==2.14.1 numpy,triton==3.9.0)

train: $(READY)  ## train SimpleNN on the handwritten digits
	$(BIN)/fusednn train

test: $(READY)  ## the tests, about 14 minutes on two cores
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-full: $(READY)  ## what takes longer: the rest of the tests, up to 40 minutes on two cores
	$(BIN)/python -m pytest -n 2 -m slow

# Half of the tests: what meets most of torch and of Triton's interpreter, without the slowest, whose sums are the same.
HALF := -m "not slow" -k "not gradcheck" tests/functional tests/ops tests/training tests/kernels/test_interpreter.py tests/kernels/test_launch.py \
	$(addprefix tests/test_,$(addsuffix .py,dispatch examples fuse init internals modules pytorch_samples reading))

test-oldest: $(OLDEST)/.ready  ## half of the tests with torch 2.11, Triton 3.6 and numpy 2.3
	$(OLDEST)/bin/python -m pytest -n 2 $(HALF)

test-newest: $(NEWEST)/.ready  ## half of the tests with torch 2.14 and Triton 3.9
	$(NEWEST)/bin/python -m pytest -n 2 $(HALF)

lint: $(READY)  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## the benchmarks that this machine can run, and the traffic table
	$(BIN)/python -m pytest bench --benchmark-only
	$(BIN)/python -m bench.traffic

resources: $(READY)  ## registers, spills and instructions of every kernel, compiled ahead of time
	$(BIN)/python -m bench.resources --check

resources-3.6: $(OLDEST)/.ready  ## the same for an H100 under Triton 3.6, which GPU machines have
	$(OLDEST)/bin/python -m bench.resources --check --targets sm_90

mutants: $(READY)  ## break each kernel on purpose; fails if the tests let one breakage live
	$(BIN)/python -m tests.mutants

SANITIZED := build/sanitized
SANITIZE := -g -fsanitize=address,undefined -fno-sanitize-recover=all
PRELOAD = $(shell $(CC) -print-file-name=libasan.so):$(shell $(CC) -print-file-name=libubsan.so)

sanitize: $(READY)  ## the native engine under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -RP fusednn kernels tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/fusednn/_native*
	cd $(SANITIZED) && CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
		$(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	grep -q __asan_init $(SANITIZED)/fusednn/_native*
	cd $(SANITIZED) && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(PRELOAD)" \
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/training tests/kernels/test_native.py -k native

gpu:  ## on a GPU: the tests marked gpu, then the benchmarks, within 9 minutes
	$(PYTHON) -m bench.gpu

rehearse: $(OLDEST)/.ready  ## the same without a GPU, small, on a pretended H100; its times mean nothing
	$(OLDEST)/bin/python -m bench.gpu --rehearse

prepare: $(OLDEST)/.ready  ## compile for an H100 what `make gpu` launches, into build/compiled-kernels.tar.xz
	rm -rf build/compiled-kernels
	$(OLDEST)/bin/python -m bench.gpu --prepare build/compiled-kernels

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(VENV)-oldest* $(VENV)-newest* *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks
