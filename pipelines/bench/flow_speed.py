"""Benchmarks of flow training: steps in two precisions, reading of batches, our layers compared to PyTorch's."""

import copy
import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn

from latent_cache import FlowBatch, LatentCache, ResidentSampler, StreamingSampler
from pipelines.bench.autoencoder_speed import random_autoencoder
from pipelines.bench.measurement import Measurement
from pipelines.bench.store_speed import random_store
from pipelines.bench.workbench import Workbench
from pipelines.runtime.context import computing_in
from pipelines.runtime.cuda_graph_step import WARM_UP_STEPS
from pipelines.training.flow_trainer import FlowTrainer
from stage1_autoencoder.frame_encoder import exact_kernels
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.loss import draw_flow, flow_matching_loss
from stage2_flow.vector_field import FEED_FORWARD, TransformerBlock, VectorField

BUDGET_SHARE = 2 / 3  # of the store, that the streaming tier may hold in memory: two windows of a third


def flow_measurements(bench: Workbench) -> Iterator[Measurement]:
    """Measure the configuration's training, from random latents and weights."""
    cache, size = random_store(bench), bench.config.flow.training.batch_size
    fp32, bf16 = (_step_seconds(bench, cache, precision) for precision in ("fp32", "bf16"))
    yield _without_encoding(bench, fp32)
    yield Measurement(
        f"flow: step, batch {size}, bf16", 1 / bf16, "steps/s", f"fp32: {1 / fp32:.3g} steps/s", fp32 / bf16
    )
    yield _layers(bench)
    yield from _reading(bench, cache, min(fp32, bf16))


def _step_seconds(bench: Workbench, cache: LatentCache, precision: Literal["fp32", "bf16"]) -> float:
    """Seconds per training step of the configuration, precision aside."""
    config, device, steps = bench.config, bench.device, itertools.count()
    training = config.flow.training.model_copy(update={"precision": precision})
    config = config.model_copy(update={"flow": config.flow.model_copy(update={"training": training})})
    sampler = ResidentSampler(cache, device, config.seed, training.batch_size, training.clip_frames)
    trainer = FlowTrainer(config, device, cache, sampler)
    with computing_in("fp32" if precision == "fp32" else "tf32", device):
        for _ in range(WARM_UP_STEPS + 2 if device.type == "cuda" else 0):
            trainer.train_step(next(steps))  # compiles and records
        (seconds,) = bench.in_turn(lambda: trainer.train_step(next(steps)), calls=bench.calls)
    sampler.close()
    return seconds


def _without_encoding(bench: Workbench, step: float) -> Measurement:
    """A step on stored latents, compared to one that first encodes its three frames per sample."""
    size, side = bench.config.flow.training.batch_size, bench.config.dataset.image_size
    autoencoder = random_autoencoder(bench)
    images = torch.rand(size, 3, side, side, device=bench.device) * 2 - 1
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


def _layers(bench: Workbench) -> Measurement:
    """Forward and backward pass of both fields, without an update."""
    rows, shape, device = bench.config.flow.training.batch_size, bench.latent_shape, bench.device
    model = bench.config.flow.model.model_copy(update={"qk_norm": False})  # PyTorch's layers have none
    field = VectorField(model, shape[0]).to(device)
    plain = of_pytorch_layers(field)
    batch = FlowBatch(*torch.randn(3, rows, *shape, device=device), torch.arange(1, rows + 1, device=device))
    draws = draw_flow((rows, *shape), torch.Generator(device).manual_seed(0), device)

    def passes(network: VectorField) -> None:
        flow_matching_loss(network, batch, draws).backward()
        network.zero_grad(set_to_none=True)

    with exact_kernels():
        ours, reference = bench.in_turn(lambda: passes(field), lambda: passes(plain), calls=bench.calls)
    return Measurement(
        f"flow: forward and backward, batch {rows}, fp32", rows / ours, "samples/s",
        f"of nn.TransformerEncoderLayer: {rows / reference:.3g} samples/s", reference / ours, at_least=1.0,
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
