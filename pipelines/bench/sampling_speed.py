"""Benchmarks of sampling: predicted frames beside the same field called step by step, and whether a long past costs."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipelines.bench.flow_speed import Shape, of_pytorch_layers
from pipelines.bench.measurement import Measurement, in_turn
from pipelines.config import RiverConfig
from pipelines.prediction.rollouts import FieldRollouts
from pipelines.runtime.context import computing_in
from stage2_flow.conditioning import make_draws
from stage2_flow.config import SamplingConfig
from stage2_flow.vector_field import VectorField

BATCHES = (1, 4, 64)
CONTEXT = 10
PASTS = (10, 100, 500)
# Frames and evaluations of each that are timed: a GPU needs many to show what it can, a CPU few.
FRAMES = {"cpu": 1, "cuda": 4}
EVALUATIONS = {"cpu": {1: 8, 4: 8, 64: 1}, "cuda": {1: 40, 4: 40, 64: 40}}
SECONDS = 6.0  # after which a comparison begins no other turn
MOST_TURNS = 20


def sampling_measurements(config: RiverConfig, device: torch.device) -> Iterator[Measurement]:
    """Measure Euler rollouts at the configuration's sizes, from random latents and weights."""
    torch.manual_seed(0)
    sizes, side = config.autoencoder.model, config.dataset.image_size
    shape = (sizes.latent_channels, *[side // sizes.downsampling] * 2)
    field = VectorField(config.flow.model, shape[0]).to(device).eval().requires_grad_(False)
    plain = of_pytorch_layers(field)
    rollouts, frames = FieldRollouts(field, device), FRAMES[device.type]
    for batch in BATCHES:
        nfe = EVALUATIONS[device.type][batch]
        options = _options(nfe, device)
        context = torch.randn(batch, CONTEXT, *shape, device=device)
        ours, same_field, plain_field = (
            seconds / frames
            for seconds in _turns(
                lambda options=options, context=context: _predict(rollouts, context, frames, options),
                lambda context=context, nfe=nfe: _step_by_step(field, context, frames, nfe),
                lambda context=context, nfe=nfe: _step_by_step(plain, context, frames, nfe),
            )
        )
        yield Measurement(
            f"sampling: a frame of {batch} at {nfe} evaluations", 1000 * ours, "ms",
            f"of PyTorch's layers step by step: {1000 * plain_field:.4g} ms", plain_field / ours, at_least=1.0,
        )  # fmt: skip
        words = f"our field step by step: {1000 * same_field:.4g} ms"
        yield Measurement("sampling: the same", 1000 * ours, "ms", words, same_field / ours)
        yield Measurement("sampling: evaluations of it", nfe / ours, "NFE/s")
        yield Measurement("sampling: frames of it", batch / ours, "frames/s")
    yield _long_past(rollouts, shape, device)


def _options(nfe: int, device: torch.device) -> SamplingConfig:
    """The defaults of the device; a GPU compiles as it does for many clips."""
    return SamplingConfig(solver="euler", nfe=nfe, batch_size=max(BATCHES), compile=device.type == "cuda")


def _predict(rollouts: FieldRollouts, context: Tensor, frames: int, options: SamplingConfig) -> None:
    """A prediction with all that belongs to it: draws, tables, rollout."""
    keys = [(row, 0) for row in range(len(context))]
    latent_shape = tuple(context.shape[2:])
    draws = make_draws(0, keys, frames, options.nfe, context.shape[1], latent_shape, None, context.device)
    rollouts.generate(context, frames, options, draws)
    _wait(context.device)


@torch.no_grad()
def _step_by_step(field: VectorField, context: Tensor, frames: int, nfe: int) -> None:
    """Euler as it is usually written: draws, gathers and calls one after another, a growing past."""
    device, rows = context.device, torch.arange(len(context), device=context.device)
    past = context
    with computing_in("fp32", device):
        for _ in range(frames):
            length = past.shape[1]
            y = torch.randn_like(past[:, -1])
            for step in range(nfe):
                t = torch.full((len(context),), step / nfe, device=device)
                index = torch.randint(0, length - 1, (len(context),), device=device)
                y = y + field(y, past[:, -1], past[rows, index], length - 1 - index, t) / nfe
            past = torch.cat([past, y[:, None]], dim=1)
    _wait(device)


def _long_past(rollouts: FieldRollouts, shape: Shape, device: torch.device) -> Measurement:
    """A frame after the shortest and the longest past."""
    options = _options(EVALUATIONS[device.type][1], device)
    contexts = [torch.randn(1, length, *shape, device=device) for length in PASTS]

    def frame(context: Tensor) -> None:
        _predict(rollouts, context, FRAMES[device.type], options)

    seconds = _turns(*(lambda context=context: frame(context) for context in contexts))
    milliseconds = [1000 * value / FRAMES[device.type] for value in seconds]
    words = ", ".join(f"{length}: {value:.4g}" for length, value in zip(PASTS[:-1], milliseconds[:-1], strict=True))
    return Measurement(
        f"sampling: a frame after {PASTS[-1]} frames", milliseconds[-1], "ms", f"after {words} ms",
        milliseconds[-1] / milliseconds[0], at_most=1.1,
    )  # fmt: skip


def _turns(*functions: Callable[[], None]) -> list[float]:
    """Least seconds of each function, run in turn as often as fits into a bounded time, after one turn to warm up."""
    in_turn(*functions, repeats=1)
    started, least = time.perf_counter(), in_turn(*functions, repeats=1)
    for _ in range(MOST_TURNS):
        if time.perf_counter() - started > SECONDS:
            break
        least = [min(pair) for pair in zip(least, in_turn(*functions, repeats=1), strict=True)]
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
