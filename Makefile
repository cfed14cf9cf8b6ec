# RIVER in two stages. `make` without a target lists all targets; README.md explains them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# PyPI's torch is built for CUDA 13.0: TORCH_INDEX=https://download.pytorch.org/whl/cu126 takes a build for older drivers.
TORCH_INDEX ?=
# DATASET is remembered as the default of the next targets.
NAMED := $(filter command line environment,$(origin DATASET))
ifeq ($(NAMED),)
DATASET := $(or $(shell cat .last_dataset 2>/dev/null),shapes)
endif

# What users type is passed on as it is: neither make nor a shell runs or replaces anything in it.
$(foreach name,DATASET RUN ARGS VIDEO OUT MODEL AUTOENCODER REFINER DEST SOURCE N NUM_GPUS DEVICE MIRROR SCHEDULER DOWNLOAD TRIALS SEED TORCH_INDEX,\
	$(eval override $(name) := $$(value $(name))))
export DEVICE MIRROR SCHEDULER DOWNLOAD
define newline


endef
quoted = '$(subst $(newline),'$$'\n'',$(subst ','\'',$(1)))'
option = $(if $(2),$(1)$(call quoted,$(2)))
# The words of ARGS. A word in quotes may have spaces.
SPLIT := import shlex, sys; print(shlex.join(shlex.split(sys.argv[1])))
OPTIONS = $(if $(strip $(ARGS)),$(or $(shell $(PYTHON) -c '$(SPLIT)' $(call quoted,$(ARGS)) 2>/dev/null),$(error ARGS=$(ARGS): expected words, is a quote not closed?)))

BIN := .venv/bin
RIVER = $(BIN)/python -m pipelines
# NUM_GPUS=4 trains in four processes on this machine.
MANY = $(filter-out 0 1,$(NUM_GPUS))
# Without --, torchrun would take --run for an option of its own.
TRAIN = $(BIN)/python $(if $(MANY),-m torch.distributed.run --standalone --nproc-per-node $(call quoted,$(NUM_GPUS)) -m -- ,-m )pipelines
FILE = $(call quoted,configs/$(DATASET).yaml)
CONFIG = --config $(FILE)$(call option, --run=,$(RUN))
remember = $(if $(NAMED),@! test -f $(FILE) || printf '%s\n' $(call quoted,$(DATASET)) > .last_dataset)

.PHONY: help setup demo test test-all test-faults lint docs data convert train-autoencoder encode train-flow distill train-decoder train-refiner watch sample predict play evaluate study report runs import-official push pull inspect verify bench gpu-check clean doctor

help:  ## list all targets
	@printf 'usage: make TARGET [DATASET=%s] [RUN=wide] [ARGS="--set flow.training.steps=1000"] [DEVICE=cpu|cuda]\n\n' $(call quoted,$(DATASET))
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  %-18s %s\n", $$1, $$2}'
	@echo
	@printf 'data sets:'; for file in configs/*.yaml; do name=$${file#*/}; printf ' %s' "$${name%.yaml}"; done; echo

setup: $(BIN)/.ready  ## create .venv from constraints.txt

$(BIN)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("RIVER needs python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "setting up .venv; this takes a minute or more"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(call option,--extra-index-url=,$(TORCH_INDEX)) torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## the whole story on procedural videos, minutes on two CPU cores
	@$(RIVER) demo --config configs/shapes.yaml $(OPTIONS)

test: setup  ## run all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(OPTIONS)

test-all: $(BIN)/.ready-long  ## run all tests and the long ones: clusters, servers, the site, the notebook, the wheel
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not faults' $(OPTIONS)

$(BIN)/.ready-long: $(BIN)/.ready
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,long]'
	@touch $@

test-faults: setup  ## kill, cut off and damage the commands at random, see docs/reliability.md (TRIALS=20 of each kind, SEED=100)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m faults $(call option,--trials=,$(TRIALS)) $(call option,--seed=,$(SEED)) $(OPTIONS)

lint: setup  ## run ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: $(BIN)/.ready-docs  ## build the documentation as a site in site/, without a network (ARGS=serve shows it while you write)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(OPTIONS),build --strict)

$(BIN)/.ready-docs: $(BIN)/.ready
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

data: setup  ## download (MIRROR=folder or URL), check, unpack and index the raw videos
	$(remember)
	@$(RIVER) data $(CONFIG) $(OPTIONS)

convert: setup  ## frames of any data set as folders of images: make convert OUT=frames ARGS="--format jpg --split test"
	$(remember)
	@test -n $(call quoted,$(OUT)) || { echo "expected a folder: make convert OUT=frames" >&2; exit 2; }
	@$(RIVER) convert --out=$(call quoted,$(OUT)) $(CONFIG) $(OPTIONS)

train-autoencoder: setup  ## stage 1: train the VQGAN (NUM_GPUS=4; DOWNLOAD=1 fetches VGG16 for LPIPS)
	$(remember)
	@$(TRAIN) train-autoencoder $(CONFIG) $(OPTIONS)

encode: setup  ## encode all splits into latents/<dataset>.zarr (SCHEDULER=tcp://host:8786: on a dask cluster)
	$(remember)
	@$(RIVER) encode $(CONFIG) $(OPTIONS)

train-flow: setup  ## stage 2: train the flow from the store alone (NUM_GPUS=4; ARGS=--fine-tune starts from existing weights)
	$(remember)
	@$(TRAIN) train-flow $(CONFIG) $(OPTIONS)

distill: setup  ## a student of the flow that needs one evaluation per frame, as a run called student (RUN=, NUM_GPUS=4)
	$(remember)
	@$(TRAIN) distill $(CONFIG) $(OPTIONS)

train-decoder: setup  ## optional: train a small, fast decoder from the store alone, for make sample ARGS="--set sampling.decoder=fast"
	$(remember)
	@$(TRAIN) train-decoder $(CONFIG) $(OPTIONS)

train-refiner: setup  ## optional: train the network that refines decoded frames, for make sample ARGS=--refine
	$(remember)
	@$(TRAIN) train-refiner $(CONFIG) $(OPTIONS)

watch: setup  ## a page in the browser: a run's trainings live, also from another terminal (ARGS="--port 8000 --no-browser")
	$(remember)
	@$(RIVER) watch $(CONFIG) $(OPTIONS)

sample: setup  ## predict videos of the test split: GIF, MP4, contact sheet, latents
	$(remember)
	@$(RIVER) sample $(CONFIG) $(OPTIONS)

predict: setup  ## continue any clip: make predict VIDEO=clip.mp4
	$(remember)
	@test -n $(call quoted,$(VIDEO)) || { echo "expected a video: make predict VIDEO=clip.mp4" >&2; exit 2; }
	@$(RIVER) predict $(CONFIG) $(OPTIONS) -- $(call quoted,$(VIDEO))

play: setup  ## a page in the browser: predictions that go on live from a clip (ARGS="--port 8000 --no-browser")
	$(remember)
	@$(RIVER) play $(CONFIG) $(OPTIONS)

evaluate: setup  ## measure quality beside four baselines (DOWNLOAD=1 fetches VGG16 and the I3D)
	$(remember)
	@$(RIVER) evaluate $(CONFIG) $(OPTIONS)

study: setup  ## compare solvers and numbers of evaluations on the validation split, and choose one: quality.json and quality.png
	$(remember)
	@$(RIVER) study $(CONFIG) $(OPTIONS)

report: setup  ## write one self-contained HTML page of a run: runs/<dataset>/report.html
	$(remember)
	@$(RIVER) report $(CONFIG) $(OPTIONS)

runs: setup  ## list the runs of a data set; RUN=wide on other targets names a further one
	$(remember)
	@$(RIVER) runs $(CONFIG) $(OPTIONS)

import-official: setup  ## official weights as a run: MODEL=model.pth AUTOENCODER=vqvae.ckpt REFINER=refiner.pth, or ARGS=--download
	$(remember)
	@$(RIVER) import-official $(CONFIG) $(call option,--model=,$(MODEL)) $(call option,--autoencoder=,$(AUTOENCODER)) $(call option,--refiner=,$(REFINER)) $(OPTIONS)

push: setup  ## share the run: make push DEST=folder, s3://bucket/prefix or hf://user/name (ARGS=--store: the latents, too; --half: fp16)
	$(remember)
	@test -n $(call quoted,$(DEST)) || { echo "expected a destination: make push DEST=folder" >&2; exit 2; }
	@$(RIVER) push $(OPTIONS) -- runs/$(call quoted,$(DATASET))$(if $(RUN),/$(call quoted,$(RUN))) $(call quoted,$(DEST))

pull: setup  ## get a shared run: make pull SOURCE=hf://user/name (OUT=folder, default runs/<data set>; ARGS=--store)
	@test -n $(call quoted,$(SOURCE)) || { echo "expected where it is: make pull SOURCE=hf://user/name" >&2; exit 2; }
	@$(RIVER) pull $(OPTIONS) -- $(call quoted,$(SOURCE)) $(if $(OUT),$(call quoted,$(OUT)))

inspect: setup  ## show what is in the store; ARGS="--video ID --gif out.gif" decodes a video, ARGS=--verify checks all
	$(remember)
	@$(RIVER) inspect $(CONFIG) $(OPTIONS)

verify: setup  ## check every checksum of the store and encode N=64 frames again
	$(remember)
	@$(RIVER) encode --verify $(call option,,$(N)) $(CONFIG) $(OPTIONS)

bench: setup  ## measure this machine: decoding, encoding, store, flow; runs/<dataset>/benchmark.json
	$(remember)
	@$(RIVER) bench $(CONFIG) $(OPTIONS)

gpu-check: setup  ## compare this machine's GPU with its CPU and measure it, in minutes (DEVICE=cpu: a rehearsal)
	@$(RIVER) gpu-check --config configs/shapes.yaml $(OPTIONS)

clean: setup  ## list leftovers and caches, with sizes; ARGS=--yes removes them (others: --backups, --latents, RUN=wide)
	$(remember)
	@$(RIVER) clean $(CONFIG) $(OPTIONS)

doctor: setup  ## print one screen for a bug report
	@$(RIVER) doctor $(OPTIONS)
