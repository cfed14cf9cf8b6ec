"""What the benchmarks of flow training run: training steps, the autoencoder in their loop, a field of other layers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from latent_cache import FlowBatch, FlowIndices, SplitPlan, StoreMetadata, StoreWriter
from pipelines.runtime.learner import Learner
from pipelines.runtime.recorded_step import RecordedStep
from stage1_autoencoder.autoencoder import image_to_unit
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
        self.learner = Learner(self.field, training, self.field.boundary_parameters(), recordable=fast)
        self.learner.set_rate(1.0)
        self.generator = torch.Generator(device).manual_seed(0)
        self.update = RecordedStep(self._update) if fast else self._update

    def __call__(self, batch: FlowBatch) -> Tensor:
        """One step on a batch [b, c, h, w] on the device; gives the loss without waiting for it."""
        draws = draw_flow(batch.target.shape, self.generator, self.device)
        frames = (batch.target, batch.reference, batch.condition, batch.distance)
        return self.update(*frames, draws.noise, draws.t)[0]

    def _update(self, *tensors: Tensor) -> tuple[Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = flow_matching_loss(self.network, FlowBatch(*tensors[:4]), FlowDraws(*tensors[4:]))
        loss.backward()
        self.learner.step()
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
