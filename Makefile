# `make demo` and `make test` work on a fresh clone: each makes .venv and installs what it needs, once.

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?= --numprocesses auto --maxprocesses 8 --dist loadfile
BIN := $(VENV)/bin

# Idle OpenMP threads sleep instead of spinning: with two cores a spinning one costs half the machine.
export OMP_WAIT_POLICY = PASSIVE

# The paper's claims in small: every table, the concept maps, the fusion weights. Runs again go on where they were.
TABLES := timesteps controls growth 05 04 10 14 readings
RECIPES := $(TABLES:%=pipelines/table_%.py) pipelines/tables_11_13.py
EXPERIMENT_ARGS ?=
WORLD := runs/tables-scenes-flux-scenes
# One process fills one core, not two: without a GPU as many go side by side as there are cores.
WORKERS ?= $(if $(shell command -v nvidia-smi),,--workers $(shell nproc))
# By the recipe of the bundled weights, which is the one for a CPU: that for a GPU takes more and larger steps.
YOUNGER := data/backbones/flux-scenes-10 data/backbones/flux-scenes-30

.PHONY: demo test check lint types imports bench experiments experiments-quick
.DEFAULT_GOAL := demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "mmdiff-cache needs Python 3.11 or newer, this is %d.%d; run: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/mmdiff-cache demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

check: lint types imports test

data/backbones/flux-scenes-%: $(VENV)/.installed
	$(BIN)/python pipelines/flux_scenes.py --work data/flux-work --device cpu --share 0.$(if $(filter 10,$*),1,3)

experiments: $(VENV)/.installed $(YOUNGER)
	$(BIN)/mmdiff-cache table $(RECIPES) --dataset scenes $(WORKERS) $(EXPERIMENT_ARGS)
	$(BIN)/mmdiff-cache extract --config pipelines/concept_maps.py
	$(BIN)/python pipelines/concept_maps.py data/scenes/flux-scenes-words --out $(WORLD)/concept-maps
	for age in random 10 30; do $(BIN)/mmdiff-cache extract --config pipelines/concept_maps.py \
		--backbone data/backbones/flux-scenes-$$age --store data/scenes/flux-scenes-$$age-words && \
		$(BIN)/python pipelines/concept_maps.py data/scenes/flux-scenes-$$age-words --out $(WORLD)/concept-maps-$$age || exit; done
	for task in segmentation saliency depth; do $(BIN)/python pipelines/fusion_weights.py --task $$task --row "four timesteps" \
		--table $(WORLD)/table-timesteps/results.json --out $(WORLD)/fusion-weights-$$task || exit; done

# Whether all of it runs: a few steps on a few scenes, without the younger backbones.
experiments-quick: $(VENV)/.installed
	$(BIN)/mmdiff-cache table $(RECIPES) --dataset scenes --quick --limit 4 $(EXPERIMENT_ARGS)
	$(BIN)/mmdiff-cache extract --config pipelines/concept_maps.py --limit 4 --store runs/words-quick
	$(BIN)/python pipelines/concept_maps.py runs/words-quick --out runs/concept-maps-quick
	$(BIN)/python pipelines/fusion_weights.py --task segmentation --row "four timesteps" \
		--table runs/tables-scenes-flux-scenes-limit4-quick/table-timesteps/results.json --out runs/fusion-weights-quick

bench: $(VENV)/.installed-dev
	@for bench in benchmarks/bench_*.py; do echo "$$bench"; $(BIN)/python "$$bench" || exit 1; done
