"""The vector field as an integration asks for it: bound to a frame, with what stays the same computed once."""

from collections.abc import Callable
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from stage2_flow.linear import linear
from stage2_flow.vector_field import VectorField, time_embedding

Trunk = Callable[[Tensor, Tensor, int, int], Tensor]


class Evaluator(Protocol):
    """A field on the way of one batch of frames."""

    def begin_frame(self, reference: Tensor) -> None:
        """Take the previous frames' final latents [b, c, h, w], in the place of those before."""

    def velocity(self, t: Tensor, y: Tensor, evaluation: Tensor, condition: Tensor, distance: Tensor) -> Tensor:
        """Evaluate the field.

        Args:
            t: [] time.
            y: [b, c, h, w] point of the path.
            evaluation: [] int64, which evaluation of the frame this is: it belongs to t.
            condition: [b, c, h, w]; distance: [b] int64, from it to the reference.
        Returns:
            [b, c, h, w] in the field's precision.
        """
        ...


class PlainEvaluator:
    """Calls the field as it is, whatever it is, with tensors that it may keep."""

    def __init__(self, field: nn.Module, reference: Tensor) -> None:
        self.field, self.reference = field, reference

    def begin_frame(self, reference: Tensor) -> None:
        self.reference = reference.clone()

    def velocity(self, t: Tensor, y: Tensor, evaluation: Tensor, condition: Tensor, distance: Tensor) -> Tensor:
        return self.field(y.clone(), self.reference, condition, distance, t.expand(len(y)))


class CachedEvaluator:
    """A `VectorField` whose embeddings are sums of parts, each computed as seldom as it changes.

    Once: the codes of place, of all times and of all distances. Once a frame: the projection of the reference. At each
    evaluation that of the point and the condition, in fp32 whatever the trunk computes in, for it is a
    ten-thousandth of the work.
    """

    def __init__(
        self, field: VectorField, times: Tensor, longest: int, reference: Tensor, trunk: Trunk | None = None
    ) -> None:
        """Compute what does not change in a rollout.

        Args:
            times: [evaluations] of a frame, on the device.
            longest: largest distance between a condition and its reference.
            reference: [b, c, h, w], of whose kind the frames will be.
            trunk: in place of `field.trunk`: the same, compiled.
        """
        projection = field.project_in["1"]
        batch, channels, self.height, self.width = reference.shape
        self.trunk = trunk or field.trunk
        with torch.autocast(reference.device.type, enabled=False):
            # [features, frames c]: the columns of the point, of the reference where there is one, of the condition
            point, *references, condition = projection.weight.split(channels, dim=1)
            self.moving = torch.cat([point, condition], dim=1)
            self.standing = references[0].contiguous() if references else None
            self.places = projection.bias + field.position_encoding(self.height, self.width)
            self.time_tokens = time_embedding(times, field.config.width)
            # A distance is at least 1; place 0 of the table is not looked at.
            self.distances = field.distance_code(torch.arange(longest + 1, device=reference.device).clamp(min=1))
        self.frame = self.places.expand(batch, -1, -1).clone()

    def begin_frame(self, reference: Tensor) -> None:
        if self.standing is not None:
            with torch.autocast(reference.device.type, enabled=False):
                projected = linear(_tokens(reference).to(self.standing.dtype), self.standing)
            self.frame.copy_(self.places + projected)

    def velocity(self, t: Tensor, y: Tensor, evaluation: Tensor, condition: Tensor, distance: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            moving = _tokens(torch.cat([y, condition], dim=1)).to(self.moving.dtype)
            tokens = linear(moving, self.moving) + self.frame + self.distances[distance][:, None]
        time_token = self.time_tokens[evaluation].expand(len(y), -1)
        return self.trunk(tokens, time_token, self.height, self.width)


def _tokens(frames: Tensor) -> Tensor:
    return rearrange(frames, "b c h w -> b (h w) c")
