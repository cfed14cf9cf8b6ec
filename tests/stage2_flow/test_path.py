"""The path starts at noise, ends at the target, and its velocity is its derivative."""

import torch

from stage2_flow.path import SIGMA_MIN, path_sample


def draws(dtype: torch.dtype = torch.float64, batch: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 4, 3, 2)
    return torch.randn(shape, generator=generator, dtype=dtype), torch.randn(shape, generator=generator, dtype=dtype)


def test_starts_at_noise_and_ends_at_the_target_but_for_sigma_min():
    target, noise = draws()
    assert torch.equal(path_sample(target, noise, torch.zeros(5)).x_t, noise)
    # At t = 1 sigma_min noise is left.
    torch.testing.assert_close(
        path_sample(target, noise, torch.ones(5)).x_t - target, SIGMA_MIN * noise, rtol=1e-6, atol=1e-15
    )


def test_velocity_is_the_derivative_of_the_path():
    target, noise = draws()
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    ahead, behind = path_sample(target, noise, t + 1e-4), path_sample(target, noise, t - 1e-4)
    torch.testing.assert_close((ahead.x_t - behind.x_t) / 2e-4, path_sample(target, noise, t).velocity)


def test_closed_form_equals_the_official_quotient_where_that_has_its_digits():
    target, noise = draws()
    t = torch.linspace(0, 0.9, 5, dtype=torch.float64)
    sample = path_sample(target, noise, t)
    t = t[:, None, None, None]
    quotient = (target - (1 - SIGMA_MIN) * sample.x_t) / (1 - (1 - SIGMA_MIN) * t)
    torch.testing.assert_close(sample.velocity, quotient, rtol=1e-12, atol=1e-12)


def test_closed_form_keeps_fp32_digits_at_the_end_where_the_quotient_loses_them():
    target, noise = draws(torch.float32)
    t = torch.full((5,), 1 - 2**-24)
    sample = path_sample(target, noise, t)
    exact = path_sample(target.double(), noise.double(), t.double()).velocity
    quotient = (target - (1 - SIGMA_MIN) * sample.x_t) / (1 - (1 - SIGMA_MIN) * t[:, None, None, None])
    assert (sample.velocity - exact).abs().max() < 4 * torch.finfo(torch.float32).eps * noise.abs().max()
    assert (quotient - exact).square().mean().sqrt() > 1e-2
    half = path_sample(target.half(), noise, t)
    assert half.x_t.dtype == half.velocity.dtype == torch.float32


def test_agrees_with_the_official_training_forward(train_forward):
    noise, t = train_forward["noise"], train_forward["timestamps"]
    # The record has no targets: each is recovered from one output, and must give the other.
    from_velocity = train_forward["target_vectors"].double() + (1 - SIGMA_MIN) * noise.double()
    x_t = path_sample(from_velocity.float(), noise, t).x_t
    eps, largest = torch.finfo(torch.float32).eps, train_forward["in_input_latents"].abs().max() + noise.abs().max()
    assert (x_t - train_forward["in_input_latents"]).abs().max() < 4 * eps * largest  # two products and a sum, twice
    t64 = t.double()[:, None, None, None]
    from_x_t = (train_forward["in_input_latents"].double() - (1 - (1 - SIGMA_MIN) * t64) * noise.double()) / t64
    velocity = path_sample(from_x_t.float(), noise, t).velocity
    # The rounding of the recorded x_t is divided by t.
    assert (velocity - train_forward["target_vectors"]).abs().max() < 4 * eps * largest / t.min()
