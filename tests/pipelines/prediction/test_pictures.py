"""Contact sheets, GIFs and MP4s, pixel by pixel."""

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from pipelines.prediction.pictures import (
    BORDER,
    GRAY,
    GREEN,
    RED,
    Strip,
    animation,
    clip_strips,
    contact_sheet,
    file_names,
    framed,
    save_gif,
    save_mp4,
)


def video(frames: int, height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """Frames that differ by a moving bright block on a gray ground."""
    pixels = np.full((frames, height, width, 3), 60 + seed, np.uint8)
    for frame in range(frames):
        left = frame * (width - 4) // max(1, frames - 1)
        pixels[frame, 2:10, left : left + 4] = (200, 40, 90)
    return pixels


def numbered(frames: int, side: int = 64) -> np.ndarray:
    """Frames whose one color tells their number."""
    return np.stack([np.full((side, side, 3), 3 * number, np.uint8) for number in range(frames)])


def test_context_is_framed_green_and_the_rest_in_its_own_color():
    strip = Strip("prediction", video(5), 2, RED)
    frames = framed(strip, 2)
    assert frames.shape == (5, 128 + 2 * BORDER, 128 + 2 * BORDER, 3)
    for number, frame in enumerate(frames):
        color = GREEN if number < 2 else RED
        for edge in (frame[:BORDER], frame[-BORDER:], frame[:, :BORDER], frame[:, -BORDER:]):
            assert (edge == color).all()
        assert (frame[BORDER:-BORDER:2, BORDER:-BORDER:2] == strip.video[number]).all()
        assert (frame[BORDER + 1 : -BORDER : 2, BORDER + 1 : -BORDER : 2] == strip.video[number]).all()


def test_a_clip_shows_truth_in_gray_over_prediction_in_red():
    truth, prediction = clip_strips(video(4), video(4, seed=9), 1)
    assert (truth.label, truth.rest, truth.context) == ("truth", GRAY, 1)
    assert (prediction.label, prediction.rest, prediction.context) == ("prediction", RED, 1)
    assert (truth.video != prediction.video).any()


def shown_numbers(page: Image.Image, rows: int) -> list[list[tuple[int, tuple[int, int, int]]]]:
    """(frame number, border color) of every cell of `numbered` videos on a page, read off its pixels."""
    pixels = np.asarray(page)
    cell = 64 * 2 + 2 * BORDER
    is_border = np.zeros(pixels.shape[:2], bool)
    for color in (GREEN, RED, GRAY):
        is_border |= (pixels == color).all(-1)
    found = []
    for y in range(len(pixels) - cell):
        row = is_border[y]
        lefts = [
            x
            for x in np.flatnonzero(row[:-cell])
            if row[x : x + cell].all() and is_border[y : y + cell, x].all()
            if not row[x - 1] and not is_border[y - 1, x]
        ]
        if lefts:
            centre = y + cell // 2
            found.append([(int(pixels[centre, x + cell // 2, 0]) // 3, tuple(pixels[y, x].tolist())) for x in lefts])
    assert len(found) == rows
    return found


def test_a_contact_sheet_shows_all_frames_of_short_clips():
    page = contact_sheet([("a", clip_strips(numbered(5), numbered(5), 2))] * 2, "title")
    expected_truth = [(i, GREEN if i < 2 else GRAY) for i in range(5)]
    expected_prediction = [(i, GREEN if i < 2 else RED) for i in range(5)]
    assert shown_numbers(page, rows=4) == [expected_truth, expected_prediction] * 2


def test_a_contact_sheet_of_long_clips_keeps_first_and_last_frame():
    page = contact_sheet([("a", clip_strips(numbered(46), numbered(46), 10))], "title")
    truth, prediction = shown_numbers(page, rows=2)
    assert [number for number, _ in truth] == list(range(0, 46, 3))
    assert [color for _, color in prediction] == [GREEN] * 4 + [RED] * 12


@pytest.mark.parametrize(("clips", "tiles"), [(1, (1, 1)), (3, (1, 3)), (4, (1, 4)), (5, (2, 4))])
def test_an_animation_lays_clips_out_in_rows(clips, tiles):
    single = animation([("a", clip_strips(video(3), video(3), 1))])
    frames = animation([("a", clip_strips(video(3), video(3), 1))] * clips)
    assert frames.dtype == np.uint8
    assert frames.shape == (3, single.shape[1] * tiles[0], single.shape[2] * tiles[1], 3)
    assert (frames[:, : single.shape[1], : single.shape[2]] == single).all()
    assert (single[0] == GREEN).all(-1).any()
    assert not (single[0] == RED).all(-1).any()
    assert (single[1] == RED).all(-1).any()


def durations(path) -> list[int]:
    with Image.open(path) as image:
        return [frame.info["duration"] for frame in ImageSequence.Iterator(image)]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (37, 51)])
def test_a_gif_has_all_frames_and_reads_back(tmp_path, height, width):
    original = video(12, height, width)
    save_gif(tmp_path / "a.gif", original, fps=10)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 12
        assert image.info["loop"] == 0
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    assert np.abs(frames.astype(int) - original).max() <= 3
    assert durations(tmp_path / "a.gif") == [100] * 11 + [1000]


def test_a_gif_of_equal_frames_plays_as_long(tmp_path):
    still = np.concatenate([video(1)] * 4 + [video(1, seed=50)] * 2)
    save_gif(tmp_path / "a.gif", still, fps=10)
    assert sum(durations(tmp_path / "a.gif")) == 5 * 100 + 1000  # equal neighbors may become one frame


@pytest.mark.parametrize("fps", [0.2, 0.75, 1, 7, 12.5, 24, 29.97, 30, 48, 50, 60, 100, 120, 240])
def test_a_gif_plays_at_its_rate_as_far_as_gif_can(tmp_path, fps):
    """Within half of a hundredth of a second, the unit of GIF, or above 50 within the two that a frame is shown."""
    save_gif(tmp_path / "a.gif", video(40), fps)
    found = durations(tmp_path / "a.gif")
    assert min(found) >= 20  # viewers slow down shorter ones
    assert found[-1] == max(1000, found[-2])
    assert sum(found[:-1]) / 1000 == pytest.approx(39 / fps, abs=0.005 if fps <= 50 else 0.02)
    with Image.open(tmp_path / "a.gif") as image:
        shown = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    assert len(shown) == 40 if fps <= 50 else 1 <= len(shown) - 39 * 50 / fps < 2
    for frame, expected in ((shown[0], video(40)[0]), (shown[-1], video(40)[-1])):
        assert np.abs(frame.astype(int) - expected).max() <= 1


def test_a_still_gif_rests_for_as_long_as_gif_can_count(tmp_path):
    save_gif(tmp_path / "a.gif", np.concatenate([video(1)] * 30), fps=0.01)
    assert sum(durations(tmp_path / "a.gif")) == 65535 * 10


@pytest.mark.parametrize("place", [0, 13, 37, 39])
def test_one_odd_frame_keeps_its_colors_in_a_gif(tmp_path, place):
    """Whatever the other frames are: here with far more colors than a GIF has, none of them like these."""
    generator = np.random.default_rng(0)
    ground = generator.integers(0, 256, (1, 32, 32, 3)) * (0.3, 1, 0.3)
    original = (ground + generator.normal(0, 3, (40, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    original[place] = 20
    original[place, 5:9, 5:9], original[place, 20:22, 20:22] = (250, 10, 240), (255, 130, 10)
    save_gif(tmp_path / "a.gif", original, fps=10)
    with Image.open(tmp_path / "a.gif") as image:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    assert np.abs(frames[place].astype(int) - original[place]).max() <= 1
    # The others are no worse than a palette of the nearest few hundred colors makes them.
    assert np.sqrt(np.square(frames.astype(float) - original).mean()) < 12


def test_few_colors_are_kept_as_they_are(tmp_path):
    original = np.random.default_rng(0).choice(np.arange(0, 256, 2, np.uint8), (3, 16, 16, 1)).repeat(3, axis=-1)
    save_gif(tmp_path / "a.gif", original, fps=10)
    with Image.open(tmp_path / "a.gif") as image:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    np.testing.assert_array_equal(frames, original)


def test_small_frames_can_be_enlarged(tmp_path):
    original = video(4, 20, 15)
    save_gif(tmp_path / "a.gif", original, 10, scale=3)
    save_mp4(tmp_path / "a.mp4", original, 10, scale=3)
    with Image.open(tmp_path / "a.gif") as image:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    np.testing.assert_array_equal(frames[:, 1::3, 1::3], original)
    assert frames.shape == (4, 60, 45, 3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        (stream,) = container.streams.video
        assert (stream.width, stream.height) == (46, 60)
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert np.abs(np.stack(shown)[:, 1::3, 1:45:3].astype(int) - original).mean() < 6


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["a/b", "a_b", "a_b_2", "c"], ["a_b", "a_b_2", "a_b_2_2", "c"]),
        (["Clip", "clip", "CLIP"], ["Clip", "clip_2", "CLIP_3"]),
        (["overview", "overview@3"], ["overview_2", "overview@3"]),
        (["///", "..", ""], ["video", "video_2", "video_3"]),
        (["x" * 300, "x" * 299], ["x" * 200, "x" * 200 + "_2"]),
        (["\u00e9", "e\u0301"], ["\u00e9", "\u00e9_2"]),
    ],
)
def test_names_become_files_that_differ(names, files):
    assert file_names(names, taken=["overview"]) == files


def test_a_name_is_used_with_all_its_endings():
    assert file_names(["clip"], ["clip-2"], endings=["", "-2", "-3"]) == ["clip_2"]
    assert file_names(["clip"], ["clip-4"], endings=["", "-2", "-3"]) == ["clip"]


@pytest.mark.parametrize(("height", "width", "fps"), [(64, 64, 10), (37, 51, 25), (64, 64, 29.97), (64, 64, 0.4)])
def test_an_mp4_plays_back(tmp_path, height, width, fps):
    original = video(12, height, width)
    save_mp4(tmp_path / "a.mp4", original, fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-3)
    assert len(frames) == 12
    assert [time for time, _ in frames] == pytest.approx([i / fps for i in range(12)], abs=1e-3)
    for (_, frame), expected in zip(frames, original, strict=True):
        assert frame.shape == (height + height % 2, width + width % 2, 3)
        assert np.abs(frame[:height, :width].astype(int) - expected).mean() < 6
