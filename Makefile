# Everything a developer does, from a fresh clone. Needs Python >= 3.11 and make.

VENV ?= .venv
# Options passed on, for example: make demo ARGS="--dataset digits --epochs 3"
ARGS ?=
# Backends, for example: make test BACKEND=jax. Default: all three, or for the demo JAX, which is
# the smallest to install.
BACKEND ?=
# What "make constraints" asks for, for example: TORCH=torch==2.13.0
TORCH ?= torch
# Which figures to re-run, for example: make reproduce NAME=moons ARGS=--quick
NAME ?= moons

# On Linux, PyPI's torch brings several GB of CUDA. For the CPU build, set
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# It is no default: without a way to that server, pip tries again for minutes.

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
INSTALLED := $(VENV)/.installed
DEMO_BACKEND = $(or $(firstword $(BACKEND)),jax)
BACKENDS = $(foreach b,$(BACKEND),--backend $(b))

export TF_CPP_MIN_LOG_LEVEL ?= 3

.DEFAULT_GOAL := help
.PHONY: help install demo test quick matrix fuzz lint format docs bench reproduce constraints dist clean \
  distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make the environment in .venv, if it is not there yet

demo: $(VENV)/.demo-$(DEMO_BACKEND) ## wrong labels, with SGD and every method (ARGS="--help" lists options)
	$(PY) examples/quickstart.py --backend $(DEMO_BACKEND) $(ARGS)

test: lint ## lint, then the tests on every backend (BACKEND=jax for one)
	$(PY) tests/run.py $(BACKENDS) $(ARGS)

quick: lint ## as test, without the slow tests
	$(PY) tests/run.py --quick $(BACKENDS) $(ARGS)

matrix: ## as quick, with Python 3.11 to 3.13, each backend alone (ARGS="--python 3.12 --backend jax")
	$(or $(PYTHON),python3) tests/matrix.py $(ARGS)

fuzz: $(INSTALLED) ## train 1,000 random models on each backend (BACKEND=jax ARGS="--start 5000")
	for backend in $(or $(BACKEND),tensorflow jax torch); do \
	  $(PY) -m tests.fuzz --backend $$backend $(ARGS) || failed=1; \
	done; exit $${failed:-0}

lint: $(INSTALLED) ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED) ## repair what ruff can repair
	$(PY) -m ruff check --fix --exit-zero .
	$(PY) -m ruff format .

bench: $(INSTALLED) ## measure what a step of each method costs (an hour; ARGS=--quick tries it)
	$(PY) benchmarks/step_cost.py $(ARGS)

docs: $(INSTALLED) ## build the documentation into build/site (ARGS=serve shows it)
	KERAS_BACKEND=$(DEMO_BACKEND) NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs $(or $(ARGS),build)

reproduce: $(INSTALLED) ## re-run what a paper says: NAME=moons, say; the names are those of docs/reproductions.md
	$(PY) examples/reproduce/$(NAME).py $(BACKENDS) $(ARGS)

constraints: ## resolve the newest versions and write them to constraints.txt
	rm -rf build/constraints
	$(call make_venv,build/constraints)
	build/constraints/bin/python -m pip install -qq $(TORCH)
	build/constraints/bin/python -m pip install -qq -r requirements-dev.txt
	{ sed -n '/^#/p;/^[^#]/q' constraints.txt; \
	  build/constraints/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; \
	} > build/constraints.txt
	mv build/constraints.txt constraints.txt

dist: ## build what PyPI gets, check it, and train with the wheel in an empty environment
	rm -rf dist build/dist build/wheel
	$(call make_venv,build/dist)
	build/dist/bin/python -m pip install -qq build twine
	build/dist/bin/python -m build
	build/dist/bin/python -m twine check --strict dist/*
	$(call make_venv,build/wheel)
	build/wheel/bin/python -m pip install -qq -c constraints.txt "$$(ls dist/*.whl)[$(DEMO_BACKEND)]"
	build/wheel/bin/python -m pip check
	cd build && KERAS_BACKEND=$(DEMO_BACKEND) wheel/bin/python ../tests/first_step.py

clean: ## remove caches and build products
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environment, too
	rm -rf $(VENV)

# The first of several Pythons that is new enough makes the environment.
define make_venv
@if $(1)/bin/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
for python in "$(PYTHON)" python3.11 python3 python; do \
  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
    echo "== $$($$python --version): new environment in $(1)"; \
    exec $$python -m venv $(1); \
  fi; \
done; \
echo "There is no Python >= 3.11 here. Install one, or name it: make PYTHON=/path/to/python" >&2; \
exit 1
endef

# PyTorch comes first and alone: the rest then takes the build that is there,
# and does not go for another one.
$(INSTALLED): pyproject.toml requirements-dev.txt constraints.txt
	$(call make_venv,$(VENV))
	@echo "== Installing PyTorch (1 of 2, about 200 MB)"
	@$(PIP) -c constraints.txt torch
	@echo "== Installing TensorFlow, JAX, the tools and keras-sharp (2 of 2, about 1 GB)"
	@$(PIP) -c constraints.txt -r requirements-dev.txt
	@touch $@

# One backend is enough for the demo. Where all are installed, nothing is done.
$(VENV)/.demo-%: pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	@if [ ! -e $(INSTALLED) ]; then \
	  echo "== Installing Keras, $*, matplotlib and scikit-learn"; \
	  $(PIP) -c constraints.txt -e ".[$*,plots]" scikit-learn; \
	fi
	@touch $@
