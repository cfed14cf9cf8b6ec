"""Views: names, draws, and transforms of frames, against a reference of Python floats."""

import colorsys
import re

import pytest
import torch

from stage1_autoencoder.views import View, ViewTransform, apply_views, parse_view, view_transform, views_description

IDENTITY = ViewTransform()
FLIP = ViewTransform(flip=True)
# About 30 float32 operations, on values up to 8 (sixths of the color circle): 64 roundings of 1.
ROUNDING = 64 * torch.finfo(torch.float32).eps


def random_images(count: int, height: int = 5, width: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


def clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def gray(pixel: list[float]) -> float:
    return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]


def reference(image: torch.Tensor, transform: ViewTransform) -> torch.Tensor:
    """One frame [3, h, w], pixel by pixel, in float64."""
    height, width = image.shape[1:]
    pixels = [[(float(v) + 1) / 2 for v in image[:, y, x]] for y in range(height) for x in range(width)]
    pixels = [[clip(v * transform.brightness) for v in pixel] for pixel in pixels]
    mean = sum(map(gray, pixels)) / len(pixels)
    pixels = [[clip(mean + transform.contrast * (v - mean)) for v in pixel] for pixel in pixels]
    pixels = [[clip(gray(pixel) + transform.saturation * (v - gray(pixel))) for v in pixel] for pixel in pixels]
    turned = []
    for pixel in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        turned.append(colorsys.hsv_to_rgb((hue + transform.hue) % 1, saturation, value))
    result = torch.tensor(turned, dtype=torch.float64).T.reshape(3, height, width) * 2 - 1
    return result.flip(-1) if transform.flip else result


@pytest.mark.parametrize(
    ("name", "view"),
    [("identity", View()), ("hflip", View(flip=True)), ("jitter-1", View(jitter=1)), ("jitter-20", View(jitter=20))],
)
def test_names(name, view):
    assert parse_view(name) == view
    if not view.jitter:
        assert view_transform(name, "a") == view_transform(name, "b") == ViewTransform(flip=view.flip)


@pytest.mark.parametrize(
    "name",
    ["", "jitter", "jitter-", "jitter-0", "jitter-01", "jitter--1", "jitter-1.5", "jitter-1 ", "jitter-1\n", "Identity",
     "vflip", "jitter-\u0661", "jitter_1", "hflip-1"],
)  # fmt: skip
def test_other_names_are_refused(name):
    for function in (parse_view, lambda view: view_transform(view, "a"), lambda view: views_description([view])):
        with pytest.raises(ValueError, match=re.escape(repr(name)) + ".*identity, hflip, or jitter-1"):
            function(name)


def test_draws_are_those_that_stores_were_made_with():
    # Hexadecimal, so that a difference in the last bit is seen: a store made elsewhere must hold the same.
    drawn = view_transform("jitter-2", "train/clip é 视频")
    assert [x.hex() for x in (drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue)] == [
        "0x1.195147696e02dp+0",
        "0x1.004810492890ep+0",
        "0x1.cf99dfb6b6a02p-1",
        "-0x1.e705f7d31fb96p-3",
    ]
    assert view_transform("jitter-2", "name \udcff in an odd encoding").brightness != drawn.brightness


def test_draws_are_uniform_in_their_ranges_and_independent():
    drawn = [view_transform(f"jitter-{k}", f"video_{i:04d}") for k in (1, 2) for i in range(2000)]
    assert len(set(drawn)) == len(drawn)
    assert not any(transform.flip for transform in drawn)
    shares = torch.tensor([[t.brightness, t.contrast, t.saturation, t.hue] for t in drawn], dtype=torch.float64)
    low, high = torch.tensor([[0.9, 0.9, 0.9, -0.25], [1.1, 1.1, 1.1, 0.25]], dtype=torch.float64)
    shares = (shares - low) / (high - low)
    assert shares.min() >= 0
    assert shares.max() <= 1
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand times.
    ranks = torch.arange(1, len(drawn) + 1).view(-1, 1) / len(drawn)
    assert (shares.sort(0).values - ranks).abs().max() < 1.95 / len(drawn) ** 0.5
    both = torch.cat([shares[:2000], shares[2000:]], 1)  # the draws of jitter-1 and jitter-2 of the same videos
    assert (torch.corrcoef(both.T) - torch.eye(8)).abs().max() < 4 / 2000**0.5


