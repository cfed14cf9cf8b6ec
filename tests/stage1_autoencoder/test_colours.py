"""What the changes of colour are, on tensors of factors; test_views.py has the reference of Python floats."""

import pytest
import torch

from stage1_autoencoder.augmentation import ColourFactors, change_colours


def factors(
    brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0, hue: float = 0.0, frames: int = 1
) -> ColourFactors:
    return ColourFactors(*(torch.full((frames, 1, 1, 1), v) for v in (brightness, contrast, saturation, hue)))


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_each_frame_has_its_own_factors():
    given = images(3, 3, 4, 5)
    each = [factors(brightness=0.5), factors(contrast=0.3, hue=0.2), factors(saturation=0.0)]
    together = ColourFactors(
        *(torch.cat([getattr(f, name) for f in each]) for name in ("brightness", "contrast", "saturation", "hue"))
    )
    changed = change_colours(given, together)
    for row, own in enumerate(each):
        assert torch.equal(changed[row : row + 1], change_colours(given[row : row + 1], own))


def test_factors_of_zero():
    pixels = (images(2, 3, 4, 5) + 1) / 2
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    for own, expected in (
        (factors(brightness=0.0, frames=2), torch.zeros_like(pixels)),
        (factors(contrast=0.0, frames=2), grey.mean((1, 2, 3), keepdim=True).expand_as(pixels)),
        (factors(saturation=0.0, frames=2), grey.expand_as(pixels)),
    ):
        torch.testing.assert_close((change_colours(pixels * 2 - 1, own) + 1) / 2, expected, atol=1e-6, rtol=0)


def test_what_changes_nothing_changes_roundings_only():
    given = images(2, 3, 4, 5)
    for own in (factors(frames=2), factors(hue=1.0, frames=2), factors(hue=-3.0, frames=2)):
        torch.testing.assert_close(change_colours(given, own), given, atol=2e-6, rtol=0)


def test_the_order_is_brightness_contrast_saturation_hue():
    given = images(1, 3, 4, 5)
    step_by_step = given
    for own in (factors(brightness=1.6), factors(contrast=1.5), factors(saturation=1.7), factors(hue=0.2)):
        step_by_step = change_colours(step_by_step, own)
    together = change_colours(given, factors(1.6, 1.5, 1.7, 0.2))
    torch.testing.assert_close(together, step_by_step, atol=5e-6, rtol=0)
    backwards = given
    for own in (factors(saturation=1.7), factors(contrast=1.5), factors(brightness=1.6)):
        backwards = change_colours(backwards, own)
    assert (change_colours(backwards, factors(hue=0.2)) - together).abs().max() > 0.1


def test_turns_of_the_hue_add_up():
    given = images(1, 3, 4, 5)
    third = factors(hue=1 / 3)
    red, green, blue = given.split(1, dim=1)
    torch.testing.assert_close(change_colours(given, third), torch.cat([blue, red, green], 1), atol=2e-6, rtol=0)
    twice = change_colours(change_colours(given, factors(hue=0.15)), factors(hue=0.25))
    torch.testing.assert_close(twice, change_colours(given, factors(hue=0.4)), atol=5e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_stays_and_half_precision_is_rounded_once(dtype):
    given = images(2, 3, 4, 5).to(dtype)
    changed = change_colours(given, factors(1.2, 0.9, 1.1, 0.1, frames=2))
    assert changed.dtype == dtype
    expected = change_colours(given.float(), factors(1.2, 0.9, 1.1, 0.1, frames=2))
    if dtype == torch.float64:
        torch.testing.assert_close(changed.float(), expected, atol=3e-6, rtol=0)
    else:
        assert torch.equal(changed, expected.to(dtype))
