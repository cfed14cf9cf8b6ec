"""How frames are shown: orientation, and squares cut out of what is shown."""

from fractions import Fraction

import av
import numpy as np
import pytest

from stage1_autoencoder.videos.display import Display, Region, orientation_of
from stage1_autoencoder.videos.video_files import probe_video
from tests.stage1_autoencoder.videos.conftest import brightening

CORNERS = np.array([[1, 2], [3, 4]])  # as stored
SHOWN = {
    1: [[1, 2], [3, 4]],
    2: [[2, 1], [4, 3]],
    3: [[4, 3], [2, 1]],
    4: [[3, 4], [1, 2]],
    5: [[1, 3], [2, 4]],
    6: [[3, 1], [4, 2]],
    7: [[4, 2], [3, 1]],
    8: [[2, 4], [1, 3]],
}


def matrix(a: float, b: float, c: float, d: float) -> np.ndarray:
    """As mp4 files have it: (p, q) goes to (a p + c q, b p + d q)."""
    return np.array([a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30]).astype(np.int32)


@pytest.mark.parametrize(("orientation", "shown"), SHOWN.items())
def test_orientations_are_those_of_exif(orientation, shown):
    assert Display(orientation).turn(CORNERS).tolist() == shown


@pytest.mark.parametrize("orientation", SHOWN)
def test_a_matrix_moves_each_corner_where_it_is_shown(orientation):
    """Its orientation is the one that shows all four corners where the matrix maps them."""
    places = {corner: np.argwhere(np.array(SHOWN[orientation]) == corner)[0] * 2 - 1 for corner in (1, 2, 3, 4)}
    stored = {1: (-1, -1), 2: (1, -1), 3: (-1, 1), 4: (1, 1)}  # right, down
    found = [
        found
        for found in np.ndindex(3, 3, 3, 3)
        if all(
            ((found[0] - 1) * p + (found[2] - 1) * q, (found[1] - 1) * p + (found[3] - 1) * q) == (x, y)
            for corner, (p, q) in stored.items()
            for y, x in [places[corner]]
        )
    ]
    (only,) = found
    assert orientation_of(matrix(*(number - 1 for number in only))) == orientation


def test_other_angles_become_the_nearest_quarter_turn():
    for degrees, orientation in ((20, 1), (70, 6), (100, 6), (170, 3), (-80, 8)):
        cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        assert orientation_of(matrix(cosine, sine, -sine, cosine)) == orientation
    assert orientation_of(np.zeros(9, np.int32)) == 1


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("size", [(64, 48), (67, 48), (48, 67), (49, 50), (5, 5)])
def test_the_square_is_cut_out_of_what_is_shown(orientation, size):
    width, height = size
    pixels = np.arange(width * height).reshape(height, width)
    display = Display(orientation)
    (left, top, across, down), *_ = display.place(width, height, (32, 32), "crop")
    shown = display.turn(pixels)
    assert display.size(width, height) == shown.shape[::-1]
    side = min(size)
    y, x = (shown.shape[0] - side) // 2, (shown.shape[1] - side) // 2
    ours = display.turn(pixels[top : top + down, left : left + across])
    np.testing.assert_array_equal(ours, shown[y : y + side, x : x + side])


@pytest.mark.parametrize(
    ("aspect", "size", "shown", "square"),
    [
        (Fraction(16, 15), (720, 576), (768, 576), Region(90, 0, 540, 576)),
        (Fraction(64, 45), (720, 576), (1024, 576), Region(157, 0, 405, 576)),
        (Fraction(1, 2), (1440, 1080), (720, 1080), Region(0, 180, 1440, 720)),
        (Fraction(4, 3), (1440, 1080), (1920, 1080), Region(315, 0, 810, 1080)),
        (Fraction(1, 8), (3, 3), (1, 3), Region(0, 1, 3, 1)),
    ],
)
def test_squares_of_pixels_that_are_not_square(aspect, size, shown, square):
    assert Display(aspect=aspect).size(*size) == shown
    assert Display(aspect=aspect).place(*size, (64, 64), "crop").region == square
    assert Display(6, aspect).size(*size) == shown[::-1]


@pytest.mark.parametrize(("aspect", "taken"), [(Fraction(8), Fraction(8)), (Fraction(9), 1), (Fraction(1, 1000), 1)])
def test_pixels_out_of_reason_are_square(tmp_path, aspect, taken):
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for pixels in brightening(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    assert probe_video(path, "v").display.aspect == taken