@pytest.mark.parametrize(
    "transform",
    [
        ViewTransform(brightness=1.1),
        ViewTransform(brightness=0.4),
        ViewTransform(contrast=1.7),
        ViewTransform(contrast=0.0),
        ViewTransform(saturation=1.9),
        ViewTransform(saturation=0.3),
        *(ViewTransform(hue=hue) for hue in (-0.5, -0.25, -0.01, 0.1, 0.25, 0.5)),
        ViewTransform(True, 1.6, 1.4, 1.5, -0.2),
        view_transform("jitter-1", "a"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_the_reference(transform, dtype):
    images = random_images(2, dtype=dtype)
    images[0, :, 0] = torch.linspace(-1, 1, 6)  # grays
    images[0, :, 1] = torch.tensor([[-1, 1, -1, 1, 1, -1], [-1, 1, 1, -1, 1, -1], [-1, 1, 1, 1, -1, 1]])
    changed = apply_views(images, [transform, transform])
    assert changed.dtype == dtype
    expected = torch.stack([reference(image, transform) for image in images])
    # In float64 what remains is the mean gray, a sum of integers with 32 bits behind the point.
    error = ROUNDING if dtype == torch.float32 else 2.0**-30
    torch.testing.assert_close(changed.double(), expected, atol=error, rtol=0)


def test_factors_close_to_one_change_almost_nothing():
    images = random_images(3)
    almost = [ViewTransform(**{name: 1 + 1e-9}) for name in ("brightness", "contrast", "saturation")]
    for transform in (*almost, ViewTransform(hue=1e-9), ViewTransform(hue=1.0)):
        assert transform.changes_color
        torch.testing.assert_close(apply_views(images, [transform] * 3), images, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_identity_and_flip_are_exact_beside_others(dtype):
    images = random_images(4, dtype=torch.float64).to(dtype)
    images[0, 0, 0, 0] = 1.5  # not even clamped
    mixed = [IDENTITY, FLIP, view_transform("jitter-1", "a"), IDENTITY]
    changed = apply_views(images, mixed)
    assert changed.dtype == dtype
    assert torch.equal(changed[[0, 3]], images[[0, 3]])
    assert torch.equal(changed[1], images[1].flip(-1))
    assert not torch.equal(changed[2], images[2])
    if dtype == torch.bfloat16:  # is rounded once, at the end
        assert torch.equal(changed, apply_views(images.float(), mixed).to(dtype))
    assert torch.equal(apply_views(images, [IDENTITY] * 4), images)
    assert apply_views(images[:0], []).shape == (0, 3, 5, 6)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (7, 9), (64, 65)])
def test_a_frame_does_not_depend_on_its_batch(height, width):
    images = random_images(17, height, width)
    transforms = [view_transform(view, "v") for view in ("identity", "hflip", *(f"jitter-{k}" for k in range(1, 16)))]
    alone = torch.cat([apply_views(images[i : i + 1], transforms[i : i + 1]) for i in range(17)])
    for size in (1, 2, 3, 8, 16, 17):
        for order in (range(size), range(17 - size, 17), range(size - 1, -1, -1)):
            order = list(order)
            together = apply_views(images[order], [transforms[i] for i in order])
            assert torch.equal(together, alone[order]), f"{size} frames together"
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(apply_views(strided, transforms), alone)


def test_a_frame_does_not_depend_on_the_number_of_threads():
    # So large that a sum over one frame is divided among threads.
    images, transforms = random_images(4, 256, 256), [view_transform("jitter-1", f"{i}") for i in range(4)]
    alone = torch.cat([apply_views(images[i : i + 1], transforms[i : i + 1]) for i in range(4)])
    torch.set_num_threads(2)
    try:
        again = torch.cat([apply_views(images[i : i + 1], transforms[i : i + 1]) for i in range(4)])
        together = apply_views(images, transforms)
    finally:
        torch.set_num_threads(1)  # as in all tests
    assert torch.equal(again, alone)
    assert torch.equal(together, alone)


def test_wrong_shapes_are_refused():
    for images, count in ((random_images(2), 3), (random_images(2)[0], 3), (random_images(2)[:, :1], 2)):
        with pytest.raises(ValueError, match=rf"{count} transforms.*\[b, 3, h, w\]"):
            apply_views(images, [IDENTITY] * count)


def test_descriptions_define_the_jitter():
    assert views_description(["identity", "hflip"]) == {}
    jitter = views_description(["identity", "jitter-1"])
    assert jitter == views_description(["jitter-3"])
    assert jitter["jitter"]["order"] == ["brightness", "contrast", "saturation", "hue"]
    assert (jitter["jitter"]["brightness"], jitter["jitter"]["hue_turns"]) == ([0.9, 1.1], [-0.25, 0.25])
