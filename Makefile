# setup · quickstart · ablation · test · test-all · test-triton · test-newest · test-torch-2.11 · style · schemas · bench · review-proof · gpu-proof
# Every target first builds .venv where it is missing or older than the files that describe it.

PYTHON ?= python3
# Extras of setup.cfg to install, comma-separated: make setup EXTRAS=gpu,dev
EXTRAS ?= dev
VENV := .venv
RUN := $(VENV)/bin/python
OLD_TORCH := .venv-torch-2.11
# Its interpreter reads NumPy 2.4, as that of 3.6 does not. Not in constraints.txt: a torch for GPUs pins its own.
TRITON := 3.7.1
OLD_READER := .venv-transformers-4
ALPACA_EVAL := .venv-alpaca-eval
NEWEST := .venv-newest
# The torch of test-newest, where the newest is too large to try: make test-newest TORCH=torch==2.13.0
TORCH ?= torch
# One stamp for each set of extras, so that asking for another set installs it.
STAMP := $(VENV)/installed-$(EXTRAS)

.PHONY: setup quickstart ablation test test-all test-triton test-trackers test-transformers-4 test-evaluation test-newest test-torch-2.11 style bench review-proof gpu-proof
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

# DPO and SimPO at two ranks, on the quickstart's model and pairs; what was run before is left alone.
ablation: $(STAMP)
	@test -f outputs/quickstart/sft/model.safetensors || $(RUN) scripts/quickstart/run.py
	@$(RUN) scripts/run_ablation.py training_configs/ablations/quickstart.yaml

# What `make test` leaves to the targets below it.
APART := --ignore=tests/trackers --ignore=tests/readers --ignore=tests/evaluation --ignore=tests/slow --ignore=tests/interpreted

test: $(STAMP)
	@$(RUN) -m pytest -n 2 --dist loadfile $(APART)

# Also what takes minutes, and what needs other packages than a run does.
test-all: test
	@$(RUN) -m pytest tests/slow
	@$(MAKE) --no-print-directory test-triton
	@$(MAKE) --no-print-directory test-transformers-4
	@$(MAKE) --no-print-directory test-trackers EXTRAS=dev,trackers
	@$(MAKE) --no-print-directory test-evaluation EXTRAS=dev,eval

# TRL's kernels for the head, interpreted. A torch for CPUs brings no Triton: 200 MB, 700 on the disk, in a folder of its own,
# because libraries take other ways where they find it in .venv.
test-triton: $(STAMP) .triton-$(TRITON)/installed
	@PYTHONPATH=.triton-$(TRITON) $(RUN) -m pytest tests/interpreted

.triton-$(TRITON)/installed: | $(STAMP)
	@$(RUN) -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$(TRITON)
	@touch $@

test-trackers: $(STAMP)
	@$(RUN) -m pytest tests/trackers

# lm-eval on a run's folder; and alpaca-eval on its answers, in an environment of its own.
test-evaluation: $(STAMP) $(ALPACA_EVAL)/installed
	@ALPACA_EVAL=$(ALPACA_EVAL)/bin/python $(RUN) -m pytest tests/evaluation

$(ALPACA_EVAL)/installed:
	@$(PYTHON) -m venv $(ALPACA_EVAL)
	@$(ALPACA_EVAL)/bin/python -m pip install -qq --disable-pip-version-check alpaca-eval==0.6.6 'setuptools<81'
	@touch $@

# What a run leaves, read by transformers 4, which lives in an environment of its own.
test-transformers-4: $(STAMP) $(OLD_READER)/installed
	@TRANSFORMERS_4=$(OLD_READER)/bin/python $(RUN) -m pytest tests/readers

$(OLD_READER)/installed: constraints.txt
	@$(PYTHON) -m venv $(OLD_READER)
	@$(OLD_READER)/bin/python -m pip install -qq --disable-pip-version-check \
		"$$(grep '^torch==' constraints.txt)" transformers==4.57.6
	@touch $@

# The floors of setup.cfg and no constraints: what the newest releases will break.
test-newest:
	@$(PYTHON) -m venv --clear $(NEWEST)
	@$(NEWEST)/bin/python -m pip install -qq --disable-pip-version-check '$(TORCH)' -e '.[dev]'
	@$(NEWEST)/bin/python -m pip list --format=freeze | diff constraints.txt - | grep '^>' || true
	@$(NEWEST)/bin/python -m pytest -n 2 --dist loadfile $(APART)

style: $(STAMP)
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

# What editors check recipes against, after a dataclass changed.
schemas: $(STAMP)
	@$(RUN) scripts/write_schemas.py

# The oldest torch that setup.cfg allows, in an environment of its own, kept between runs: what depends on torch's own code.
# Not in `make test`: PyPI has no build of it for CPUs, and the one for GPUs is some 3 GB to download and 6 on the disk.
test-torch-2.11: $(OLD_TORCH)/installed
	@$(OLD_TORCH)/bin/python -m pytest tests/golden tests/unit/model tests/unit/preference

$(OLD_TORCH)/installed: setup.cfg pyproject.toml constraints.txt
	@echo "Installing the suite and torch 2.11 into $(OLD_TORCH), several minutes the first time ..."
	@$(PYTHON) -m venv $(OLD_TORCH)
	@grep -vE '^(torch|setuptools)==' constraints.txt > $(OLD_TORCH)/constraints.txt
	@$(OLD_TORCH)/bin/python -m pip install -qq --disable-pip-version-check -c $(OLD_TORCH)/constraints.txt \
		'torch==2.11.0' -e '.[dev]'
	@touch $@

bench: $(STAMP)
	@for file in $(filter-out benchmarks/gpu_proof.py benchmarks/step_table.py benchmarks/memory_processes.py benchmarks/recipe_memory.py benchmarks/review_%.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(RUN) $$file || exit 1; done

# How far a review is right: simulated record sets, and runs on the quickstart's model that are built to go wrong. A quarter
# of an hour after the quickstart.
review-proof: quickstart
	@$(RUN) benchmarks/review_coverage.py
	@$(RUN) benchmarks/review_power.py
	@$(RUN) benchmarks/review_runs.py

# Not in .venv, but by the interpreter that has a torch for the GPU: make gpu-proof PYTHON=python3 PROOF="--out proof"
gpu-proof:
	@$(PYTHON) benchmarks/gpu_proof.py $(PROOF)
