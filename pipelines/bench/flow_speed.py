"""Benchmarks of the flow: loading the store, training steps, reading of batches, and sampling."""

import copy
import itertools
import time
from collections.abc import Iterator
from contextlib import closing
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import latent_cache
from latent_cache import (
    LatentCache,
    ResidentSampler,
    SplitPlan,
    StoreMetadata,
    StoreWriter,
    StreamingSampler,
)
from pipelines.bench.autoencoder_speed import random_autoencoder
from pipelines.bench.measurement import Measurement
from pipelines.bench.workbench import Workbench
from pipelines.prediction.rollouts import FieldRollouts
from pipelines.runtime.context import computing_in, sampling_precision, training_in
from pipelines.training.flow_trainer import FlowTrainer
from pipelines.training.training_loop import UNKNOWN_STEPS
from stage1_autoencoder.frame_encoder import exact_kernels
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.conditioning import make_draws
from stage2_flow.config import SamplingConfig
from stage2_flow.vector_field import FEED_FORWARD, TransformerBlock, VectorField

# Of the store: frames per video, and chunks at least.
VIDEO_FRAMES, CHUNKS = 100, 16
# Of the store, that the streaming tier may hold in memory: two windows of a third.
BUDGET_SHARE = 2 / 3
# Training steps on a GPU before those that are measured: they compile, and record CUDA graphs.
WARM_UP_STEPS = 5
# Of sampling: given frames, and predicted frames per clip.
CONTEXT, PREDICTED = 10, {"cpu": 1, "cuda": 4}


def flow_measurements(bench: Workbench) -> Iterator[Measurement]:
    """Measure the store and the configuration's training, from random latents and weights."""
    cache, size = random_store(bench), bench.config.flow.training.batch_size
    yield _loading(bench, cache)
    fp32, bf16 = (step_seconds(bench, cache, precision=precision) for precision in ("fp32", "bf16"))
    yield _stored_compared_to_encoding(bench, fp32)
    yield Measurement(
        f"flow: step, batch {size}, bf16", 1 / bf16, "steps/s", f"fp32: {1 / fp32:.3g} steps/s", fp32 / bf16
    )
    yield from _reading(bench, cache, min(fp32, bf16))


