"""Benchmarks of flow training: what the cache saves a step, our layers against PyTorch's, FLOP/s, waiting for data."""

import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import latent_cache
from latent_cache import (
    FlowBatch,
    FlowIndices,
    LatentCache,
    ResidentSampler,
    Sampler,
    SplitPlan,
    StoreMetadata,
    StoreWriter,
    StreamingSampler,
)
from pipelines.bench.autoencoder_speed import plain_encode
from pipelines.bench.measurement import Measurement, in_turn
from pipelines.config import RiverConfig
from pipelines.runtime.cuda_graph_step import WARM_UP_STEPS, CudaGraphStep
from pipelines.runtime.throughput import matmul_rate, peak_memory, step_flops
from pipelines.runtime.train_state import TrainState
from pipelines.training.flow_memory import estimate_memory
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.frame_encoder import exact_kernels
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.config import FlowTrainingConfig, VectorFieldConfig
from stage2_flow.loss import FlowDraws, draw_flow, flow_matching_loss
from stage2_flow.vector_field import FEED_FORWARD, TransformerBlock, VectorField

Shape = tuple[int, int, int]

CHUNK_FRAMES, CHUNKS, VIDEO_FRAMES = 512, 40, 100  # of the store of random latents


class FlowStep:
    """Training steps of a fresh vector field on batches of final latents: draws, both passes, update, average.

    Args:
        training: learning rates, clipping, average.
        precision: of matrix products.
        fast: compile the field and record the step as a CUDA graph; on a GPU.
    """

    def __init__(
        self,
        model: VectorFieldConfig,
        training: FlowTrainingConfig,
        latent_shape: Shape,
        device: torch.device,
        precision: Literal["fp32", "bf16"] = "fp32",
        *,
        fast: bool = False,
    ) -> None:
        self.device, self.precision = device, precision
        self.field = VectorField(model, latent_shape[0]).to(device)
        self.network = torch.compile(self.field, fullgraph=True, dynamic=False) if fast else self.field
        self.train_state = TrainState(self.field, training, self.field.boundary_parameters(), recordable=fast)
        self.train_state.set_rate(1.0)
        self.generator = torch.Generator(device).manual_seed(0)
        self.update = CudaGraphStep(self._update) if fast else self._update

    def __call__(self, batch: FlowBatch) -> Tensor:
        """One step on a batch [b, c, h, w] on the device; gives the loss without waiting for it."""
        draws = draw_flow(batch.target.shape, self.generator, self.device)
        frames = (batch.target, batch.reference, batch.condition, batch.distance)
        return self.update(*frames, draws.noise, draws.t)[0]

    def _update(self, *tensors: Tensor) -> tuple[Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = flow_matching_loss(self.network, FlowBatch(*tensors[:4]), FlowDraws(*tensors[4:]))
        loss.backward()
        self.train_state.step()
        return (loss.detach(),)


@torch.no_grad()
def encoded_batch(
    encode: Callable[[Tensor], Tensor], frames: Tensor, drawn: FlowIndices, device: torch.device
) -> FlowBatch:
    """A batch whose three frames a sample are encoded now, as the official training does in each step.

    Args:
        encode: images to latents.
        frames: [n, h, w, 3] uint8 on the CPU; frame number i of the split is row i modulo n.
        drawn: frame numbers [b] and distances [b].
    """
    rows = torch.cat([drawn.target, drawn.reference, drawn.condition]) % len(frames)
    latents = encode(image_to_unit(frames[rows].to(device)))
    return FlowBatch(*latents.chunk(3), drawn.distance.to(device))


def of_pytorch_layers(field: VectorField) -> VectorField:
    """The same field with the same weights, its blocks `nn.TransformerEncoderLayer`s (those know no `qk_norm`)."""
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


def random_batch(rows: int, shape: Shape, device: torch.device) -> FlowBatch:
    """Rows of random latents at distances 1, 2, ..."""
    return FlowBatch(*torch.randn(3, rows, *shape, device=device), torch.arange(1, rows + 1, device=device))


def write_latents(path: Path, shape: Shape) -> Path:
    """A store of random latents in videos of 100 frames, without codes: some MB in chunks of half a MB."""
    count = CHUNK_FRAMES * CHUNKS
    lengths = np.diff(np.append(np.arange(0, count, VIDEO_FRAMES), count))
    names = [f"video_{row:04d}" for row in range(len(lengths))]
    plan = SplitPlan(names, ["identity"] * len(names), lengths, shape, CHUNK_FRAMES)
    metadata = StoreMetadata("bench", 25.0, {}, {"sha256": "bench"}, {})
    latents = np.random.default_rng(0).standard_normal((CHUNK_FRAMES, *shape), np.float32)
    with StoreWriter.open(path, metadata, {"train": plan}, codes=False) as writer:
        for part in writer.pending("train"):
            writer.write_chunk("train", part, latents[: part.frames], None)
        writer.finish()
    return path


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
