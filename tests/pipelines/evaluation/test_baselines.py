"""Constant motion: worlds in which it is the truth."""

import torch
from einops import repeat
from torch import Tensor
from torch.nn import functional as F

from pipelines.evaluation.baselines import continue_motion, motion_fields
from pipelines.evaluation.measures.metrics import psnr

# Pixels to the right and down per frame.
MOTIONS = ((2, 0), (-1, 3), (0, 0))


def world(frames: int, height: int = 48, width: int = 64) -> Tensor:
    """Textures that move around the edges of the frame: [motion, frames, 3, h, w] in [-1, 1]."""
    noise = torch.rand(len(MOTIONS), 3, height // 4, width // 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texture = F.interpolate(noise, scale_factor=4, mode="bicubic").clamp(-1, 1)
    return torch.stack(
        [
            torch.stack([image.roll((down * frame, right * frame), (1, 2)) for frame in range(frames)])
            for image, (right, down) in zip(texture, MOTIONS, strict=True)
        ]
    )


def test_a_world_of_constant_motion_is_solved():
    video = world(9)
    given, truth = video[:, :3], video[:, 3:]
    inside = (..., slice(18, -18), slice(12, -12))  # what has not come in over an edge in six frames
    predicted = continue_motion(given, 6)
    assert predicted.shape == truth.shape
    quality = psnr(predicted[inside].flatten(0, 1), truth[inside].flatten(0, 1)).view(3, 6)
    copying = psnr(given[:2, 2:][inside].expand(-1, 6, -1, -1, -1).flatten(0, 1), truth[:2][inside].flatten(0, 1))
    assert quality.min() > 30 > 20 > copying.max()
    torch.testing.assert_close(
        predicted[2], truth[2], rtol=0, atol=2**-14
    )  # rounding of positions up to 64, in six steps


def test_flow_is_measured_in_pixels_to_the_right_and_down():
    flow = motion_fields(world(2)).median(3).values.median(2).values
    torch.testing.assert_close(flow, torch.tensor(MOTIONS).float(), rtol=0, atol=0.1)


def test_a_uniform_frame_stays_as_it_is():
    given = repeat(torch.tensor([0.25]), "1 -> b t c h w", b=1, t=2, c=3, h=16, w=32)
    torch.testing.assert_close(continue_motion(given, 4), given[:, :1].expand(-1, 4, -1, -1, -1))
