"""Random augmentation: draws, and that processes agree. What adjusting colors does is in test_views.py."""

import pytest
import torch

from stage1_autoencoder.augmentation import augment
from stage1_autoencoder.config import ColorJitterConfig
from stage1_autoencoder.views import ViewTransform, apply_views

NONE = ColorJitterConfig()
ALL = ColorJitterConfig(brightness=0.3, contrast=0.2, saturation=0.4, hue=0.1)
# About 30 float32 operations, on values up to 8 (sixths of the color circle): 64 roundings of 1.
ROUNDING = 64 * torch.finfo(torch.float32).eps


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay_and_half_precision_is_rounded_once(dtype):
    given = (torch.rand(2, 3, 4, 5, generator=draws()) * 2 - 1).to(dtype)
    changed, expected = (augment(x, jitter=ALL, flip=True, generator=draws()) for x in (given, given.float()))
    assert changed.dtype == dtype
    if dtype == torch.float64:
        close(changed.float(), expected)
    else:
        assert torch.equal(changed, expected.to(dtype))


@pytest.fixture
def images() -> torch.Tensor:
    # Away from the ends of the range, so that nothing is clamped.
    return torch.rand(64, 3, 4, 6, generator=draws(1)) * 0.6 - 0.3


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.rand(6, 5, 3, 4, 7, generator=draws(1)) * 2 - 1


def test_nothing_enabled_changes_nothing(images, clips):
    for given in (images, clips, images.bfloat16()):
        assert torch.equal(augment(given, jitter=NONE, flip=False, generator=draws()), given)


def test_half_of_the_images_are_flipped(images):
    flipped = augment(images, jitter=NONE, flip=True, generator=draws())
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 20 <= mirrored.sum() <= 44


def test_augmentation_is_the_view_of_its_draws(clips):
    # The draws by hand: the flip, then the four factors, each for the whole batch.
    share = torch.rand(5, 6, generator=draws(7))
    changed = augment(clips, jitter=ALL, flip=True, generator=draws(7))
    assert 0 < (share[0] < 0.5).sum() < 6
    neutral = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}
    for row in range(6):
        jitter = {
            name: base + getattr(ALL, name) * (2 * share[place, row].item() - 1)
            for place, (name, base) in enumerate(neutral.items(), start=1)
        }
        transform = ViewTransform(flip=bool(share[0, row] < 0.5), **jitter)
        close(changed[row], apply_views(clips[row], [transform] * 5))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_factors_fill_their_range_and_are_each_images_own(name):
    # A reddish and a gray pixel, which reveal each factor.
    extent = 0.15
    image = torch.tensor([[0.6, 0.2], [0.3, 0.2], [0.3, 0.2]]).view(1, 3, 1, 2) * 2 - 1
    changed = augment(
        image.expand(400, -1, -1, -1), jitter=ColorJitterConfig(**{name: extent}), flip=False, generator=draws()
    )
    red, green, blue = ((changed[:, :, 0, 0] + 1) / 2).unbind(1)
    gray = (changed[:, 0, 0, 1] + 1) / 2
    value = {
        "brightness": gray / 0.2 - 1,
        "contrast": (red - gray) / 0.4 - 1,
        "saturation": (red - green) / 0.3 - 1,
        "hue": (green - blue) / 0.3 / 6,  # of red, in sixths of a turn: up with green, down with blue
    }[name]
    assert value.abs().max() <= extent + 10 * ROUNDING  # divided by 0.2
    assert value.min() < -0.97 * extent
    assert value.max() > 0.97 * extent
    assert abs(value.mean()) < 0.1 * extent


def test_one_draw_holds_for_all_frames_of_a_clip(clips):
    still = clips[:, :1].expand_as(clips)
    changed = augment(still, jitter=ALL, flip=True, generator=draws())
    assert torch.equal(changed, changed[:, :1].expand_as(changed))
    assert not torch.equal(changed, still)
    # A clip of one frame is an image.
    assert torch.equal(augment(clips[:, 0], jitter=ALL, flip=True, generator=draws()), changed[:, 0])
    # Contrast is relative to each frame's own mean: a frame does not depend on the others.
    moving = augment(clips, jitter=ALL, flip=True, generator=draws())
    assert torch.equal(moving[:, 0], changed[:, 0])


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 6), slice(4, 6), slice(5, 6), slice(1, None, 2)])
def test_rows_do_not_depend_on_their_distribution_over_processes(clips, rows):
    for given in (clips, clips[:, 0]):
        whole = augment(given, jitter=ALL, flip=True, generator=draws())
        part = augment(given[rows], jitter=ALL, flip=True, generator=draws(), batch=6, rows=rows)
        assert torch.equal(part, whole[rows])


def test_draws_do_not_depend_on_what_is_enabled(images):
    results = {}
    for jitter, flip in ((NONE, False), (NONE, True), (ALL, False), (ALL, True)):
        generator = draws()
        changed = augment(images, jitter=jitter, flip=flip, generator=generator)
        results[jitter is ALL, flip] = changed
        assert torch.rand(1, generator=generator).item() == pytest.approx(torch.rand(321, generator=draws())[-1].item())
    mirrored = (results[False, True] != images).flatten(1).any(1)
    close(results[True, True][mirrored], results[True, False][mirrored].flip(-1))
    assert torch.equal(results[True, True][~mirrored], results[True, False][~mirrored])


def test_pixels_stay_in_range():
    extreme = torch.tensor([-1.0, 1.0]).repeat(8, 3, 4, 3)
    extreme[:, 0] *= -1
    wide = ColorJitterConfig(brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    changed = augment(extreme, jitter=wide, flip=True, generator=draws())
    assert changed.abs().max() <= 1


def test_wrong_shapes_are_refused(images):
    for wrong in (images[0], images[:, :1], images[None, None]):
        with pytest.raises(ValueError, match=r"\[b, 3, h, w\] or \[b, n, 3, h, w\]"):
            augment(wrong, jitter=NONE, flip=True, generator=draws())
    for rows, count in ((slice(0, 32), 32), (None, 128)):
        with pytest.raises(ValueError, match=rf"64 images .*128.* {count}$"):
            augment(images, jitter=NONE, flip=True, generator=draws(), batch=128, rows=rows)
