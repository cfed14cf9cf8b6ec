"""Benchmarks of sampling: predicted frames per second, compared to a field of PyTorch's layers called step by step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipelines.bench.flow_speed import of_pytorch_layers
from pipelines.bench.measurement import Measurement
from pipelines.bench.workbench import Workbench
from pipelines.prediction.rollouts import FieldRollouts
from pipelines.runtime.context import computing_in, sampling_precision
from stage2_flow.conditioning import make_draws
from stage2_flow.config import SamplingConfig
from stage2_flow.vector_field import VectorField

CONTEXT = 10
FRAMES = {"cpu": 1, "cuda": 4}  # predicted per clip


def sampling_measurements(bench: Workbench) -> Iterator[Measurement]:
    """Measure Euler rollouts at the configuration's sizes, from random latents and weights."""
    torch.manual_seed(0)
    device = bench.device
    model = bench.config.flow.model.model_copy(update={"qk_norm": False})  # PyTorch's layers have none
    field = VectorField(model, bench.latent_shape[0]).to(device).eval().requires_grad_(False)
    plain, rollouts, frames = of_pytorch_layers(field), FieldRollouts(field, device), FRAMES[device.type]
    for clips, nfe in bench.sizes.rollouts:
        # Compiled on a GPU, as for many clips.
        options = SamplingConfig(solver="euler", nfe=nfe, batch_size=clips, compile=device.type == "cuda")
        context = torch.randn(clips, CONTEXT, *bench.latent_shape, device=device)
        precision = sampling_precision(options, device)
        ours, reference = bench.in_turn(
            lambda context=context, options=options: predict(rollouts, context, frames, options),
            lambda context=context, nfe=nfe, precision=precision: predict_plainly(
                plain, context, frames, nfe, precision
            ),
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
def predict_plainly(field: VectorField, context: Tensor, frames: int, nfe: int, precision: str) -> Tensor:
    """Euler as it is usually written: draws, gathers and calls one after another, and a growing past."""
    device, rows = context.device, torch.arange(len(context), device=context.device)
    past = context
    with computing_in(precision, device):
        for _ in range(frames):
            length = past.shape[1]
            y = torch.randn_like(past[:, -1])
            for step in range(nfe):
                t = torch.full((len(context),), step / nfe, device=device)
                index = torch.randint(0, length - 1, (len(context),), device=device)
                y = y + field(y, past[:, -1], past[rows, index], length - 1 - index, t) / nfe
            past = torch.cat([past, y[:, None]], dim=1)
    return past
