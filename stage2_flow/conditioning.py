"""Which past frame conditions each evaluation of the field, and the keyed random draws of a rollout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stage2_flow.config import ConditionTiming


@dataclass(frozen=True)
class PastWindow:
    """The frames that a condition is drawn from: `count` frames, starting at index `first`."""

    first: int
    count: int


def past_window(length: int, past_horizon: int | None) -> PastWindow:
    """The window U{first .. length - 2}, first = max(0, length - past_horizon).

    (The official code has `min(0, length - past_horizon)`: either without effect, or a negative index.)

    Args:
        length: number of frames known so far, at least 2; the last one is the reference and never a condition.
        past_horizon: the window lies within the last `past_horizon` frames, at least 2; None: within all frames.
    Raises:
        ValueError: a length or horizon below 2.
    """
    if length < 2:
        raise ValueError(f"a condition and a reference need at least 2 frames, got {length}")
    if past_horizon is not None and past_horizon < 2:
        raise ValueError(f"past_horizon must be at least 2 (a condition and the reference) or None, got {past_horizon}")
    first = 0 if past_horizon is None else max(0, length - past_horizon)
    return PastWindow(first=first, count=length - 1 - first)


def known_frames(context_frames: int) -> int:
    """Frames that the first prediction builds on: a single context frame counts twice, as `[z0, z0]`.

    Raises:
        ValueError: no context frame.
    """
    if context_frames < 1:
        raise ValueError(f"a prediction needs at least 1 context frame, got {context_frames}")
    return max(2, context_frames)


@dataclass(frozen=True)
class SamplingDraws:
    """The random draws of a rollout.

    Attributes:
        noise: [frames, b, c, h, w] float from N(0, I).
        condition_indices: [frames, evaluations, b] int64 indices into the frames known at that time; a single context
            frame counts twice.
    """

    noise: Tensor
    condition_indices: Tensor


def make_draws(
    seed: int,
    keys: Sequence[tuple[int, int]],
    num_frames: int,
    nfe: int,
    context_frames: int,
    latent_shape: tuple[int, int, int],
    past_horizon: int | None,
    device: torch.device | str,
    *,
    condition: ConditionTiming = "per-evaluation",
) -> SamplingDraws:
    """Draw a rollout's noise and conditions, as a function of (seed, video, sample, frame) alone.

    So a video's prediction depends neither on its batch nor on the device, a longer rollout begins with the shorter
    one, and all solvers start from the same noise.

    Args:
        seed: seed of the run, at least 0.
        keys: (video, sample) of each batch element, both at least 0.
        num_frames: frames to predict, at least 1.
        nfe: evaluations of the field per frame.
        context_frames: number of given frames, at least 1.
        latent_shape: (c, h, w).
        past_horizon: see `past_window`.
        device: where the draws are placed.
        condition: draw a condition at each evaluation (the paper), or once per frame.
    Raises:
        ValueError: no frame or key, a negative seed or key, or an invalid length or horizon (see `past_window`).
    """
    if num_frames < 1 or not keys:
        raise ValueError(f"draws need at least 1 frame and 1 key, got {num_frames} frames and {len(keys)} keys")
    if min(seed, *(part for key in keys for part in key)) < 0:
        raise ValueError(f"seed and keys must be at least 0, got seed {seed} and keys {list(keys)}")
    first_length = known_frames(context_frames)
    windows = [past_window(first_length + frame, past_horizon) for frame in range(num_frames)]
    noise = np.empty((len(keys), num_frames, *latent_shape), dtype=np.float32)
    uniforms = np.empty((len(keys), num_frames, nfe), dtype=np.float64)
    for element, (video, sample) in enumerate(keys):
        # numpy, whose seed sequences mix any number of words: torch's CPU generator keeps 32 bits of a seed. Noise and
        # conditions are separate streams, each drawn frame by frame, so the noise does not depend on the solver.
        key = (seed, video, sample)
        noise[element] = np.random.default_rng((*key, 0)).standard_normal(noise.shape[1:], dtype=np.float32)
        draws_per_frame = nfe if condition == "per-evaluation" else 1
        uniforms[element] = np.random.default_rng((*key, 1)).random((num_frames, draws_per_frame))
    indices = condition_indices(torch.from_numpy(uniforms).permute(1, 2, 0), windows)
    return SamplingDraws(
        noise=torch.from_numpy(noise).transpose(0, 1).contiguous().to(device),
        condition_indices=indices.contiguous().to(device),
    )


def condition_indices(uniforms: Tensor, windows: Sequence[PastWindow]) -> Tensor:
    """Map uniform numbers u to frame indices: first + floor(u count).

    Args:
        uniforms: [frames, evaluations, b] float64 in [0, 1). In float64 the product stays below count.
        windows: one per frame.
    Returns:
        [frames, evaluations, b] int64.
    """
    first = torch.tensor([window.first for window in windows])[:, None, None]
    count = torch.tensor([window.count for window in windows])[:, None, None]
    return first + (uniforms * count).floor().long()
