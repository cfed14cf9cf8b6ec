"""How a decoded frame is shown: which way up, how wide its pixels are, and where in a picture of another shape."""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.stream import VideoStream

from stage1_autoencoder.videos.config import Fit

# Pixels that are wider or narrower are a mistake of the header.
MOST_ASPECT = 8


class Region(NamedTuple):
    """A part of a decoded frame, in its pixels."""

    left: int
    top: int
    width: int
    height: int


class Placement(NamedTuple):
    """Where a decoded frame is in a picture, which is black around it.

    Attributes:
        region: the part of the frame that is used.
        width, height: the size that it is resized to, before turning.
        left, top: its place in the picture, after turning.
    """

    region: Region
    width: int
    height: int
    left: int = 0
    top: int = 0

    @property
    def enlarges(self) -> bool:
        """Whether a side of the region has fewer pixels than the result."""
        return self.region.width < self.width or self.region.height < self.height


@dataclass(frozen=True)
class Display:
    """What a player does to a decoded frame.

    Attributes:
        orientation: as EXIF numbers it: 1 as it is, 2 mirrored, 3 turned by 180 degrees, 4 upside down, 5 transposed,
            6 turned clockwise, 7 transposed along the other diagonal, 8 turned counterclockwise.
        aspect: width of a decoded pixel over its height, before turning.
    """

    orientation: int = 1
    aspect: Fraction = Fraction(1)

    @classmethod
    def of(cls, stream: VideoStream, frame: av.VideoFrame) -> "Display":
        """The display of a video by the tags of its container, or those of the codec where it has none."""
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)
        orientation = 1 if matrix is None else orientation_of(np.frombuffer(matrix, np.int32))
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        return cls(orientation, aspect if 1 / MOST_ASPECT <= aspect <= MOST_ASPECT else Fraction(1))

    @property
    def _turns(self) -> tuple[bool, bool, bool]:
        """Whether rows become columns, whether then left and right change places, and top and bottom."""
        return self.orientation >= 5, self.orientation in (2, 3, 6, 7), self.orientation in (3, 4, 7, 8)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The size at which decoded frames are shown: (width, height) in square pixels, as players round it."""
        wide = max(1, round(width * self.aspect))
        return (height, wide) if self._turns[0] else (wide, height)

    def place(self, width: int, height: int, frame_size: tuple[int, int], fit: Fit) -> Placement:
        """Place a decoded frame in a picture.

        With `crop`, the largest part of the picture's shape is used, (long - short) // 2 pixels from the left and the
        top as shown, to the nearest decoded pixel. With `pad` and `stretch` all of the frame is used; the bars of `pad`
        are as wide on both sides, or one pixel wider at the right or the bottom.

        Args:
            width, height: of the decoded frame.
            frame_size: height and width of the picture.
        """
        tall, wide = reversed(frame_size) if self._turns[0] else frame_size
        shown_width = width * self.aspect
        if fit == "crop":
            scale = min(shown_width / wide, Fraction(height, tall))
            across, down = max(1, round(wide * scale / self.aspect)), max(1, round(tall * scale))
            return Placement(self._centered(width, height, across, down), wide, tall)
        whole = Region(0, 0, width, height)
        if fit == "stretch":
            return Placement(whole, wide, tall)
        scale = max(shown_width / wide, Fraction(height, tall))
        across, down = max(1, round(shown_width / scale)), max(1, round(height / scale))
        bars = (tall - down) // 2, (wide - across) // 2
        top, left = reversed(bars) if self._turns[0] else bars
        return Placement(whole, across, down, left, top)

    def _centered(self, width: int, height: int, across: int, down: int) -> Region:
        """The part of a decoded frame, `across` times `down` pixels, that is in the middle of what is shown."""
        transposed, mirrored, flipped = self._turns
        from_right, from_bottom = (flipped, mirrored) if transposed else (mirrored, flipped)
        left, top = (width - across) // 2, (height - down) // 2
        if from_right:
            left = width - across - left
        if from_bottom:
            top = height - down - top
        return Region(left, top, across, down)

    def turn(self, pixels: np.ndarray) -> np.ndarray:
        """Turn decoded pixels [h, w, ...] the way they are shown; the same array if they are already."""
        if self.orientation == 1:
            return pixels
        transposed, mirrored, flipped = self._turns
        shown = pixels.swapaxes(0, 1) if transposed else pixels
        return np.ascontiguousarray(shown[:: -1 if flipped else 1, :: -1 if mirrored else 1])


AS_STORED = Display()


def orientation_of(matrix: np.ndarray) -> int:
    """The EXIF number of a display matrix [9] int32, as mp4 files have it.

    A matrix maps a decoded point (p, q) to (a p + c q, b p + d q), with a, b, c, d its numbers 0, 1, 3, 4; p goes right
    and q down. Angles between the quarter turns become the nearest of them.
    """
    a, b, c, d = (int(matrix[place]) for place in (0, 1, 3, 4))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return {(False, False): 1, (True, False): 2, (True, True): 3, (False, True): 4}[a < 0, d < 0]
    return {(False, False): 5, (False, True): 6, (True, True): 7, (True, False): 8}[b < 0, c < 0]
