# make demo    install and run the demo            make test   everything the gate checks
# make bench   speed and memory as ratios          make study  slow studies: sweeps, three seeds
# make lint    style, types, import layers         make unit   the tests alone
# make site    the documentation in build/site     make wheel  what an index takes, in dist
# make attack  kills, full disks, damages, hostile files: half an hour and more, goes on where it was stopped
.PHONY: demo test lint unit bench study attack site wheel clean

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Without what they depend on: BackPACK's examples want torchvision, whose wheels for GPUs break Transformers on a PyTorch
# without.
WITNESS := curvlinops-for-pytorch backpack-for-pytorch captum einconv einops linear_operator opt_einsum unfoldNd

$(BIN)/keeptune: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(BIN)/.dev: $(BIN)/keeptune
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(WITNESS)
	touch $@

demo: $(BIN)/keeptune
	$(BIN)/keeptune demo

# The checks of lint have one process, and are done beside the tests.
test: $(BIN)/.dev
	$(MAKE) --no-print-directory --jobs 2 lint unit

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Pages are tested in a browser and generated programs in bubblewrap: Debian's, unless they are there.
/usr/bin/chromium /usr/bin/bwrap &:
	(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium bubblewrap) >/dev/null

unit: $(BIN)/.dev /usr/bin/chromium /usr/bin/bwrap
	$(BIN)/pytest -n 2 --dist worksteal

bench: $(BIN)/.dev
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/run.py

# DATA: a folder with whole data files (assets/SOURCE.md).
study: $(BIN)/.dev
	$(BIN)/keeptune demo --seeds 3 --output runs/demo3
	$(BIN)/python studies/demo_page.py runs/demo3
	$(BIN)/python studies/all_methods.py
	$(BIN)/python studies/penalties.py
	$(BIN)/python studies/keep.py $(DATA)
	$(BIN)/python studies/repair.py
	$(BIN)/python studies/loki.py
	$(BIN)/python studies/sequence.py
	$(BIN)/python studies/models.py smollm2 && $(BIN)/python studies/models.py gemma3
	$(BIN)/python -m studies.real $(DATA) && $(BIN)/python -m studies.real $(DATA) --instructions
	$(BIN)/python -m studies.real --tables

# TRIES: of each attack; without it as many as studies/attack.py says.
attack: $(BIN)/.dev
	PYTHONPATH=$(CURDIR) $(BIN)/python -m studies.attack $(if $(TRIES),--tries $(TRIES))

site: $(BIN)/.dev
	$(BIN)/mkdocs build --strict

wheel: $(BIN)/.dev
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
