"""Mirroring and colours of training images and clips: what is drawn, for whom, and that processes agree."""

import pytest
import torch

from stage1_autoencoder.augmentation import augment
from stage1_autoencoder.config import ColorJitterConfig
from stage1_autoencoder.views import ViewTransform, apply_views

NONE = ColorJitterConfig()
ALL = ColorJitterConfig(brightness=0.3, contrast=0.2, saturation=0.4, hue=0.1)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> torch.Tensor:
    # Away from the ends of the range, so that nothing is clamped.
    return torch.rand(64, 3, 4, 6, generator=draws(1)) * 0.6 - 0.3


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.rand(6, 5, 3, 4, 7, generator=draws(1)) * 2 - 1


def test_nothing_asked_for_changes_nothing(images, clips):
    for given in (images, clips, images.bfloat16()):
        assert torch.equal(augment(given, jitter=NONE, flip=False, generator=draws()), given)


def test_half_of_the_images_are_mirrored(images):
    flipped = augment(images, jitter=NONE, flip=True, generator=draws())
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 20 <= mirrored.sum() <= 44


def test_what_is_done_is_what_views_do(clips):
    # The draws by hand: mirror, then the four factors, each for the whole batch.
    share = torch.rand(5, 6, generator=draws(7))
    changed = augment(clips, jitter=ALL, flip=True, generator=draws(7))
    assert 0 < (share[0] < 0.5).sum() < 6
    for row in range(6):
        factors = {
            name: base + getattr(ALL, name) * (2 * share[place, row].item() - 1)
            for place, (name, base) in enumerate(
                {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}.items(), start=1
            )
        }
        transform = ViewTransform(flip=bool(share[0, row] < 0.5), **factors)
        torch.testing.assert_close(changed[row], apply_views(clips[row], [transform] * 5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_factors_fill_their_range_and_are_each_images_own(name):
    # A reddish and a grey pixel, from which each factor can be read off.
    extent = 0.15
    image = torch.tensor([[0.6, 0.2], [0.3, 0.2], [0.3, 0.2]]).view(1, 3, 1, 2) * 2 - 1
    changed = augment(
        image.expand(400, -1, -1, -1), jitter=ColorJitterConfig(**{name: extent}), flip=False, generator=draws()
    )
    red, green, blue = ((changed[:, :, 0, 0] + 1) / 2).unbind(1)
    grey = (changed[:, 0, 0, 1] + 1) / 2
    value = {
        "brightness": grey / 0.2 - 1,
        "contrast": (red - grey) / 0.4 - 1,
        "saturation": (red - green) / 0.3 - 1,
        "hue": (green - blue) / 0.3 / 6,  # of red, in sixths of a turn: up with green, down with blue
    }[name]
    assert value.abs().max() <= extent + 1e-5
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
    # Contrast is towards each frame's own mean: a frame does not depend on the other ones.
    moving = augment(clips, jitter=ALL, flip=True, generator=draws())
    assert torch.equal(moving[:, 0], changed[:, 0])


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_rows_do_not_depend_on_the_number_of_processes(clips, processes):
    for given in (clips, clips[:, 0]):
        whole = augment(given, jitter=ALL, flip=True, generator=draws())
        size = 6 // processes
        for start in range(0, 6, size):
            rows = slice(start, start + size)
            part = augment(given[rows], jitter=ALL, flip=True, generator=draws(), batch=6, rows=rows)
            assert torch.equal(part, whole[rows])
    striped = augment(clips[1::2], jitter=ALL, flip=True, generator=draws(), batch=6, rows=slice(1, None, 2))
    assert torch.equal(striped, augment(clips, jitter=ALL, flip=True, generator=draws())[1::2])


def test_what_is_asked_for_does_not_change_the_other_draws(images):
    flipped = augment(images, jitter=NONE, flip=True, generator=draws())
    both = augment(images, jitter=ALL, flip=True, generator=draws())
    coloured = augment(images, jitter=ALL, flip=False, generator=draws())
    mirrored = (flipped != images).flatten(1).any(1)
    torch.testing.assert_close(both[mirrored], coloured[mirrored].flip(-1), atol=1e-6, rtol=0)
    assert torch.equal(both[~mirrored], coloured[~mirrored])
    # The generator goes on from the same place whatever was asked for.
    after = []
    for jitter, flip in ((NONE, False), (NONE, True), (ALL, False)):
        generator = draws()
        augment(images, jitter=jitter, flip=flip, generator=generator)
        after.append(torch.rand(1, generator=generator).item())
    assert len(set(after)) == 1


def test_pixels_stay_in_range():
    extreme = torch.tensor([-1.0, 1.0]).repeat(8, 3, 4, 3)
    extreme[:, 0] *= -1
    wide = ColorJitterConfig(brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    changed = augment(extreme, jitter=wide, flip=True, generator=draws())
    assert changed.min() >= -1
    assert changed.max() <= 1


def test_the_same_draws_give_the_same_images(images):
    first, again, other = (augment(images, jitter=ALL, flip=True, generator=draws(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_stay(images, dtype):
    changed = augment(images.to(dtype), jitter=ALL, flip=True, generator=draws())
    assert changed.dtype == dtype
    expected = augment(images.to(dtype).float(), jitter=ALL, flip=True, generator=draws())
    torch.testing.assert_close(changed, expected.to(dtype), atol=1e-6, rtol=1e-2)


def test_shapes_that_do_not_fit(images):
    for wrong in (images[0], images[:, :1], images[None, None]):
        with pytest.raises(ValueError, match=r"can't be augmented: not \[b, 3, h, w\] or \[b, n, 3, h, w\]"):
            augment(wrong, jitter=NONE, flip=True, generator=draws())
    with pytest.raises(ValueError, match=r"64 images are not the rows slice\(0, 32, None\) of a batch of 128"):
        augment(images, jitter=NONE, flip=True, generator=draws(), batch=128, rows=slice(0, 32))
    with pytest.raises(ValueError, match=r"64 images are not the rows .* of a batch of 128, which are 128"):
        augment(images, jitter=NONE, flip=True, generator=draws(), batch=128)
