"""Image metrics against closed forms, and the choice of the best of several samples."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pipelines.config import parse_config
from pipelines.errors import UserError
from pipelines.evaluation.measures.measure import ClipBatch
from pipelines.evaluation.measures.metrics import (
    PSNR,
    Metric,
    PooledErrorMeasure,
    choose_best,
    gradient_energy,
    load_frame_metrics,
    lpips_metric,
    measure_frames,
    psnr,
    ssim,
    ssim_8bit,
)
from pipelines.runtime.context import RunContext

FIXTURES = Path(__file__).parents[3] / "fixtures"


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
    # Without variance only the luminance term is left: (2 a b + c1) / (a^2 + b^2 + c1), of images in [0, 1].
    a, b, c1 = 0.75, 0.4, 0.01**2
    first, second = (torch.full((2, 3, 32, 32), 2 * value - 1) for value in (a, b))
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(first, second).tolist() == pytest.approx([expected] * 2, abs=1e-6)  # float32 values in


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_every_image_has_its_own_number(metric, truth, images):
    values = metric(images, truth)
    assert values.shape == (5,)
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    alone = torch.cat([metric(images[i : i + 1], truth[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(values, alone, atol=1e-5, rtol=1e-6)
    assert metric(images[:1], truth[:1]).shape == (1,)


@pytest.fixture(params=["noise", "edges", "flat", "smallest", "those of LPIPS"])
def pair(request) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of images [n, 3, h, w] in [-1, 1]: textured, or smooth, where variances are small differences.

    The last ones are those on which LPIPS equals the public one, see `test_lpips`.
    """
    if request.param == "those of LPIPS":
        recorded = np.load(FIXTURES / "lpips_vgg_reference.npz")
        differ = recorded["distance"] > 0
        return torch.from_numpy(recorded["image_a"][differ]), torch.from_numpy(recorded["image_b"][differ])
    generator = torch.Generator().manual_seed(2)
    side = (11, 11) if request.param == "smallest" else (40, 24)
    truth = torch.rand(4, 3, *side, generator=generator)
    if request.param == "edges":  # mirrored edges would count the pattern at the border twice
        truth = (torch.arange(side[1]) // 3 % 2).float().expand(truth.shape).clone()
    elif request.param == "flat":
        truth = 0.9 + 0.01 * truth
    images = truth + 0.1 * truth.std() * torch.randn(truth.shape, generator=generator)
    return images.clamp(0, 1) * 2 - 1, truth * 2 - 1


def test_psnr_and_ssim_are_those_of_scikit_image(pair):
    unit = [((images.double() + 1) / 2).numpy() for images in pair]
    # As in float64, but for the rounding of PSNR's float32.
    expected = [peak_signal_noise_ratio(y, x, data_range=1) for x, y in zip(*unit, strict=True)]
    np.testing.assert_allclose(psnr(*pair).numpy(), expected, rtol=1e-6)
    expected = []
    for x, y in zip(*unit, strict=True):
        options = {"gaussian_weights": True, "use_sample_covariance": False, "sigma": 1.5, "data_range": 1}
        _, similarity = structural_similarity(x, y, channel_axis=0, full=True, **options)
        expected.append(similarity[:, 5:-5, 5:-5].mean())  # windows inside the image
    np.testing.assert_allclose(ssim(*pair).numpy(), expected, rtol=1e-9)


def test_psnr_of_the_mean_error_is_lower_than_the_mean_of_psnr():
    # Squared errors in [0, 1] of 0.01 and 0.0001 (20 and 40 dB), and of another sample 0.0025 twice (26 dB).
    truth = torch.zeros(1, 2, 3, 4, 4)
    errors = torch.tensor([[[0.2, 0.02], [0.1, 0.1]]])[..., None, None, None]
    futures = {"prediction": truth[:, None] + errors, "copy_last": truth[:, None] + 0.2}
    measure = PooledErrorMeasure()
    records = measure.measure(ClipBatch([], truth, truth, truth, futures, {}))
    (found,) = measure.results(records, None).values()
    pooled = [-10 * math.log10(0.00505), -10 * math.log10(0.0025)]  # 22.97 and 26.02 dB
    assert found.prediction == pytest.approx(sum(pooled) / 2)
    assert found.best_of.value == pytest.approx(pooled[1])
    assert found.copy_last == pytest.approx(20)
    assert psnr(futures["prediction"][0, 0], truth[0]).mean().item() == pytest.approx(30)


def test_ssim_of_8_bits_is_that_of_pillow_and_scikit_image(pair):
    truncated, whole = ((pair[0] + 1) * 127.4).byte(), ((pair[1] + 1) * 127.5).round().byte()
    images, truth = (truncated + 0.7) / 127.5 - 1, whole / 127.5 - 1
    expected = []
    for x, y in zip(truncated, whole, strict=True):
        gray = [np.asarray(Image.fromarray(levels.movedim(0, -1).numpy()).convert("L")) for levels in (x, y)]
        options = {"gaussian_weights": True, "use_sample_covariance": False}
        expected.append(structural_similarity(*gray, data_range=255, **options))
    np.testing.assert_allclose(ssim_8bit(images, truth).numpy(), expected, rtol=1e-6)
    assert ssim_8bit(truth, truth).tolist() == [1.0] * len(truth)  # a copy is not truncated to the level below


def test_ssim_is_not_defined_for_images_smaller_than_its_window():
    for side in ((10, 32), (32, 10)):
        with pytest.raises(ValueError, match="11"):
            ssim(*torch.zeros(2, 1, 3, *side))
    config = {"dataset": {"name": "toy", "source": "shapes", "image_size": 8}}
    metrics, missing = load_frame_metrics(parse_config(config, "test"), RunContext(torch.device("cpu")))
    assert [metric.name for metric in metrics] == ["psnr"]
    assert missing.keys() == {"ssim", "lpips"}
    assert all("dataset.image_size" in reason for reason in missing.values())
    with pytest.raises(UserError, match=r"autoencoder\.training\.best_by: .*ssim.*11.*dataset\.image_size"):
        parse_config(config | {"autoencoder": {"training": {"best_by": "ssim"}}}, "test")


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


def test_blur_contrast_and_flat_frames_have_their_gradient_energy():
    edge = torch.zeros(2, 4, 3, 8, 8)
    edge[..., 4:] = 0.9
    edge[:, 1] = edge[:, 0] * 0.5  # half the contrast
    edge[:, 2, ..., 3], edge[:, 2, ..., 4] = 0.3, 0.6  # over three pixels
    edge[:, 3] = 0.7
    energy = gradient_energy(edge)
    assert energy.shape == (2, 4)
    # One of the 7 steps of each line.
    assert energy[0].tolist() == pytest.approx([0.81 / 7, 0.81 / 28, 0.81 / 21, 0.0])
    torch.testing.assert_close(gradient_energy(edge.mT), energy)
    assert gradient_energy(10 * edge[:, :1])[0].tolist() == pytest.approx([1 / 7])  # images are clamped


def test_lpips_sees_clamped_images():
    metric = lpips_metric(lambda x, y: (x - y).abs().amax((1, 2, 3)))
    assert metric.function(torch.full((2, 3, 4, 4), 5.0), torch.zeros(2, 3, 4, 4)).tolist() == [1, 1]
    assert (metric.name, metric.higher_is_better) == ("lpips", False)


def test_the_best_sample_of_a_clip_is_that_with_the_best_mean_over_the_horizon():
    values = torch.tensor([[[9.0, 0.0], [4.0, 6.0]], [[3.0, 3.0], [1.0, 2.0]]])  # 2 clips, 2 samples, 2 frames
    # Not the best of each frame, and each clip has its own.
    assert choose_best(values, higher_is_better=True).tolist() == [[4, 6], [3, 3]]
    assert choose_best(values, higher_is_better=False).tolist() == [[9, 0], [1, 2]]
