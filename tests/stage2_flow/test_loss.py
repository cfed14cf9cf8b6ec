"""The loss is that of the official code, and its draws are a function of the generator."""

import torch
from torch import nn

from latent_cache.sampling.sampler import FlowBatch
from stage2_flow.loss import FlowDraws, draw_flow, flow_matching_loss
from stage2_flow.path import SIGMA_MIN


class Perfect(nn.Module):
    """Knows the velocity; answers in bf16 if asked to."""

    def __init__(self, velocity: torch.Tensor) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, x_t, reference, condition, distance, t):
        return self.velocity


def some_batch(shape: tuple[int, ...] = (3, 4, 2, 2)) -> FlowBatch:
    generator = torch.Generator().manual_seed(1)
    target, reference, condition = torch.randn((3, *shape), generator=generator)
    return FlowBatch(target, reference, condition, distance=torch.arange(1, shape[0] + 1))


def test_agrees_with_the_official_training_forward(official_field, train_forward):
    noise = train_forward["noise"]
    batch = FlowBatch(
        target=(train_forward["target_vectors"].double() + (1 - SIGMA_MIN) * noise.double()).float(),
        reference=train_forward["in_reference_latents"],
        condition=train_forward["in_conditioning_latents"],
        distance=train_forward["in_index_distances"],
    )
    loss = flow_matching_loss(official_field, batch, FlowDraws(noise=noise, t=train_forward["timestamps"]))
    assert abs(loss - train_forward["loss"]) < 1e-6


def test_is_zero_for_the_true_velocity_and_one_for_one_off():
    batch = some_batch()
    draws = draw_flow(batch.target.shape, torch.Generator().manual_seed(0), "cpu")
    velocity = batch.target - (1 - SIGMA_MIN) * draws.noise
    assert flow_matching_loss(Perfect(velocity), batch, draws) == 0
    torch.testing.assert_close(flow_matching_loss(Perfect(velocity + 1), batch, draws), torch.tensor(1.0))


def test_is_reduced_in_fp32():
    batch = some_batch()
    draws = draw_flow(batch.target.shape, torch.Generator().manual_seed(0), "cpu")
    loss = flow_matching_loss(Perfect(torch.zeros_like(batch.target).bfloat16()), batch, draws)
    assert loss.dtype == torch.float32
    assert loss == (batch.target - (1 - SIGMA_MIN) * draws.noise).square().mean()


def test_draws_repeat_with_the_generator_and_lie_in_range():
    first, second, other = (
        draw_flow((4096, 1, 2, 2), torch.Generator().manual_seed(seed), "cpu") for seed in (7, 7, 8)
    )
    assert torch.equal(first.t, second.t)
    assert torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, other.noise)
    assert first.t.min() >= 0
    assert first.t.max() < 1
    assert abs(first.t.mean() - 0.5) < 0.02
    assert abs(first.noise.mean()) < 0.03
    assert abs(first.noise.std() - 1) < 0.03


def test_rows_are_what_one_process_takes_of_the_global_batch():
    draws = draw_flow((6, 1, 2, 2), torch.Generator().manual_seed(0), "cpu", torch.float64)
    part = draws.rows(slice(2, 4))
    assert torch.equal(part.t, draws.t[2:4])
    assert torch.equal(part.noise, draws.noise[2:4])
    assert part.t.dtype == torch.float64


def test_logit_normal_times_are_sigmoids_of_standard_normals():
    draws = draw_flow((40_000, 1, 1, 1), torch.Generator().manual_seed(0), "cpu", torch.float64, times="logit_normal")
    normal = torch.logit(draws.t)
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert abs((draws.t < 0.25).double().mean() - 0.136) < 0.01  # P(N(0, 1) < -ln 3)
