"""The condition's window, and draws that are a function of seed, video, sample and frame."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage2_flow.conditioning import PastWindow, condition_indices, make_draws, past_window

SHAPE = (2, 3, 3)


def draw(keys, *, seed=0, num_frames=4, nfe=5, context_frames=3, past_horizon=None, **how):
    return make_draws(seed, keys, num_frames, nfe, context_frames, SHAPE, past_horizon, "cpu", **how)


@pytest.mark.parametrize(
    ("length", "horizon", "first", "count"),
    [
        (2, None, 0, 1),
        (10, None, 0, 9),
        (10, 4, 6, 3),  # n > k: frames 6, 7, 8 and the reference 9
        (10, 10, 0, 9),
        (3, 8, 0, 2),  # n < k
        (7, 2, 5, 1),
    ],
)
def test_past_window(length, horizon, first, count):
    assert past_window(length, horizon) == PastWindow(first, count)


@pytest.mark.parametrize(("length", "horizon"), [(1, None), (5, 1), (5, 0), (5, -3)])
def test_past_window_refuses(length, horizon):
    with pytest.raises(ValueError, match=str(length if horizon is None else horizon)):
        past_window(length, horizon)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 300), horizon=st.none() | st.integers(2, 400))
def test_indices_fill_the_window_and_never_leave_it(length, horizon):
    window = past_window(length, horizon)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    lowest, _, highest = condition_indices(uniforms, window).tolist()
    assert lowest == window.first == max(0, length - horizon if horizon else 0)
    assert highest == length - 2


def test_every_legal_index_is_drawn_equally_often_and_no_other():
    draws = draw([(0, 0)], num_frames=2, nfe=40_000, context_frames=9, past_horizon=6)
    for frame, first in enumerate((3, 4)):
        values, counts = draws.condition_indices[frame, :, 0].unique(return_counts=True)
        assert values.tolist() == list(range(first, first + 5))
        assert ((counts - 8000).abs() < 5 * (40_000 * 0.2 * 0.8) ** 0.5).all()


def test_one_condition_a_frame():
    draws = draw([(0, 0), (1, 0)], num_frames=30, nfe=6, context_frames=20, condition="per-frame")
    assert draws.condition_indices.shape == (30, 6, 2)
    assert (draws.condition_indices == draws.condition_indices[:, :1]).all()
    assert len(draws.condition_indices[:, 0].unique()) > 10
    assert torch.equal(draws.noise, draw([(0, 0), (1, 0)], num_frames=30, context_frames=20).noise)


def test_batch_elements_and_evaluations_are_drawn_independently():
    indices = draw([(0, 0), (1, 0)], num_frames=1, nfe=20_000, context_frames=3).condition_indices[0].double()
    five_standard_errors = 5 / 20_000**0.5
    assert abs(torch.corrcoef(indices.T)[0, 1]) < five_standard_errors
    assert abs(torch.corrcoef(torch.stack([indices[:-1, 0], indices[1:, 0]]))[0, 1]) < five_standard_errors


def test_noise_is_standard_normal():
    noise = draw([(video, 0) for video in range(200)], num_frames=10).noise
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5
    assert noise.dtype == torch.float32


def test_draws_do_not_depend_on_batch_length_or_solver():
    together, alone = draw([(3, 0), (8, 1), (5, 0)]), draw([(8, 1)])
    assert torch.equal(together.noise[:, 1:2], alone.noise)
    assert torch.equal(together.condition_indices[:, :, 1:2], alone.condition_indices)
    longer = draw([(8, 1)], num_frames=7)
    assert torch.equal(longer.noise[:4], alone.noise)
    assert torch.equal(longer.condition_indices[:4], alone.condition_indices)
    assert torch.equal(draw([(8, 1)], nfe=396).noise, alone.noise)


def test_seed_video_sample_and_frame_all_matter():
    draws = [draw([key], seed=seed) for seed in (0, 1) for key in ((0, 0), (0, 1), (1, 0))]
    noises = [draw.noise[frame] for draw in draws for frame in (0, 1)]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 12


def test_a_single_context_frame_counts_twice():
    draws = draw([(0, 0)], num_frames=2, nfe=50, context_frames=1)
    assert draws.condition_indices[0].unique().tolist() == [0]
    assert draws.condition_indices[1].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": []}, "0 keys"),
        ({"num_frames": 0}, "0 frames"),
        ({"context_frames": 0}, "got 0"),
        ({"seed": -1}, "seed -1"),
        ({"keys": [(0, -2)]}, r"\(0, -2\)"),
        ({"past_horizon": 1}, "past_horizon .* 1"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        draw(**{"keys": [(0, 0)], **change})


def test_noise_tells_nothing_about_the_conditions():
    """They are of different streams: numbers of one stream would give the same bits to both."""
    drawn = make_draws(5, [(3, 0)], 1, 4096, 9, (1, 64, 64), None, "cpu")
    uniforms = np.random.default_rng((5, 3, 0, 0)).random(4096)  # what the noise's own stream would draw
    shared = condition_indices(torch.from_numpy(uniforms)[None, :, None], past_window(9, None))
    assert (drawn.condition_indices == shared).float().mean() < 0.3  # by chance 1 in 8
