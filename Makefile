# setup · quickstart · test · test-all · style · bench · gpu-proof
# Every target first builds .venv where it is missing or older than the files that describe it.

PYTHON ?= python3
# Extras of setup.cfg to install, comma-separated: make setup EXTRAS=gpu,dev
EXTRAS ?= dev
VENV := .venv
RUN := $(VENV)/bin/python
# One stamp for each set of extras, so that asking for another set installs it.
STAMP := $(VENV)/installed-$(EXTRAS)

.PHONY: setup quickstart test test-all test-trackers style bench gpu-proof
.DELETE_ON_ERROR:

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing the suite and [$(EXTRAS)] into $(VENV), a few minutes the first time ..."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
	@echo "Installed: $$($(RUN) --version), torch $$($(RUN) -c 'from importlib.metadata import version; print(version("torch"))')"

quickstart: $(STAMP)
	@$(RUN) scripts/quickstart/run.py

test: $(STAMP)
	@$(RUN) -m pytest -n 2 --dist loadfile --ignore=tests/trackers

# Also what needs more packages than a run does.
test-all: test
	@$(MAKE) --no-print-directory test-trackers EXTRAS=dev,trackers

test-trackers: $(STAMP)
	@$(RUN) -m pytest tests/trackers

style: $(STAMP)
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

bench: $(STAMP)
	@for file in $(filter-out benchmarks/gpu_proof.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(RUN) $$file || exit 1; done

# Not in .venv, but by the interpreter that has a torch for the GPU: make gpu-proof PYTHON=python3 PROOF="--out proof"
gpu-proof:
	@$(PYTHON) benchmarks/gpu_proof.py $(PROOF)
