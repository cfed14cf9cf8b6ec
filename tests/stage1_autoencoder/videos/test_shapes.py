"""The procedural videos: the laws of motion, and their pixels."""

import numpy as np
import pytest

from stage1_autoencoder.videos import VideoError
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.shapes import (
    AREAS,
    BACKGROUND,
    KINDS,
    PALETTE,
    SUBSTEPS,
    WORLD,
    ShapesSource,
    coverage_of_area,
)


def source(split: str = "train", count: int = 40, shapes: dict | None = None, **options) -> ShapesSource:
    return ShapesSource(
        DatasetConfig(name="shapes", source="shapes", splits={split: count}, shapes=shapes or {}, **options), split
    )


@pytest.fixture(scope="module")
def videos() -> ShapesSource:
    """300 videos of 40 frames: thousands of collisions."""
    return source(count=300, shapes={"frames": 40})


def present(videos: ShapesSource) -> np.ndarray:
    return videos.present > 0


def test_a_video_is_a_function_of_seed_split_and_number():
    few, many, other = source(count=3), source(count=101), source(count=3, split_seed=1)
    assert few.read(2).shape == (20, 64, 64, 3)
    assert few.read(2).dtype == np.uint8
    for video in range(3):
        assert (few.read(video) == many.read(video)).all()
        assert (few.read(video) != other.read(video)).any()
    assert few.videos == many.videos[:3]
    assert few.videos[2].frames == 20
    assert few.fingerprint == source(count=3).fingerprint
    assert len({few.fingerprint, many.fingerprint, other.fingerprint}) == 3
    assert len({video.id for video in many.videos}) == len({video.fingerprint for video in many.videos}) == 101
    first_frames = [source(split).render(np.arange(40), np.zeros(40, int)) for split in ("train", "val", "test")]
    assert len({frame.tobytes() for frames in first_frames for frame in frames}) == 120


def test_two_or_three_shapes_of_all_kinds_in_different_colors(videos):
    assert set(present(videos).sum(1)) == {2, 3}
    assert 0.4 < (present(videos).sum(1) == 2).mean() < 0.6
    assert set(videos.kind.ravel()) == {0, 1, 2}
    assert all(len(set(colors)) == 3 for colors in videos.color)


def test_shapes_stay_inside_the_walls_and_apart(videos):
    # A collision is noticed at the end of a substep, after one step of the fastest possible shape; another shape may
    # push it one step further.
    margin = 2 * 3.0 * np.sqrt(3) / SUBSTEPS
    centers = videos.positions[present(videos)[:, None].repeat(40, 1)]
    assert 8 - margin < centers.min() < 8.5  # they do reach the walls
    assert centers.max() < WORLD - 8 + margin
    apart = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = present(videos)[:, a] & present(videos)[:, b]
        apart.append(np.linalg.norm(videos.positions[both, :, a] - videos.positions[both, :, b], axis=-1).min())
    assert 16 - margin < min(apart) < 16.5  # they do touch


def displacements(videos: ShapesSource) -> np.ndarray:
    """[videos, frames - 1, objects, 2]"""
    return np.diff(videos.positions.astype(np.float64), axis=1)


def test_energy_is_conserved_in_every_video(videos):
    # Where no shape turned between two frames, displacements are velocities; the energy of such frames is constant.
    steps = displacements(videos)
    straight = np.abs(np.diff(steps, axis=1)).max((2, 3)) < 1e-4  # frames i, i+1, i+2 on one line, for all shapes
    energy = (np.square(steps).sum(-1) * videos.present[:, None]).sum(-1)
    compared = 0
    for video in range(len(steps)):
        values = energy[video, 1:][straight[video]]
        if len(values) > 1:
            compared += 1
            assert np.ptp(values) < 1e-3 * values.mean()
    assert compared > 200


def test_shapes_move_in_straight_lines_between_collisions(videos):
    steps = displacements(videos)
    positions = videos.positions
    near_wall = (positions < 8 + 6).any(-1) | (positions > WORLD - 8 - 6).any(-1)  # [videos, frames, objects]
    free = ~near_wall[:, :-2] & ~near_wall[:, 1:-1] & ~near_wall[:, 2:]
    for a in range(3):
        for b in range(3):
            if a != b:
                distance = np.linalg.norm(positions[:, :, a] - positions[:, :, b], axis=-1)
                clear = (distance > 16 + 12) | ~present(videos)[:, b, None]
                free[:, :, a] &= clear[:, :-2] & clear[:, 1:-1] & clear[:, 2:]
    free &= present(videos)[:, None]
    bend = np.abs(np.diff(steps, axis=1)).max(-1)
    assert free.sum() > 500
    assert bend[free].max() < 1e-4
    assert (bend > 0.5).any()


def test_initial_speeds_are_in_the_asked_range():
    slow = source(count=100, shapes={"min_speed": 0.5, "max_speed": 0.75})
    speeds = np.linalg.norm(displacements(slow)[:, 0], axis=-1)[present(slow)]
    untouched = speeds[speeds > 0.499]
    assert len(untouched) > 200
    assert np.median(speeds) == pytest.approx(0.625, abs=0.05)


