"""Image metrics against closed forms, and the choice of the best of several samples."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from pipelines.evaluation.metrics import PSNR, Metric, choose_best, lpips_metric, measure_frames, psnr, ssim


@pytest.fixture
def truth() -> torch.Tensor:
    return torch.rand(5, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


@pytest.fixture
def images(truth) -> torch.Tensor:
    """The truth with noise that grows from image to image."""
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    return truth + 0.05 * torch.arange(1, 6)[:, None, None, None] * noise


def test_psnr_without_error_is_100_db(truth):
    assert psnr(truth, truth).tolist() == [100.0] * 5
    ones = torch.ones(1, 3, 16, 16)
    assert psnr(7 * ones, ones).tolist() == [100.0]  # images are clamped


def test_ssim_of_flat_images_has_a_closed_form():
    # Without variance only the luminance term is left: (2 a b + c1) / (a^2 + b^2 + c1), c1 = (0.01 x 2)^2.
    a, b, c1 = 0.5, -0.2, 0.02**2
    first, second = torch.full((2, 3, 32, 32), a), torch.full((2, 3, 32, 32), b)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(first, second).tolist() == pytest.approx([expected] * 2, abs=1e-3)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_every_image_has_its_own_number(metric, truth, images):
    values = metric(images, truth)
    assert values.shape == (5,)
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    alone = torch.cat([metric(images[i : i + 1], truth[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(values, alone, atol=1e-5, rtol=1e-6)
    assert metric(images[:1], truth[:1]).shape == (1,)


def test_psnr_equals_the_definition_in_double(truth, images):
    error = (images.clamp(-1, 1).double() - truth.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(psnr(images, truth).double(), 10 * torch.log10(4 / error), rtol=1e-6, atol=0)


def test_ssim_equals_scipys_filters(truth, images):
    x, y = images.clamp(-1, 1).double().numpy(), truth.double().numpy()

    def mean(values: np.ndarray) -> np.ndarray:
        # 11 taps: 5 to each side, cut at 3.5 deviations of 1.5; edges mirrored without repeating the last pixel.
        return gaussian_filter(values, sigma=(0, 0, 1.5, 1.5), truncate=3.5, mode="mirror")

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.02**2, 0.06**2
    expected = ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean((1, 2, 3))
    np.testing.assert_allclose(ssim(images, truth).numpy(), expected, atol=2e-5)


def test_frames_of_videos_have_each_their_number():
    # Frames of more pixels than go through at once.
    videos, targets = (torch.rand(2, 3, 3, 260, 256, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    values = measure_frames(PSNR, videos, targets)
    assert values.shape == (2, 3)
    expected = [psnr(*pair[:, None]).item() for pair in torch.stack([videos, targets], 2).flatten(0, 1)]
    assert values.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_frames_are_measured_in_single_precision_whatever_surrounds_it(truth, images):
    seen = []

    def look(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return x.mean((1, 2, 3))

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        measure_frames(Metric("look", look, True), images[None].bfloat16(), truth[None])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(torch.float32, "highest", False)]


def test_lpips_sees_clamped_images():
    metric = lpips_metric(lambda x, y: (x - y).abs().amax((1, 2, 3)))
    assert metric.function(torch.full((2, 3, 4, 4), 5.0), torch.zeros(2, 3, 4, 4)).tolist() == [1, 1]
    assert (metric.name, metric.higher_is_better) == ("lpips", False)


def test_the_best_sample_of_a_clip_is_that_with_the_best_mean_over_the_horizon():
    values = torch.tensor([[[9.0, 0.0], [4.0, 6.0]], [[3.0, 3.0], [1.0, 2.0]]])  # 2 clips, 2 samples, 2 frames
    # Not the best of each frame, and each clip has its own.
    assert choose_best(values, higher_is_better=True).tolist() == [[4, 6], [3, 3]]
    assert choose_best(values, higher_is_better=False).tolist() == [[9, 0], [1, 2]]
