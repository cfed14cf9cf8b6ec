"""Procedural videos: anti-aliased colored shapes that bounce elastically off the walls and each other.

Nothing is stored: the trajectories of a split are simulated at once from its seed (a few hundred kilobytes), and frames
are rendered from them on request.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from stage1_autoencoder.videos.source import VideoError, VideoInfo, VideoSource

# Short side of the world of simulation and radii; rendering scales it to the short side of the frames.
WORLD = 64.0
SUBSTEPS = 4
FRAMES_PER_SECOND = 10.0
DEFAULT_SPLITS = {"train": 1500, "val": 64, "test": 64}
BACKGROUND = np.array([22, 24, 34], np.float32)
PALETTE = np.array([[235, 78, 70], [74, 190, 92], [72, 128, 246], [250, 204, 56]], np.float32)
KINDS = ("disc", "square", "triangle")
# Relative to the radius, chosen so that the three kinds cover about the same area inside one collision circle.
SQUARE_HALF_SIDE = 0.82
TRIANGLE_INRADIUS = 0.60
# A triangle's centroid is this far below its center, relative to the radius.
TRIANGLE_DROP = 0.25
# Of each kind: area of a shape of radius 1, and distance of its centroid from its center, downwards.
AREAS = np.array([np.pi, (2 * SQUARE_HALF_SIDE) ** 2, 3 * np.sqrt(3) * TRIANGLE_INRADIUS**2], np.float32)
DROPS = np.array([0.0, 0.0, TRIANGLE_DROP], np.float32)


@dataclass(frozen=True, eq=False)
class VisibleShapes:
    """What the simulator knows about n frames of at most k shapes.

    Attributes:
        present: [n, k] bool: whether there is such a shape.
        kind, color: [n, k] int: of `KINDS` and of `PALETTE`; the colors of a frame differ.
        coverage: [n, k, h, w] float32 in [0, 1]: which fraction of a pixel shows the shape; shapes that touch may hide
            each other's corners.
        radius: of a disc, in pixels of these frames.
        scale: pixels of these frames per unit of the simulator.
    """

    present: np.ndarray
    kind: np.ndarray
    color: np.ndarray
    coverage: np.ndarray
    radius: float
    scale: float


class ShapesSource(VideoSource):
    """One split of the `shapes` videos. A video is a function of (split_seed, split, its number)."""

    def __init__(self, dataset: DatasetConfig, split: Split) -> None:
        shapes = dataset.shapes
        count = int(dataset.splits.get(split, DEFAULT_SPLITS[split]))
        stored_frames = (shapes.frames - 1) // dataset.frame_step + 1
        self.dataset = dataset
        self.radius = shapes.radius
        world = world_of(dataset)
        scene = _draw_scenes(
            np.random.default_rng([dataset.split_seed, list(DEFAULT_SPLITS).index(split)]), count, dataset, world
        )
        self.kind, self.color, self.present = scene["kind"], scene["color"], scene["present"]
        self.positions = _simulate(scene, shapes.frames, shapes.radius, world)
        recipe = f"{dataset.model_dump_json(include={'shapes', 'split_seed', 'image_size', 'frame_step'})} {split}"
        self._recipe = hashlib.sha256(f"{recipe} {preprocessing_description(dataset)}".encode()).hexdigest()
        rate = FRAMES_PER_SECOND / dataset.frame_step
        self.videos = [VideoInfo(f"{split}_{i:05d}", stored_frames, rate, f"{self._recipe}/{i}") for i in range(count)]
        self.skipped = []

    @property
    def scale(self) -> float:
        """Pixels per unit of the simulator."""
        return min(self.dataset.frame_size) / WORLD

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._recipe} {len(self.videos)}".encode()).hexdigest()

    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        start, stop = self.check_range(index, start, stop)
        yield from self.read(index, range(start, stop))

    def read(self, index: int, positions: Sequence[int] | None = None) -> np.ndarray:
        frames = np.arange(self.videos[index].frames) if positions is None else np.asarray(positions, np.int64)
        if len(frames):
            self.check_range(index, int(frames.min()), int(frames.max()) + 1)
        return self.render(np.full(len(frames), index), frames)

    def render(self, videos: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Render frames of videos.

        Args:
            videos, frames: [n] int: video numbers, and frame numbers after the frame step.
        Returns:
            [n, h, w, 3] uint8 RGB.
        """
        return (self._paint(videos, frames, BACKGROUND, PALETTE[self.color[videos]]) + 0.5).astype(np.uint8)

    def shapes(self, videos: np.ndarray, frames: np.ndarray) -> VisibleShapes:
        """The shapes that `render` draws; arguments as there."""
        # Each shape in a channel of its own.
        k = self.kind.shape[1]
        channels = np.broadcast_to(np.eye(k, dtype=np.float32), (len(videos), k, k))
        painted = self._paint(videos, frames, np.zeros(k, np.float32), channels)
        return VisibleShapes(
            present=self.present[videos] > 0,
            kind=self.kind[videos],
            color=self.color[videos],
            coverage=np.ascontiguousarray(painted.transpose(0, 3, 1, 2)),  # without the margins
            radius=self.radius * self.scale,
            scale=self.scale,
        )

    def centers(self, videos: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Where the shapes are: [..., objects, xy] pixels; arguments as of `render`, of any equal shapes."""
        return self.positions[videos, frames * self.dataset.frame_step] * self.scale

    def _paint(self, videos: np.ndarray, frames: np.ndarray, background: np.ndarray, colors: np.ndarray) -> np.ndarray:
        """Paint frames.

        Args:
            background: [c] float32.
            colors: [n, objects, c] float32.
        Returns:
            [n, h, w, c] float32.
        """
        radius = self.radius * self.scale
        # Each shape is drawn in a small patch around it; the canvas has a margin so that patches stay inside.
        side = 2 * int(np.ceil(radius * 1.3 + 1)) + 1
        height, width = self.dataset.frame_size
        shape = len(videos), height + 2 * side, width + 2 * side, len(background)
        canvas = np.broadcast_to(background, shape).copy()
        rows = np.arange(len(videos))[:, None, None]
        centers = self.centers(videos, frames)
        for k in range(centers.shape[1]):
            corner = np.floor(centers[:, k]).astype(np.int64) - side // 2
            x = corner[:, :1] + np.arange(side)
            y = corner[:, 1:] + np.arange(side)
            offset_x = ((x + 0.5) - centers[:, k, :1]).astype(np.float32)[:, None, :]
            offset_y = ((y + 0.5) - centers[:, k, 1:]).astype(np.float32)[:, :, None]
            kind = self.kind[videos, k, None, None]
            alpha = _coverage(offset_x, offset_y, kind, radius) * self.present[videos, k, None, None]
            where = rows, y[:, :, None] + side, x[:, None, :] + side
            canvas[where] += alpha[..., None] * (colors[:, k, None, None] - canvas[where])
        return canvas[:, side:-side, side:-side]


def coverage_of_area(x: np.ndarray, y: np.ndarray, kind: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Coverage of pixels by a shape of a given area.

    Args:
        x, y: pixels from the shape's centroid to the middle of each pixel; y is downwards.
        kind: of `KINDS`.
        area: in pixels; all four broadcast.
    Returns:
        Float in [0, 1].
    """
    radius = np.sqrt(area / AREAS[kind])
    return _coverage(x, y + DROPS[kind] * radius, kind, radius)


def _coverage(x: np.ndarray, y: np.ndarray, kind: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Fraction of each pixel that a shape covers, from the signed distance to its edge: float in [0, 1]."""
    disc = np.sqrt(x * x + y * y) - radius
    square = np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF_SIDE * radius
    below = y - TRIANGLE_DROP * radius
    slanted = np.float32(np.sqrt(3) / 2) * np.abs(x) - 0.5 * below
    triangle = np.maximum(slanted, below) - TRIANGLE_INRADIUS * radius
    distance = np.where(kind == 0, disc, np.where(kind == 1, square, triangle))
    return np.clip(0.5 - distance, 0.0, 1.0)


def world_of(dataset: DatasetConfig) -> np.ndarray:
    """Width and height [2] of the world, which has the shape of the frames."""
    height, width = dataset.frame_size
    return np.array([width, height]) * WORLD / min(height, width)


def _draw_scenes(
    generator: np.random.Generator, count: int, dataset: DatasetConfig, world: np.ndarray
) -> dict[str, np.ndarray]:
    """Kinds, colors, first positions and velocities of `count` videos; each video has its own random stream.

    Raises:
        VideoError: the shapes do not fit into the frame, or are too fast.
    """
    shapes = dataset.shapes
    most = shapes.max_objects
    room = WORLD - 2 * shapes.radius
    if most > len(PALETTE) or room <= 0 or most * (2 * shapes.radius) ** 2 > 0.6 * world.prod():
        raise VideoError(
            f"dataset.shapes: {most} shapes of radius {shapes.radius} do not fit in the frame; "
            f"at most {len(PALETTE)} shapes, and radius {np.sqrt(0.15 / most * world.prod()):.1f} for {most}"
        )
    # Collisions can give one shape the energy of all. Faster shapes would jump through walls and each other.
    fastest = SUBSTEPS * shapes.radius / (2 * np.sqrt(most))
    if shapes.max_speed > fastest:
        raise VideoError(
            f"dataset.shapes.max_speed: {shapes.max_speed} is too fast for {most} shapes of radius {shapes.radius}; "
            f"at most {fastest:.1f}"
        )
    # One row of numbers per video, so that video i does not depend on the number of videos.
    uniform = generator.random((count, 5 * most + 1))
    objects = shapes.min_objects + (uniform[:, 0] * (most - shapes.min_objects + 1)).astype(np.int64)
    kind = (uniform[:, 1 : most + 1] * len(KINDS)).astype(np.int64)
    angle = uniform[:, most + 1 : 2 * most + 1] * 2 * np.pi
    speed = shapes.min_speed + uniform[:, 2 * most + 1 : 3 * most + 1] * (shapes.max_speed - shapes.min_speed)
    keys = np.floor(uniform[:, 3 * most + 1 : 3 * most + 2] * 2**53).astype(np.uint64)
    positions, color = np.empty((count, most, 2)), np.empty((count, most), np.int64)
    for i in range(count):
        stream = np.random.default_rng(int(keys[i, 0]))
        positions[i] = _place_apart(stream, most, shapes.radius, world)
        color[i] = stream.permutation(len(PALETTE))[:most]
    velocity = speed[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return {
        "kind": kind,
        "color": color,
        "present": (np.arange(most) < objects[:, None]).astype(np.float32),
        "positions": positions,
        "velocity": velocity,
    }


def _place_apart(stream: np.random.Generator, count: int, radius: float, world: np.ndarray) -> np.ndarray:
    """Draw centers [count, 2] at least two radii apart, by rejection."""
    apart = np.triu_indices(count, 1)
    while True:
        trial = radius + stream.random((64, count, 2)) * (world - 2 * radius)
        distance = np.linalg.norm(trial[:, apart[0]] - trial[:, apart[1]], axis=-1)
        good = np.flatnonzero((distance > 2 * radius).all(1))
        if len(good):
            return trial[good[0]]


def _simulate(scene: dict[str, np.ndarray], frames: int, radius: float, world: np.ndarray) -> np.ndarray:
    """Centers [videos, frames, objects, 2] under elastic collisions of equal masses, all videos at once."""
    position, velocity = scene["positions"].copy(), scene["velocity"].copy()
    present = scene["present"] > 0
    track = np.empty((len(position), frames, *position.shape[1:]), np.float32)
    for frame in range(frames):
        track[:, frame] = position
        for _ in range(SUBSTEPS):
            position += velocity / SUBSTEPS
            outward = np.where(position < radius, -1.0, np.where(position > world - radius, 1.0, 0.0))
            velocity = np.where(outward * velocity > 0, -velocity, velocity)
            for a, b in zip(*np.triu_indices(position.shape[1], 1), strict=True):
                difference = position[:, b] - position[:, a]
                distance = np.maximum(np.linalg.norm(difference, axis=-1, keepdims=True), 1e-9)
                normal = difference / distance
                approach = ((velocity[:, a] - velocity[:, b]) * normal).sum(-1, keepdims=True)
                touching = (distance[:, 0] < 2 * radius) & (approach[:, 0] > 0) & present[:, a] & present[:, b]
                # Equal masses exchange the velocity components along the line of centers.
                impulse = np.where(touching[:, None], approach, 0.0) * normal
                velocity[:, a] -= impulse
                velocity[:, b] += impulse
    return track