def test_a_shape_covers_its_area_wherever_it_lies_between_pixels():
    radius, count = 8.0, 300
    single = source(count=count, shapes={"min_objects": 1, "max_objects": 1, "frames": 1})
    frames = single.render(np.arange(count), np.zeros(count, int)).astype(np.float64) - BACKGROUND
    contrast = (PALETTE[single.color[:, 0]] - BACKGROUND)[:, None, None]
    covered = ((frames * contrast).sum(-1) / (contrast**2).sum(-1)).sum((1, 2))  # [videos], in pixels
    areas = dict(zip(KINDS, (np.pi, (2 * 0.82) ** 2, 3 * np.sqrt(3) * 0.6**2), strict=True))
    for kind, area in enumerate(areas.values()):
        found = covered[single.kind[:, 0] == kind]
        assert len(found) > 50
        assert found == pytest.approx(area * radius**2, rel=0.02)
        assert np.ptp(found) < 2.5  # square pixels; hard edges would give about 10


def test_frame_step_keeps_every_kth_frame():
    whole, stepped = source(), source(frame_step=3)
    assert [video.frames for video in stepped.videos[:2]] == [7, 7]
    assert stepped.videos[0].fps == pytest.approx(whole.videos[0].fps / 3)
    assert (stepped.read(5) == whole.read(5)[::3]).all()
    assert stepped.videos[0].fingerprint != whole.videos[0].fingerprint


def test_image_size_scales_the_world():
    small, large = source(image_size=32).read(4), source(image_size=128).read(4)
    assert large.shape == (20, 128, 128, 3)
    shrunk = large.reshape(20, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(shrunk - small).mean() < 1.5


def test_the_world_has_the_shape_of_the_frames():
    for frame_size in ((64, 128), (96, 64)):
        shapes = source(image_size=list(frame_size), count=100)
        assert shapes.read(4).shape == (20, *frame_size, 3)
        x, y = np.moveaxis(shapes.positions[present(shapes)[:, None].repeat(20, 1)], -1, 0)
        for places, side in ((x, frame_size[1]), (y, frame_size[0])):
            assert 7 < places.min() < 9  # the radius, of which a fast shape may miss a part at a wall
            assert side - 9 < places.max() < side - 7


def test_any_pairs_of_videos_and_frames_are_rendered_as_they_are_read():
    dataset = source()
    rendered = dataset.render(np.array([5, 0, 5, 31]), np.array([19, 3, 0, 7]))
    expected = [dataset.read(5, [19])[0], dataset.read(0, [3])[0], dataset.read(5)[0], dataset.read(31)[7]]
    assert (rendered == np.stack(expected)).all()
    assert (np.stack(list(dataset.iterate(5, 2, 6))) == dataset.read(5, range(2, 6))).all()
    assert dataset.read(5, []).shape == (0, 64, 64, 3)


@pytest.mark.parametrize("positions", [[-1], [0, 20]])
def test_frames_outside_a_video_are_refused(positions):
    with pytest.raises(IndexError, match=r"train_00002, .* 20"):
        source().read(2, positions)
    with pytest.raises(IndexError, match=r"train_00002, .* 20"):
        list(source().iterate(2, 18, 21))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"max_objects": 5, "radius": 4.0}, "5 shapes .*4.0.*at most 4 shapes"),
        ({"radius": 30.0, "min_objects": 1, "max_objects": 1}, "30.0.*radius 24.8 for 1"),
        ({"radius": 15.0}, "15.0.*radius 14.3 for 3"),
        ({"max_speed": 50.0}, "max_speed: 50.0.*at most 9.2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(VideoError, match=message):
        source(shapes=shapes)


@pytest.mark.parametrize("objects", [1, 2, 3, 4])
def test_the_largest_radius_of_the_message_is_possible(objects):
    radius = np.floor(np.sqrt(0.15 / objects) * WORLD * 10) / 10
    shapes = {"radius": radius, "min_objects": objects, "max_objects": objects, "frames": 3}
    assert source(count=5, shapes=shapes).read(0).shape == (3, 64, 64, 3)


@pytest.mark.parametrize("image_size", [64, [40, 72]], ids=["square", "wide"])
def test_what_is_known_about_a_frame_is_what_is_drawn(image_size):
    drawn = source(count=30, image_size=image_size, shapes={"max_objects": 4})
    numbers, frames = np.arange(30).repeat(2), np.tile([0, 19], 30)
    known = drawn.shapes(numbers, frames)
    colors = PALETTE[known.color][..., None, None]  # [n, k, 3, 1, 1]
    ground = 1 - known.coverage.sum(1)
    frame = (known.coverage[:, :, None] * colors).sum(1) + ground[:, None] * BACKGROUND[:, None, None]
    assert np.abs(frame.transpose(0, 2, 3, 1) - drawn.render(numbers, frames)).max() < 0.51
    assert not known.coverage[~known.present].any()
    # Alone and away from the frame's edges, a shape has the area of its kind.
    whole = known.radius**2 * AREAS[known.kind[known.present]]
    ratio = known.coverage[known.present].sum((1, 2)) / whole
    assert np.median(ratio) == pytest.approx(1, abs=0.02)
    assert ratio.max() < 1.04


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_a_shape_by_area_and_centroid(kind):
    offset = np.arange(-40, 40) + 0.5
    x, y = offset - 0.3, offset[:, None] + 0.2
    cover = coverage_of_area(x, y, np.array(kind), np.array(400.0))
    assert cover.sum() == pytest.approx(400, rel=0.01)
    assert (cover * x).sum() / 400 == pytest.approx(0, abs=0.05)
    assert (cover * y).sum() / 400 == pytest.approx(0, abs=0.05)
