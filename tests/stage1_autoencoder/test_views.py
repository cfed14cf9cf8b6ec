"""Views: their names, their draws, and what they do to frames, against a reference of Python floats."""

import colorsys
from collections.abc import Iterator

import pytest
import torch

from stage1_autoencoder.views import View, ViewTransform, apply_views, parse_view, view_transform, views_description

IDENTITY = ViewTransform()
FLIP = ViewTransform(flip=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_images(count: int, height: int = 5, width: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


def picture(*pixels: tuple[float, float, float]) -> torch.Tensor:
    """One frame of one row of (red, green, blue) in [0, 1]."""
    return torch.tensor(pixels).T.view(1, 3, 1, -1) * 2 - 1


def clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def grey(pixel: list[float]) -> float:
    return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]


def reference(image: torch.Tensor, transform: ViewTransform) -> torch.Tensor:
    """One frame [3, h, w], pixel by pixel, in float64."""
    height, width = image.shape[1:]
    pixels = [[(float(v) + 1) / 2 for v in image[:, y, x]] for y in range(height) for x in range(width)]
    pixels = [[clip(v * transform.brightness) for v in pixel] for pixel in pixels]
    mean = sum(map(grey, pixels)) / len(pixels)
    pixels = [[clip(mean + transform.contrast * (v - mean)) for v in pixel] for pixel in pixels]
    pixels = [[clip(grey(pixel) + transform.saturation * (v - grey(pixel))) for v in pixel] for pixel in pixels]
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


@pytest.mark.parametrize(
    "name", ["", "jitter", "jitter-", "jitter-0", "jitter-01", "jitter--1", "jitter-1.5", "jitter-1 ", "jitter-1\n"]
)
def test_what_is_no_name(name):
    for function in (parse_view, lambda view: view_transform(view, "a"), lambda view: views_description([view])):
        with pytest.raises(ValueError, match=r"is not a view: identity, hflip, or jitter-1, jitter-2, \.\.\. are"):
            function(name)


@pytest.mark.parametrize("name", ["Identity", "vflip", "jitter-\u0661", "jitter_1", "hflip-1"])
def test_what_is_no_name_either(name):
    with pytest.raises(ValueError, match=f"'{name}' is not a view"):
        parse_view(name)


def test_identity_and_flip_do_not_depend_on_the_video():
    assert view_transform("identity", "a") == IDENTITY
    assert view_transform("hflip", "b") == FLIP
    assert (IDENTITY.is_identity, FLIP.is_identity, view_transform("jitter-1", "a").is_identity) == (True, False, False)
    assert not ViewTransform(hue=0.1).is_identity


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
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-8), (torch.float32, 3e-6)])
def test_agrees_with_the_reference(transform, dtype, error):
    images = random_images(2, dtype=dtype)
    images[0, :, 0] = torch.linspace(-1, 1, 6)  # greys
    images[0, :, 1] = torch.tensor([[-1, 1, -1, 1, 1, -1], [-1, 1, 1, -1, 1, -1], [-1, 1, 1, 1, -1, 1]])
    changed = apply_views(images, [transform, transform])
    assert changed.dtype == dtype
    expected = torch.stack([reference(image, transform) for image in images])
    torch.testing.assert_close(changed.double(), expected, atol=error, rtol=0)


def test_factors_next_to_one_change_next_to_nothing():
    images = random_images(3)
    almost = [ViewTransform(**{name: 1 + 1e-9}) for name in ("brightness", "contrast", "saturation")]
    for transform in (*almost, ViewTransform(hue=1e-9), ViewTransform(hue=1.0)):
        assert transform.changes_colour
        torch.testing.assert_close(apply_views(images, [transform] * 3), images, atol=1e-6, rtol=0)


def test_a_third_of_a_turn_makes_green_of_red():
    red, green, blue, dim_red = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.25, 0.25)
    turned = apply_views(picture(red, green, blue, dim_red), [ViewTransform(hue=1 / 3)])
    torch.testing.assert_close(turned, picture(green, blue, red, (0.25, 0.5, 0.25)), atol=1e-6, rtol=0)


def test_grey_stays_grey():
    greys = torch.linspace(-1, 1, 30).view(1, 1, 5, 6).repeat(2, 3, 1, 1)
    changed = apply_views(greys, [ViewTransform(saturation=1.1), ViewTransform(hue=0.2)])
    torch.testing.assert_close(changed, greys, atol=1e-6, rtol=0)


def test_brightness_and_contrast_in_closed_form():
    pixels = picture((0.2, 0.2, 0.2), (0.6, 0.6, 0.6), (0.8, 0.8, 0.8), (0.0, 0.0, 0.0))  # of mean 0.4
    brighter = apply_views(pixels, [ViewTransform(brightness=1.5)])
    torch.testing.assert_close((brighter[0, 0, 0] + 1) / 2, torch.tensor([0.3, 0.9, 1.0, 0.0]), atol=1e-6, rtol=0)
    flatter = apply_views(pixels, [ViewTransform(contrast=0.5)])
    torch.testing.assert_close((flatter[0, 0, 0] + 1) / 2, torch.tensor([0.3, 0.5, 0.6, 0.2]), atol=1e-6, rtol=0)


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


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("height", "width"), [(16, 16), (7, 9), (64, 65)])
def test_a_frame_does_not_depend_on_its_batch(height, width):
    images = random_images(17, height, width)
    transforms = [view_transform(view, "v") for view in ("identity", "hflip", *(f"jitter-{k}" for k in range(1, 16)))]
    alone = torch.cat([apply_views(images[i : i + 1], transforms[i : i + 1]) for i in range(17)])
    for size in range(1, 18):
        for order in (range(size), range(17 - size, 17), range(size - 1, -1, -1)):
            order = list(order)
            together = apply_views(images[order], [transforms[i] for i in order])
            assert torch.equal(together, alone[order]), f"{size} frames together"
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(apply_views(strided, transforms), alone)


@pytest.mark.usefixtures("one_thread")
def test_a_frame_does_not_depend_on_the_number_of_threads():
    # So large that a sum over one frame is divided among threads.
    images, transforms = random_images(4, 256, 256), [view_transform("jitter-1", f"{i}") for i in range(4)]
    alone = torch.cat([apply_views(images[i : i + 1], transforms[i : i + 1]) for i in range(4)])
    torch.set_num_threads(2)
    assert torch.equal(torch.cat([apply_views(images[i : i + 1], transforms[i : i + 1]) for i in range(4)]), alone)
    assert torch.equal(apply_views(images, transforms), alone)


def test_pixels_stay_in_range():
    images = random_images(64).sign()
    transforms = [view_transform("jitter-1", f"{i}") for i in range(32)] + [ViewTransform(False, 3, 3, 3, 0.4)] * 32
    changed = apply_views(images, transforms)
    assert changed.min() >= -1
    assert changed.max() <= 1


def test_shapes_that_do_not_fit():
    for images, count in ((random_images(2), 3), (random_images(2)[0], 3), (random_images(2)[:, :1], 2)):
        with pytest.raises(ValueError, match=rf"images of shape .* for {count} transforms: not \[b, 3, h, w\]"):
            apply_views(images, [IDENTITY] * count)


def test_descriptions_have_what_names_do_not_say():
    assert views_description(["identity", "hflip"]) == {}
    jitter = views_description(["identity", "jitter-1"])
    assert jitter == views_description(["jitter-3"])
    assert jitter["jitter"]["order"] == ["brightness", "contrast", "saturation", "hue"]
    assert (jitter["jitter"]["brightness"], jitter["jitter"]["hue_turns"]) == ([0.9, 1.1], [-0.25, 0.25])
