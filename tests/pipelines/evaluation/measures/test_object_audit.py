"""The audit of objects: true frames are without fault, and each kind of damage shows in its own measure."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, label
from torch import Tensor

from pipelines.evaluation.measures.bounces import find_meetings
from pipelines.evaluation.measures.intervals import Tally, draw_counts
from pipelines.evaluation.measures.measure import ClipBatch
from pipelines.evaluation.measures.object_audit import (
    ObjectAudit,
    audit_bounces,
    audit_objects,
    label_areas,
    match_shapes,
)
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
    return {measure: mean(tally) for measure, tally in audit_objects(match_shapes(frames, truth), truth).items()}


def bounce_means(frames: Tensor, truth: VisibleShapes, centers: np.ndarray) -> dict[str, float]:
    tallies = audit_bounces(match_shapes(frames, truth), truth, centers)
    return {measure: mean(tally) for measure, tally in tallies.items()}


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


@pytest.fixture(scope="module")
def long_clips() -> tuple[Tensor, VisibleShapes, np.ndarray]:
    """Frames and shapes of six clips from the second frame on, and the centers in all 40 frames."""
    drawn, videos, frames = source(frames=40), np.arange(6)[:, None], np.arange(1, 40)
    every, each = np.broadcast_arrays(videos, frames)
    pixels = image_to_unit(torch.from_numpy(drawn.render(every.ravel(), each.ravel())))
    shapes = drawn.shapes(every.ravel(), each.ravel())
    return pixels.unflatten(0, (6, 39)), shapes, drawn.centers(videos, np.arange(40))


ELASTIC = {"bounces": 1.0, "collisions": 1.0, "elastic": 1.0, "on_time": 1.0, "lost_before": 0.0}


def test_true_bounces_are_without_fault(long_clips):
    frames, truth, centers = long_clips
    tallies = audit_bounces(match_shapes(frames, truth), truth, centers)
    assert {measure: mean(tally) for measure, tally in tallies.items()} == ELASTIC
    assert all(tallies[measure].count.sum() >= least for measure, least in {"bounces": 20, "collisions": 3}.items())


def test_far_ahead_only_the_time_of_bounces_is_wrong(long_clips):
    """Mirrored clips are as good as the true ones, but with another future, once they have jumped there."""
    frames, truth, centers = long_clips
    tallies = audit_bounces(match_shapes(frames.flip(-1), truth), truth, centers)
    found = {measure: mean(Tally(tally.total[:, 5:], tally.count[:, 5:])) for measure, tally in tallies.items()}
    assert found.pop("on_time") < 0.7
    assert found == {name: value for name, value in ELASTIC.items() if name != "on_time"}


def test_every_contact_with_a_wall_is_found():
    """A disc alone in a room of 48 pixels for its center, and what is known of its way: x and y are a triangle wave."""
    velocity, frames = np.array([2.7, 1.9]), np.arange(120)
    way = np.array([5.0, 11.0]) + frames[:, None] * velocity
    centers = (8 + 48 - abs(way % 96 - 48))[None, :, None]
    meetings = find_meetings(centers, np.ones((1, 120, 1), bool), 8.0, np.array([64.0, 64.0]))
    for wall, (axis, offset) in enumerate([(0, 0), (0, 48), (1, 0), (1, 48)]):
        contacts = (96 * np.arange(1, 9) + offset - 96 - way[0, axis]) / velocity[axis]
        assert np.flatnonzero(meetings.begin[0, :, wall]).tolist() == [
            int(time) for time in contacts if 1 <= time < 116
        ]
    assert (meetings.bounce == meetings.begin).all()
    assert meetings.speed[np.isfinite(meetings.speed)] == pytest.approx(1)


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


RIGHT_WALL, MIDDLE = 10.4, 4.5  # when they are touched
GIVEN, LAST = 2, 18


def bouncing() -> np.ndarray:
    """Tracks [frames, discs, xy]: a red disc bounces off the right wall, a green and a blue one off each other."""
    after = np.arange(LAST)[:, None] - [RIGHT_WALL, MIDDLE, MIDDLE]
    x = [56.0, 25.0, 41.0] - abs(after) * [2.5, 1.0, -1.0]
    return np.stack([x, np.broadcast_to([12.0, 46.0, 46.0], x.shape)], axis=-1)


AT_THE_WALL, TOGETHER = [0], [1, 2]


def go_through(discs: list[int]) -> Callable[[np.ndarray], None]:
    def damage(tracks: np.ndarray) -> None:
        tracks[:, discs] = tracks[:1, discs] + np.arange(LAST)[:, None, None] * (tracks[1:2] - tracks[:1])[:, discs]

    return damage


def after_contact(speed: float, discs: list[int]) -> Callable[[np.ndarray], None]:
    """Bounce with this share of the speed."""

    def damage(tracks: np.ndarray) -> None:
        frame = int(RIGHT_WALL if discs == AT_THE_WALL else MIDDLE) + 1
        tracks[frame:, discs] = tracks[frame, discs] + speed * (tracks[frame:, discs] - tracks[frame, discs])

    return damage


def come_later(tracks: np.ndarray) -> None:
    tracks[GIVEN + 3 :, 0] = tracks[GIVEN:-3, 0]


def turn_up(tracks: np.ndarray) -> None:
    """From the given frames on to the upper wall, which is touched later, too."""
    tracks[GIVEN:, 0] = np.stack([np.full(LAST - GIVEN, 32.0), 8 + abs(np.arange(LAST - GIVEN) * 2.5 - 14)], -1)


def vanish(tracks: np.ndarray) -> None:
    tracks[GIVEN + 2 :, 0] = -100


NAN = float("nan")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda tracks: None, {}),
        (go_through(AT_THE_WALL), {"bounces": 0.0, "on_time": 0.5}),
        (after_contact(0.0, AT_THE_WALL), {"bounces": 0.0, "on_time": 0.5}),
        (after_contact(0.6, AT_THE_WALL), {"elastic": 0.5}),
        (after_contact(1.5, AT_THE_WALL), {"elastic": 0.5}),
        (come_later, {"on_time": 0.5}),
        (turn_up, {"on_time": 0.5}),
        (go_through(TOGETHER), {"collisions": 0.0, "on_time": 0.5}),
        (after_contact(0.0, TOGETHER), {"collisions": 0.0, "on_time": 0.5}),
        (after_contact(0.6, TOGETHER), {"elastic": 0.5}),
        (vanish, {"bounces": NAN, "lost_before": 0.5}),
    ],
    ids=["nothing", "through the wall", "sticks at the wall", "slower", "faster", "late", "another wall",
         "through each other", "stick together", "slower together", "lost"],
)  # fmt: skip
def test_each_bad_bounce_shows_in_its_own_measure(damage, expected):
    tracks = bouncing()

    def draw(tracks: np.ndarray) -> tuple[Tensor, np.ndarray]:
        return paint({"centroid": tracks[GIVEN - 1 :], "area": np.full(3, 64 * np.pi), "kind": np.full(3, DISC),
                      "rgb": PALETTE[[RED, GREEN, BLUE]]}, 1.0)  # fmt: skip

    damaged = tracks.copy()
    damage(damaged)
    frames = LAST - GIVEN + 1
    truth = VisibleShapes(
        present=np.ones((frames, 3), bool),
        kind=np.full((frames, 3), DISC),
        color=np.tile([RED, GREEN, BLUE], (frames, 1)),
        coverage=draw(tracks)[1],
        radius=8.0,
        scale=1.0,
    )
    found = bounce_means(draw(damaged)[0], truth, tracks[None])
    assert found == pytest.approx(ELASTIC | expected, nan_ok=True)


def test_speed_needs_two_frames(true):
    frames, truth = true[0].clone(), true[1]
    frames[:, 3] = torch.from_numpy(BACKGROUND / 127.5 - 1)[:, None, None]
    measured = audit_objects(match_shapes(frames, truth), truth)
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
