"""The audit of objects: true frames are without fault, and each kind of damage shows in its own measure."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, label
from torch import Tensor

from pipelines.evaluation.intervals import Tally, draw_counts
from pipelines.evaluation.measures import ClipBatch
from pipelines.evaluation.object_audit import ObjectAudit, audit_objects, label_areas
from pipelines.prediction.clips import Clip
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.shapes import BACKGROUND, KINDS, PALETTE, ShapesSource, VisibleShapes, coverage_of_area
from stage1_autoencoder.videos.source import Recording

CLIPS, FRAMES = 12, 8
# What true frames score; position and speed have the errors of pixels.
FAULTLESS = {"whole": 1.0, "kept": 1.0, "kind": 1.0, "color": 0.0, "ghosts": 0.0}


def source(size: int | list[int] = 64, **shapes) -> ShapesSource:
    dataset = DatasetConfig(name="s", source="shapes", image_size=size, splits={"test": CLIPS}, shapes=shapes)
    return ShapesSource(dataset, "test")


def numbers() -> tuple[np.ndarray, np.ndarray]:
    """Videos and frames of all clips."""
    return np.repeat(np.arange(CLIPS), FRAMES), np.tile(np.arange(FRAMES), CLIPS)


def draw(source: ShapesSource) -> tuple[Tensor, VisibleShapes]:
    """[b, t, 3, h, w] frames of the first half of each video, and the truth."""
    videos, frames = numbers()
    pixels = image_to_unit(torch.from_numpy(source.render(videos, frames)))
    return pixels.unflatten(0, (CLIPS, FRAMES)), source.shapes(videos, frames)


def mean(tally: Tally) -> float:
    return (tally.total.sum() / tally.count.sum()).item()


def means(frames: Tensor, truth: VisibleShapes) -> dict[str, float]:
    return {measure: mean(tally) for measure, tally in audit_objects(frames, truth).items()}


@pytest.fixture(scope="module")
def shapes() -> ShapesSource:
    return source()


@pytest.fixture(scope="module")
def true(shapes: ShapesSource) -> tuple[Tensor, VisibleShapes]:
    return draw(shapes)


@pytest.mark.parametrize(
    ("size", "options"),
    [(64, {}), (100, {}), ([48, 80], {"max_objects": 4}), (32, {}), (64, {"radius": 4.0})],
    ids=["64", "100", "wide", "32", "small"],
)
def test_true_frames_are_without_fault(size, options):
    drawn = source(size, **options)
    found = means(*draw(drawn))
    assert found == pytest.approx(FAULTLESS | {key: found[key] for key in ("position", "speed")}, abs=1e-3)
    # A centroid of whole pixels is off by at most half a pixel in x and in y.
    assert found["position"] < 0.3 / drawn.scale
    assert found["speed"] == pytest.approx(1, abs=0.02)


def paint(scene: dict[str, np.ndarray], scale: float) -> tuple[Tensor, np.ndarray]:
    """Paint shapes one over the other.

    Args:
        scene: of k shapes `centroid` [t, k, 2] and `area` [k] in pixels of 64, `kind` [k] and `rgb` [k, 3].
    Returns:
        [1, t, 3, h, w] in [-1, 1], and the visible part [t, k, h, w] of each shape.
    """
    middle = np.arange(64 * scale) + 0.5
    x = middle - scale * scene["centroid"][..., :1, None]
    y = middle[:, None] - scale * scene["centroid"][..., 1:, None]
    cover = coverage_of_area(x, y, scene["kind"][:, None, None], scale**2 * scene["area"][:, None, None])
    frames, visible = np.broadcast_to(BACKGROUND, (*cover[:, 0].shape, 3)).copy(), np.zeros_like(cover)
    for k, rgb in enumerate(scene["rgb"]):
        frames += cover[:, k, ..., None] * (rgb - frames)
        visible *= 1 - cover[:, k : k + 1]
        visible[:, k] = cover[:, k]
    return torch.from_numpy(frames / 127.5 - 1).permute(0, 3, 1, 2)[None], visible


DISC, SQUARE, TRIANGLE = range(len(KINDS))
RED, GREEN, BLUE, YELLOW = range(len(PALETTE))
STEP = np.array([1.0, 0.5])


def a_scene() -> dict[str, np.ndarray]:
    """A red disc, a green square and a blue triangle that move to the right, far from each other."""
    start = np.array([[13.0, 13.0], [45.3, 16.2], [30.0, 43.6]])
    return {
        "centroid": start + STEP * np.arange(5)[:, None, None],
        "area": np.array([200.0, 170.0, 120.0]),
        "kind": np.array([DISC, SQUARE, TRIANGLE]),
        "rgb": PALETTE[[RED, GREEN, BLUE]],
    }


def with_shape(scene: dict[str, np.ndarray], place: tuple[float, float], area: float, color: int) -> None:
    """One more disc."""
    path = np.asarray(place) + STEP * np.arange(5)[:, None, None]
    scene["centroid"] = np.concatenate([scene["centroid"], path], axis=1)
    scene["area"], scene["kind"] = np.append(scene["area"], area), np.append(scene["kind"], DISC)
    scene["rgb"] = np.concatenate([scene["rgb"], PALETTE[[color]]])


def erase(scene: dict[str, np.ndarray]) -> None:
    for name in scene:
        scene[name] = scene[name][..., 1:, :] if scene[name].ndim > 1 else scene[name][1:]


def swap_colors(scene: dict[str, np.ndarray]) -> None:
    scene["rgb"] = scene["rgb"][[1, 0, 2]]


def turn_square(scene: dict[str, np.ndarray]) -> None:
    scene["kind"][0] = SQUARE


def round_corners(scene: dict[str, np.ndarray]) -> None:
    scene["kind"][2] = DISC


def move(scene: dict[str, np.ndarray]) -> None:
    scene["centroid"] = scene["centroid"] + [1.8, 2.4]


def stand_still(scene: dict[str, np.ndarray]) -> None:
    scene["centroid"][:] = scene["centroid"][:1]


def shrink(scene: dict[str, np.ndarray]) -> None:
    scene["area"][0] *= 0.5


def grow(scene: dict[str, np.ndarray]) -> None:
    scene["area"][0] *= 1.6


def tint(scene: dict[str, np.ndarray]) -> None:
    scene["rgb"][0] += [0, 30, 0]


def fade(scene: dict[str, np.ndarray]) -> None:
    scene["rgb"][0] = 0.7 * scene["rgb"][0] + 0.3 * BACKGROUND


def recolor(scene: dict[str, np.ndarray]) -> None:
    scene["rgb"][0] = PALETTE[YELLOW]


def haunt(scene: dict[str, np.ndarray]) -> None:
    with_shape(scene, (53, 50), 60, YELLOW)


def split(scene: dict[str, np.ndarray]) -> None:
    """A part of the red disc is elsewhere."""
    scene["area"][0] = 150
    with_shape(scene, (53, 50), 50, RED)


def speckle(scene: dict[str, np.ndarray]) -> None:
    with_shape(scene, (53, 50), 12, YELLOW)


FADED = 0.3 * np.sqrt(((PALETTE[RED] - BACKGROUND) ** 2).mean())
BROKEN = {"whole": 0.0}


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["64", "128"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (erase, BROKEN | {"kept": 2 / 3}),
        (shrink, BROKEN | {"kept": 2 / 3}),
        (grow, BROKEN | {"kept": 2 / 3}),
        (turn_square, BROKEN | {"kind": 2 / 3}),
        (round_corners, BROKEN | {"kind": 2 / 3}),
        (move, {"position": 3.0}),
        # 2 sqrt(1.25) on average, after 0, 1, 2, 3 and 4 steps
        (stand_still, {"position": 2 * np.hypot(*STEP), "speed": 0.0}),
        (tint, {"color": 30 / np.sqrt(3) / 3}),
        (fade, {"color": FADED / 3}),
        (haunt, BROKEN | {"ghosts": 1.0}),
        (split, BROKEN | {"ghosts": 1.0}),
        (speckle, {}),
        # What is found by its color is somewhere else, and another kind.
        (swap_colors, BROKEN | {"kind": 1 / 3, "position": 2 / 3 * np.hypot(32.3, 3.2)}),
        (recolor, BROKEN | {"kept": 2 / 3, "ghosts": 1.0}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_shows_in_its_own_measure(scale, damage, expected):
    scene, frames = a_scene(), 5
    truth = VisibleShapes(
        present=np.ones((frames, 3), bool),
        kind=np.tile(scene["kind"], (frames, 1)),
        color=np.tile([RED, GREEN, BLUE], (frames, 1)),
        coverage=paint(scene, scale)[1],
        radius=8.0 * scale,
        scale=scale,
    )
    damage(scene)
    found = means(paint(scene, scale)[0], truth)
    # Pixels limit what can be told of places, and so of speeds.
    position, speed = expected.get("position", 0.0), expected.get("speed", 1.0)
    assert found.pop("position") == pytest.approx(position, abs=0.3 / scale)
    assert found.pop("speed") == pytest.approx(speed, abs=0.05)
    wanted = FAULTLESS | {name: value for name, value in expected.items() if name in FAULTLESS}
    assert found == pytest.approx(wanted, abs=1e-3)


def test_speed_needs_two_frames(true):
    frames, truth = true[0].clone(), true[1]
    frames[:, 3] = torch.from_numpy(BACKGROUND / 127.5 - 1)[:, None, None]
    measured = audit_objects(frames, truth)
    assert (measured["speed"].count > 0).double().mean(0).tolist() == [0, 1, 1, 0, 0, 1, 1, 1]
    assert mean(measured["speed"]) == pytest.approx(1, abs=0.02)


def test_blur_shows_in_the_colors(true):
    frames, truth = true
    blurred = torch.from_numpy(gaussian_filter(frames.numpy(), 1.0, axes=(3, 4)))
    found = means(blurred, truth)
    assert found.pop("color") > 3
    assert found.pop("position") < 0.3
    assert found.pop("speed") == pytest.approx(1, abs=0.02)
    assert found == {name: value for name, value in FAULTLESS.items() if name != "color"}


def test_areas_are_those_of_scipy():
    colors = np.random.default_rng(0).integers(-1, 2, (5, 40, 30))
    labels = label_areas(colors)
    for frame, ours in zip(colors, labels, strict=True):
        for color in (0, 1):
            expected, count = label(frame == color)
            pairs = set(zip(expected[frame == color], ours[frame == color], strict=True))
            assert len(pairs) == count == len({own for _, own in pairs})
    other = [set(labels[i][colors[i] >= 0].tolist()) for i in range(5)]
    assert sum(map(len, other)) == len(set.union(*other))


def test_an_audit_of_batches_and_samples(shapes, true):
    """Clips that begin at different frames; the second sample shows nothing but the background."""
    frames, _ = true
    context, horizon = 2, 3
    clips = []
    for video in range(CLIPS):
        start = video % 3
        part = frames[video, start : start + context + horizon]
        clips.append(Clip(f"clip {video}", start << 32 | video, Recording(f"{video}"), 10.0, part))
    audit, parts = ObjectAudit(shapes), []
    for batch in (clips[:8], clips[8:]):
        frames = torch.stack([clip.frames for clip in batch])
        given, truth = frames[:, :context], frames[:, context:]
        empty = torch.from_numpy(BACKGROUND / 127.5 - 1)[:, None, None].expand_as(truth)
        futures = {
            "prediction": torch.stack([truth, empty], 1),
            "copy_last": given[:, -1:].expand_as(truth)[:, None],
            "reconstruction": empty[:, None],
        }
        parts.append(audit.measure(ClipBatch(batch, given, truth, frames, futures, {})))
    records = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    results = audit.results(records, draw_counts(range(CLIPS), 50, 0))
    for measure, (prediction, copying, nothing) in {
        "whole": (0.5, 1.0, 0.0), "kept": (0.5, 1.0, 0.0), "kind": (1.0, 1.0, np.nan), "ghosts": (0.0, 0.0, 0.0),
        "speed": (1.0, 0.0, np.nan), "color": (0.0, 0.0, np.nan),
    }.items():  # fmt: skip
        found, near = results[measure], {"abs": 0.03, "nan_ok": True}
        assert (found.prediction, found.copy_last, found.reconstruction) == pytest.approx(
            (prediction, copying, nothing), **near
        )
        assert found.per_frame["prediction"] == pytest.approx([prediction] * horizon, **near)
        assert found.interval["prediction"][0] <= found.prediction <= found.interval["prediction"][1]
    steps = results["position"].per_frame["copy_last"]
    assert steps[0] == pytest.approx(2.5, abs=0.3)  # dataset.shapes.min_speed and max_speed are 2 and 3
    assert steps == sorted(steps)
    low, high = zip(*results["position"].per_frame_interval["copy_last"], strict=True)
    assert all(a < step < b for a, step, b in zip(low, steps, high, strict=True))


def test_shapes_too_small_are_refused():
    with pytest.raises(ValueError, match=r"radius 3 .* 1\.17"):
        ObjectAudit(source(24))
