"""Benchmarks of flow training: what the cache saves a step, our layers against PyTorch's, FLOP/s, waiting for data."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import latent_cache
from latent_cache import FlowBatch, LatentCache, ResidentSampler, Sampler, StreamingSampler
from pipelines.bench import Measurement, in_turn
from pipelines.bench_autoencoder import plain_encode
from pipelines.bench_flow_steps import (
    FlowStep,
    Shape,
    encoded_batch,
    of_pytorch_layers,
    random_batch,
    write_latents,
)
from pipelines.config import RiverConfig
from pipelines.flow_memory import estimate_memory
from pipelines.frame_encoder import exact_kernels
from pipelines.runtime.recorded_step import WARM_UP_STEPS
from pipelines.runtime.throughput import matmul_rate, peak_memory, step_flops
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.config import FlowTrainingConfig, VectorFieldConfig
from stage2_flow.loss import draw_flow, flow_matching_loss
from stage2_flow.vector_field import VectorField

BATCH = 16  # the paper's
SECONDS = 12.0  # after which a comparison begins no other turn
MOST_TURNS = 15
STEPS = {"cpu": 1, "cuda": 20}  # measured together, so that a GPU is waited for once
BUDGET_SHARE = 4  # the streaming tier has this part of the store's size
POOL_FRAMES = 64  # different ones that are encoded
# On a GPU: rows, side of the latents, most milliseconds, least MFU of a step at the paper's sizes.
GPU_STEPS = ((16, 8, 5.0, None), (64, 8, None, None), (256, 8, None, 0.40), (64, 16, None, 0.35))


def flow_measurements(config: RiverConfig, device: torch.device) -> Iterator[Measurement]:
    """Measure training steps at the configuration's sizes, from random latents, frames and weights."""
    torch.manual_seed(0)
    sizes, side = config.autoencoder.model, config.dataset.image_size
    shape = (sizes.latent_channels, *[side // sizes.downsampling] * 2)
    plain_adamw = {"optimizer": "adamw", "accumulate": 1, "batch_size": BATCH, "precision": "fp32"}
    model, training = config.flow.model, config.flow.training.model_copy(update=plain_adamw)
    frames = torch.randint(0, 256, (POOL_FRAMES, side, side, 3), dtype=torch.uint8)
    with tempfile.TemporaryDirectory(prefix="river-bench-flow-") as folder:
        cache = latent_cache.open(write_latents(Path(folder) / "latents.zarr", shape))
        sampler, numbers = ResidentSampler(cache, device, 0, BATCH, training.clip_frames), itertools.count()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with exact_kernels():
            step = FlowStep(model, training, shape, device)
            step(sampler.batch(0))  # makes the optimizer's state
            memory = peak_memory(device)
            autoencoder = build_autoencoder(sizes).to(device).eval().requires_grad_(False)
            encoders = [autoencoder.encode]
            if isinstance(autoencoder, VQGAN):
                encoders.append(lambda images: plain_encode(autoencoder, images))
            cached, looped, *publicly = _turns(
                device,
                lambda: step(sampler.batch(next(numbers))),
                *(
                    lambda encode=encode: step(encoded_batch(encode, frames, sampler.indices(next(numbers)), device))
                    for encode in encoders
                ),
            )
        # The custom VQ-VAE's encoder is a tenth of a step: there the cache does not save much time.
        yield Measurement(
            f"flow: step from the cache, batch {BATCH}, fp32", 1 / cached, "steps/s",
            f"its 3 frames a sample encoded in it: {1 / looped:.3g}/s", looped / cached,
            at_least=1.5 if isinstance(autoencoder, VQGAN) else None,
        )  # fmt: skip
        for seconds in publicly:
            words = f"encoded as the public code does: {1 / seconds:.3g}/s"
            yield Measurement("flow: the same", 1 / cached, "steps/s", words, seconds / cached)
        yield Measurement("flow: samples/s of it", BATCH / cached, "samples/s")
        yield _utilisation("flow: the model's FLOP/s in it", model, shape, BATCH, cached, matmul_rate(device))
        estimate = estimate_memory(model, training, shape, device=device.type, latents_bytes=cache.nbytes)
        yield Measurement(
            "flow: memory" + (" of this process so far" if device.type == "cpu" else ""), memory / 1e9, "GB",
            f"computed for the step: {estimate.total / 1e9:.2f} GB",
        )  # fmt: skip
        yield _layers(model, shape, device, BATCH)
        yield from _waiting(step, cache, config.flow.training, device, cached)
        sampler.close()
    yield _bf16(model, training, shape, device, cached)
    if device.type == "cuda":
        yield from _gpu_steps(training, device)


def _layers(model: VectorFieldConfig, shape: Shape, device: torch.device, rows: int) -> Measurement:
    """Forward and backward pass of both fields in turn, without an update."""
    field = VectorField(model.model_copy(update={"qk_norm": False}), shape[0]).to(device)
    batch = random_batch(rows, shape, device)
    draws = draw_flow((rows, *shape), torch.Generator(device).manual_seed(0), device)

    def passes(network: VectorField) -> None:
        flow_matching_loss(network, batch, draws).backward()
        network.zero_grad(set_to_none=True)

    plain = of_pytorch_layers(field)
    with exact_kernels():
        ours, reference = _turns(device, lambda: passes(field), lambda: passes(plain))
    return Measurement(
        f"flow: field there and back, batch {rows}, fp32", rows / ours, "samples/s",
        f"of nn.TransformerEncoderLayer: {rows / reference:.3g}/s", reference / ours, at_least=1.0,
    )  # fmt: skip


def _waiting(
    step: FlowStep, cache: LatentCache, training: FlowTrainingConfig, device: torch.device, seconds: float
) -> Iterator[Measurement]:
    """The share of a step at the configured batch size that goes by before its batch is there."""
    budget, size = cache.nbytes // BUDGET_SHARE, training.batch_size
    resident = ResidentSampler(cache, device, 0, size, training.clip_frames)
    streaming = StreamingSampler(cache, device, 0, size, training.clip_frames, budget)
    prepared = resident.batch(0)
    if size != BATCH or device.type == "cuda":
        (seconds,) = _turns(device, lambda: step(prepared))
    for sampler, what, most in (
        (resident, "resident", 0.01),
        (streaming, f"streamed, {cache.nbytes / 1e6:.0f} MB through {budget / 1e6:.0f} MB", 0.05),
    ):
        share, how = _share(step, sampler, prepared, device, seconds)
        name = f"flow: waiting for data, {what}"
        yield Measurement(name, 100 * share, "% of a step", how, share, at_most=most)
        sampler.close()


def _share(
    step: FlowStep, sampler: Sampler, prepared: FlowBatch, device: torch.device, seconds: float
) -> tuple[float, str]:
    """On a GPU what steps take longer for drawing batches. On a CPU what an epoch of batches takes by itself.

    The latter is the most that it can be: nothing is read behind the computing.
    """
    numbers = itertools.count()
    if device.type == "cuda":
        (with_data,) = _turns(device, lambda: step(sampler.batch(next(numbers))))
        return max(0.0, 1 - seconds / with_data), f"steps on one batch: {seconds * 1e3:.3g} ms"
    steps = max(1, sampler.legal_targets // sampler.batch_size)
    started = time.perf_counter()
    for _ in range(steps):
        sampler.batch(next(numbers))
    waited = (time.perf_counter() - started) / steps
    return waited / (waited + seconds), f"{waited * 1e6:.0f} us a batch of {sampler.batch_size}"


def _bf16(
    model: VectorFieldConfig, training: FlowTrainingConfig, shape: Shape, device: torch.device, fp32: float
) -> Measurement:
    step, batch = FlowStep(model, training, shape, device, "bf16"), random_batch(BATCH, shape, device)
    step(batch)
    (seconds,) = _turns(device, lambda: step(batch))
    words = f"fp32: {1 / fp32:.3g} steps/s"
    return Measurement(f"flow: step, batch {BATCH}, bf16", 1 / seconds, "steps/s", words, fp32 / seconds)


def _gpu_steps(training: FlowTrainingConfig, device: torch.device) -> Iterator[Measurement]:
    """Steps as `auto` makes them on a GPU, at the paper's sizes: bf16, compiled (a minute for each size), recorded."""
    model, rate = VectorFieldConfig(), matmul_rate(device, torch.bfloat16)
    for rows, side, most_milliseconds, least_share in GPU_STEPS:
        shape = (4 if side == 8 else 8, side, side)
        batch, step = random_batch(rows, shape, device), FlowStep(model, training, shape, device, "bf16", fast=True)
        for _ in range(WARM_UP_STEPS + 2):
            step(batch)
        (seconds,) = _turns(device, lambda step=step, batch=batch: step(batch))
        name = f"flow: bf16, compiled, batch {rows}, {side * side + 1} tokens"
        milliseconds = seconds * 1e3
        yield Measurement(
            name, milliseconds, "ms/step",
            ratio=None if most_milliseconds is None else milliseconds, at_most=most_milliseconds,
        )  # fmt: skip
        yield _utilisation(f"{name}: MFU", model, shape, rows, seconds, rate, least_share)


def _utilisation(
    name: str, model: VectorFieldConfig, shape: Shape, rows: int, seconds: float, rate: float,
    at_least: float | None = None,
) -> Measurement:  # fmt: skip
    flops = step_flops(model, shape, rows) / seconds
    words = f"matrix products: {rate / 1e12:.3g} TFLOP/s"
    return Measurement(name, flops / 1e12, "TFLOP/s", words, flops / rate, at_least=at_least)


def _turns(device: torch.device, *functions: Callable[[], object]) -> list[float]:
    """Least seconds of each function, run in turn as often as fits into a bounded time, at least once."""
    steps = STEPS[device.type]

    def several(function: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps):
                function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return run

    runs = [several(function) for function in functions]
    started = time.perf_counter()
    least = in_turn(*runs, repeats=1)
    for _ in range(MOST_TURNS - 1):
        if time.perf_counter() - started > SECONDS:
            break
        least = [min(pair) for pair in zip(least, in_turn(*runs, repeats=1), strict=True)]
    return [seconds / steps for seconds in least]
