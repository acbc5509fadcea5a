# Every target sets itself up from nothing: the virtual environment is made when constraints.txt or
# setup.py is newer than it; that of rehearse, prepare and resources-3.6 when it is not there. `make gpu` alone uses the
# Python it finds, because a GPU machine brings its own torch and triton and may have no network.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLD := $(VENV)-3.6-$(notdir $(PYTHON))

.PHONY: help train test test-full lint bench resources resources-3.6 mutants sanitize gpu rehearse prepare clean

help:  ## list the targets
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): setup.py constraints.txt $(wildcard kernels/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# What GPU machines have: torch 2.11 and Triton 3.6, 5 GB. numpy is older, because Triton 3.6's interpreter needs it.
$(OLD)/.ready:
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.11.0 triton==3.6.0 'numpy<2.4' \
		pytest==9.2.0 pytest-benchmark==5.3.1 pytest-xdist==3.8.0
	touch $@

train: $(READY)  ## train SimpleNN on the handwritten digits
	$(BIN)/fusednn train

test: $(READY)  ## the tests, about 14 minutes on two cores
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-full: $(READY)  ## what takes longer: the rest of the tests, up to 40 minutes on two cores
	$(BIN)/python -m pytest -n 2 -m slow

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

resources-3.6: $(OLD)/.ready  ## the same for an H100 under Triton 3.6, which GPU machines have
	$(OLD)/bin/python -m bench.resources --check --targets sm_90

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
		$(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/training -k native

gpu:  ## on a GPU: the tests marked gpu, then the benchmarks, within 9 minutes
	$(PYTHON) -m bench.gpu

rehearse: $(OLD)/.ready  ## the same without a GPU, small, on a pretended H100; its times mean nothing
	$(OLD)/bin/python -m bench.gpu --rehearse

prepare: $(OLD)/.ready  ## compile for an H100 what `make gpu` launches, into build/compiled-kernels.tar.xz
	rm -rf build/compiled-kernels
	$(OLD)/bin/python -m bench.gpu --prepare build/compiled-kernels

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(VENV)-3.6* *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks
