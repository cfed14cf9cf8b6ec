# RIVER in two stages. `make` without a target lists all targets; README.md explains them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# PyPI's torch is built for CUDA 13.0: TORCH_INDEX=https://download.pytorch.org/whl/cu126 takes a build for older drivers.
TORCH_INDEX ?=
DATASET ?= $(shell cat .last_dataset 2>/dev/null || echo shapes)
ARGS ?=
export DEVICE MIRROR SCHEDULER DOWNLOAD

BIN := .venv/bin
RIVER = $(BIN)/python -m pipelines
# NUM_GPUS=4 trains in four processes on this machine.
MANY = $(filter-out 0 1,$(NUM_GPUS))
TRAIN = $(BIN)/python $(if $(MANY),-m torch.distributed.run --standalone --nproc-per-node $(NUM_GPUS) )-m pipelines
CONFIG = --config configs/$(DATASET).yaml
# DATASET is remembered as the default of the next targets.
remember = $(if $(filter command line environment,$(origin DATASET)),@! test -f configs/$(DATASET).yaml || echo $(DATASET) > .last_dataset)

.PHONY: help setup demo test lint data convert train-autoencoder encode train-flow train-refiner sample predict evaluate study report import-official inspect verify bench gpu-check

help:  ## list all targets
	@echo "usage: make TARGET [DATASET=$(DATASET)] [ARGS=\"--set flow.training.steps=1000\"] [DEVICE=cpu|cuda]"
	@echo
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  %-18s %s\n", $$1, $$2}'
	@echo
	@echo "data sets: $(notdir $(basename $(wildcard configs/*.yaml)))"

setup: $(BIN)/.ready  ## create .venv from constraints.txt

$(BIN)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("RIVER needs python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "setting up .venv; this takes a minute or more"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) )torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## the whole story on procedural videos, minutes on two CPU cores
	@$(RIVER) demo --config configs/shapes.yaml $(ARGS)

test: setup  ## run all tests
	@$(BIN)/python -m pytest -n 2 $(ARGS)

lint: setup  ## run ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

data: setup  ## download (MIRROR=folder or URL), check, unpack and index the raw videos
	$(remember)
	@$(RIVER) data $(CONFIG) $(ARGS)

convert: setup  ## frames of any data set as folders of images: make convert OUT=frames ARGS="--format jpg --split test"
	$(remember)
	@test -n "$(OUT)" || { echo "expected a folder: make convert OUT=frames" >&2; exit 2; }
	@$(RIVER) convert --out "$(OUT)" $(CONFIG) $(ARGS)

train-autoencoder: setup  ## stage 1: train the VQGAN (NUM_GPUS=4; DOWNLOAD=1 fetches VGG16 for LPIPS)
	$(remember)
	@$(TRAIN) train-autoencoder $(CONFIG) $(ARGS)

encode: setup  ## encode all splits into latents/<dataset>.zarr (SCHEDULER=tcp://host:8786: on a dask cluster)
	$(remember)
	@$(RIVER) encode $(CONFIG) $(ARGS)

train-flow: setup  ## stage 2: train the flow from the store alone (NUM_GPUS=4; ARGS=--fine-tune starts from existing weights)
	$(remember)
	@$(TRAIN) train-flow $(CONFIG) $(ARGS)

train-refiner: setup  ## optional: train the network that refines decoded frames, for make sample ARGS=--refine
	$(remember)
	@$(TRAIN) train-refiner $(CONFIG) $(ARGS)

sample: setup  ## predict videos of the test split: GIF, MP4, contact sheet, latents
	$(remember)
	@$(RIVER) sample $(CONFIG) $(ARGS)

predict: setup  ## continue any clip: make predict VIDEO=clip.mp4
	$(remember)
	@test -n "$(VIDEO)" || { echo "expected a video: make predict VIDEO=clip.mp4" >&2; exit 2; }
	@$(RIVER) predict "$(VIDEO)" $(CONFIG) $(ARGS)

evaluate: setup  ## measure PSNR, SSIM, LPIPS and FVD beside two baselines (DOWNLOAD=1 fetches VGG16 and the I3D)
	$(remember)
	@$(RIVER) evaluate $(CONFIG) $(ARGS)

study: setup  ## measure quality against the number of evaluations, per solver, on the validation split: quality.json and quality.png
	$(remember)
	@$(RIVER) study $(CONFIG) $(ARGS)

report: setup  ## write one self-contained HTML page of a run: runs/<dataset>/report.html
	$(remember)
	@$(RIVER) report $(CONFIG) $(ARGS)

import-official: setup  ## official weights as a run: MODEL=model.pth AUTOENCODER=vqvae.ckpt REFINER=refiner.pth, or ARGS=--download
	$(remember)
	@$(RIVER) import-official $(CONFIG) $(if $(MODEL),--model "$(MODEL)") $(if $(AUTOENCODER),--autoencoder "$(AUTOENCODER)") \
		$(if $(REFINER),--refiner "$(REFINER)") $(ARGS)

inspect: setup  ## show what is in the store; ARGS="--video ID --gif out.gif" decodes a video, ARGS=--verify checks all
	$(remember)
	@$(RIVER) inspect $(CONFIG) $(ARGS)

verify: setup  ## check every checksum of the store and encode N=64 frames again
	$(remember)
	@$(RIVER) encode --verify $(N) $(CONFIG) $(ARGS)

bench: setup  ## measure this machine: decoding, encoding, store, flow; runs/<dataset>/benchmark.json
	$(remember)
	@$(RIVER) bench $(CONFIG) $(ARGS)

gpu-check: setup  ## compare this machine's GPU with its CPU and measure it, in minutes (DEVICE=cpu: a rehearsal)
	@$(RIVER) gpu-check --config configs/shapes.yaml $(ARGS)
