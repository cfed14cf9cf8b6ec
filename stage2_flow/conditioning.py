"""Which past frame conditions each evaluation of the field, and the keyed random draws of a rollout."""

import itertools
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class FrameDraws:
    """Those of one frame: `noise` [b, c, h, w] and `condition_indices` [evaluations, b], on the CPU."""

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
    if num_frames < 1:
        raise ValueError(f"draws need at least 1 frame, got {num_frames} frames")
    frames = draw_frames(seed, keys, nfe, context_frames, latent_shape, past_horizon, condition=condition)
    drawn = list(itertools.islice(frames, num_frames))
    return SamplingDraws(
        noise=torch.stack([draw.noise for draw in drawn]).to(device),
        condition_indices=torch.stack([draw.condition_indices for draw in drawn]).to(device),
    )


def draw_frames(
    seed: int,
    keys: Sequence[tuple[int, int]],
    nfe: int,
    context_frames: int,
    latent_shape: tuple[int, int, int],
    past_horizon: int | None,
    *,
    condition: ConditionTiming = "per-evaluation",
) -> Iterator[FrameDraws]:
    """Draw frame by frame, without end, what `make_draws` draws at once; arguments and errors as there."""
    if not keys:
        raise ValueError("draws need at least 1 key, got 0 keys")
    if min(seed, *(part for key in keys for part in key)) < 0:
        raise ValueError(f"seed and keys must be at least 0, got seed {seed} and keys {list(keys)}")
    first_length = known_frames(context_frames)
    past_window(first_length, past_horizon)
    draws_per_frame = nfe if condition == "per-evaluation" else 1
    # numpy, whose seed sequences mix any number of words: torch's CPU generator keeps 32 bits of a seed. Noise and
    # conditions are separate streams, each drawn frame by frame, so the noise does not depend on the solver.
    noises, conditions = ([np.random.default_rng((seed, *key, stream)) for key in keys] for stream in (0, 1))

    def frames() -> Iterator[FrameDraws]:
        for length in itertools.count(first_length):
            noise = np.stack([stream.standard_normal(latent_shape, dtype=np.float32) for stream in noises])
            uniforms = np.stack([stream.random(draws_per_frame) for stream in conditions], axis=1)
            indices = condition_indices(torch.from_numpy(uniforms), past_window(length, past_horizon))
            yield FrameDraws(torch.from_numpy(noise), indices.expand(nfe, -1))

    return frames()


def condition_indices(uniforms: Tensor, window: PastWindow) -> Tensor:
    """Map uniform numbers u to frame indices: first + floor(u count).

    Args:
        uniforms: [...] float64 in [0, 1). In float64 the product stays below count.
    Returns:
        [...] int64.
    """
    return window.first + (uniforms * window.count).floor().long()
