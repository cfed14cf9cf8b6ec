"""Brightness, contrast and mirroring of training images."""

import pytest
import torch

from stage1_autoencoder.augmentation import augment


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> torch.Tensor:
    # Away from the ends of the range, so that nothing is clamped.
    return torch.rand(64, 3, 4, 6, generator=draws(1)) * 0.6 - 0.3


def test_nothing_asked_for_changes_nothing(images):
    assert torch.equal(augment(images, jitter=0.0, flip=False, generator=draws()), images)


def test_half_of_the_images_are_mirrored(images):
    flipped = augment(images, jitter=0.0, flip=True, generator=draws())
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 20 <= mirrored.sum() <= 44


def test_each_image_gets_a_brightness_and_a_contrast_of_its_own(images):
    pixels = (augment(images, jitter=0.2, flip=False, generator=draws()) + 1) / 2
    before = (images + 1) / 2
    brightness = pixels.mean((1, 2, 3)) / before.mean((1, 2, 3))
    contrast = pixels.std((1, 2, 3)) / before.std((1, 2, 3)) / brightness
    for factor in (brightness, contrast):
        assert factor.min() >= 0.8 - 1e-5
        assert factor.max() <= 1.2 + 1e-5
        assert factor.max() - factor.min() > 0.3
    # One affine map of all pixels of an image: the channels keep their relation.
    expected = brightness.view(-1, 1, 1, 1) * (
        before.mean((1, 2, 3), keepdim=True)
        + contrast.view(-1, 1, 1, 1) * (before - before.mean((1, 2, 3), keepdim=True))
    )
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_pixels_stay_in_range():
    extreme = torch.tensor([-1.0, 1.0]).repeat(8, 3, 4, 3)
    changed = augment(extreme, jitter=0.9, flip=True, generator=draws())
    assert changed.min() >= -1
    assert changed.max() <= 1


def test_the_same_draws_give_the_same_images(images):
    first, again, other = (augment(images, jitter=0.2, flip=True, generator=draws(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