def random_store(bench: Workbench) -> LatentCache:
    """A store of random latents, without codes."""
    path, shape = bench.folder / "latents.zarr", bench.latent_shape
    frames = bench.store_bytes // (2 * prod(shape))
    chunk = min(latent_cache.default_chunk_frames(shape, frames), frames // CHUNKS)
    lengths = np.diff(np.append(np.arange(0, frames, VIDEO_FRAMES), frames))
    names = [f"video_{row:06d}" for row in range(len(lengths))]
    plan = SplitPlan(names, ["identity"] * len(names), lengths, shape, chunk)
    metadata = StoreMetadata("bench", 25.0, {}, {"sha256": "bench"}, {})
    latents = np.random.default_rng(0).standard_normal((chunk, *shape), np.float32)
    with StoreWriter.open(path, metadata, {"train": plan}, codes=False) as writer:
        for part in writer.pending("train"):
            writer.write_chunk("train", part, latents[: part.frames], None)
        writer.finish()
    return latent_cache.open(path)


def _loading(bench: Workbench, cache: LatentCache) -> Measurement:
    """The whole store, compared to reading plain files; all are in the page cache."""
    files, size = [], cache.latent_reader.chunk_frames
    for start in range(0, cache.frames, size):
        files.append(bench.folder / f"plain_{start}")
        cache.latents[start : start + size].tofile(files[-1])

    def read_files() -> None:
        out = memoryview(np.empty(cache.nbytes, np.uint8))
        place = 0
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                place += opened.readinto(out[place:])
        assert place == cache.nbytes

    ours, reference = bench.in_turn(cache.load, read_files)
    return Measurement(
        f"load {cache.nbytes / 1e6:.3g} MB, checksums verified", ours * 1e3, "ms",
        f"plain files: {reference * 1e3:.3g} ms", reference / ours, at_least=0.5,
    )  # fmt: skip


def step_seconds(bench: Workbench, cache: LatentCache, **training: Any) -> float:
    """Seconds per training step of the configuration, with other settings of `flow.training` where they are given."""
    flow, device, steps = bench.config.flow, bench.device, itertools.count()
    flow = flow.model_copy(update={"training": flow.training.model_copy(update={"steps": UNKNOWN_STEPS} | training)})
    config = bench.config.model_copy(update={"flow": flow})
    sampler = ResidentSampler(
        cache, device, config.seed, flow.training.batch_size, flow.training.clip_frames,
        recent_frames=flow.model.recent_frames,
    )  # fmt: skip
    with closing(sampler):
        trainer = FlowTrainer(config, device, cache, sampler)
        with training_in(trainer.precision):
            calls = 1
            if device.type == "cuda":
                for _ in range(WARM_UP_STEPS):
                    trainer.train_step(next(steps))  # compiles and records
                torch.cuda.synchronize(device)
                started = time.perf_counter()
                trainer.train_step(next(steps))
                torch.cuda.synchronize(device)
                # Of a GPU that is faster than its launches, several steps per synchronization.
                calls = max(1, min(20, int(0.25 / (time.perf_counter() - started))))
            (seconds,) = bench.in_turn(lambda: [trainer.train_step(next(steps)) for _ in range(calls)])
    return seconds / calls


def _stored_compared_to_encoding(bench: Workbench, step: float) -> Measurement:
    """A step on stored latents, compared to one that first encodes its three frames per sample."""
    size, frame_size = bench.config.flow.training.batch_size, bench.config.dataset.frame_size
    autoencoder = random_autoencoder(bench)
    images = torch.rand(size, 3, *frame_size, device=bench.device) * 2 - 1
    with exact_kernels(), torch.no_grad():
        (encoding,) = bench.in_turn(lambda: [autoencoder.encode(images) for _ in ("target", "reference", "condition")])
    return Measurement(
        f"flow: step, batch {size}, fp32", 1 / step, "steps/s",
        f"encoding its frames, too: {1 / (step + encoding):.3g} steps/s", (step + encoding) / step,
        at_least=1.5 if isinstance(autoencoder, VQGAN) else None,  # the VQ-VAE's encoder takes a tenth of a step
    )  # fmt: skip


def _reading(bench: Workbench, cache: LatentCache, step: float) -> Iterator[Measurement]:
    """The rate of batches in both tiers, and the share of a step that drawing one takes when nothing overlaps."""
    training, device, seed = bench.config.flow.training, bench.device, bench.config.seed
    size, budget = training.batch_size, int(cache.nbytes * BUDGET_SHARE)
    for sampler, tier, at_most in (
        (ResidentSampler(cache, device, seed, size, training.clip_frames), "resident", 0.01),
        (StreamingSampler(cache, device, seed, size, training.clip_frames, budget), "streaming", 0.05),
    ):
        steps, epoch = itertools.count(), max(1, sampler.legal_targets // size)

        def draw_epoch(sampler=sampler, steps=steps, epoch=epoch) -> None:
            for _ in range(epoch):
                sampler.batch(next(steps))

        seconds = bench.in_turn(draw_epoch)[0] / epoch
        sampler.close()
        share = seconds / (seconds + step)
        yield Measurement(
            f"flow: {tier} tier, batches of {size}", size / seconds, "samples/s",
            f"waiting for data: {share:.2%} of a step", share, at_most=at_most,
        )  # fmt: skip


def of_pytorch_layers(field: VectorField) -> VectorField:
    """The same field with the same weights, made of `nn.TransformerEncoderLayer` (which has no `qk_norm`)."""
    config, plain = field.config, copy.deepcopy(field)
    assert not config.qk_norm
    for name, module in field.named_modules():
        if isinstance(module, TransformerBlock):
            layer = nn.TransformerEncoderLayer(
                config.width, config.heads, FEED_FORWARD * config.width, config.dropout,
                activation="gelu", batch_first=True, norm_first=True,
            )  # fmt: skip
            layer.to(module.linear1.weight.device, module.linear1.weight.dtype)
            layer.load_state_dict(module.state_dict())
            plain.set_submodule(name, layer)
    return plain.train(field.training)


def sampling_measurements(bench: Workbench) -> Iterator[Measurement]:
    """Measure Euler rollouts at the configuration's sizes, from random latents and weights."""
    torch.manual_seed(0)
    device = bench.device
    model = bench.config.flow.model.model_copy(update={"qk_norm": False})  # PyTorch's layers have none
    field = VectorField(model, bench.latent_shape[0]).to(device).eval().requires_grad_(False)
    plain, rollouts, frames = of_pytorch_layers(field), FieldRollouts(field, device), PREDICTED[device.type]
    for clips, nfe in bench.rollouts:
        # Compiled on a GPU, as for many clips.
        options = SamplingConfig(solver="euler", nfe=nfe, batch_size=clips, compile=device.type == "cuda")
        context = torch.randn(clips, CONTEXT, *bench.latent_shape, device=device)
        ours, reference = bench.in_turn(
            lambda context=context, options=options: predict(rollouts, context, frames, options),
            lambda context=context, nfe=nfe: predict_plainly(plain, context, frames, nfe),
        )
        count = clips * frames
        yield Measurement(
            f"sampling: batch of {clips}, {nfe} NFE per frame", count / ours, "frames/s",
            f"PyTorch's layers, step by step: {count / reference:.4g}/s", reference / ours, at_least=1.0,
        )  # fmt: skip


def predict(rollouts: FieldRollouts, context: Tensor, frames: int, options: SamplingConfig) -> Tensor:
    """A whole prediction: draws, tables, rollout."""
    keys = [(row, 0) for row in range(len(context))]
    latent_shape = tuple(context.shape[2:])
    draws = make_draws(0, keys, frames, options.nfe, context.shape[1], latent_shape, None, context.device)
    return rollouts.generate(context, frames, options, draws)


@torch.no_grad()
def predict_plainly(field: VectorField, context: Tensor, frames: int, nfe: int) -> Tensor:
    """Euler as it is usually written: draws, gathers and calls one after another, and a growing past."""
    device, rows = context.device, torch.arange(len(context), device=context.device)
    past = context
    with computing_in(sampling_precision(SamplingConfig(), device), device):
        for _ in range(frames):
            length = past.shape[1]
            y = torch.randn_like(past[:, -1])
            for step in range(nfe):
                t = torch.full((len(context),), step / nfe, device=device)
                index = torch.randint(0, length - 1, (len(context),), device=device)
                y = y + field(y, past[:, -1], past[rows, index], length - 1 - index, t) / nfe
            past = torch.cat([past, y[:, None]], dim=1)
    return past
