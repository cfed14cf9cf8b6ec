"""The shapes of predicted frames compared with the simulator's: kept or lost, kind, color, place, speed, and ghosts.

The shapes of a video have different colors. So a shape is the largest connected area of its color, wherever it is.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from pipelines.evaluation.measures.bounces import find_meetings
from pipelines.evaluation.measures.intervals import Tally, summarize
from pipelines.evaluation.measures.measure import ClipBatch, Measure, Records
from pipelines.prediction.clips import Clip
from pipelines.prediction.pictures import clip_strips, contact_sheet, to_video
from pipelines.runtime.results import MetricValues
from stage1_autoencoder.videos.shapes import (
    BACKGROUND,
    DROPS,
    KINDS,
    PALETTE,
    ShapesSource,
    VisibleShapes,
    coverage_of_area,
)

# A shape is kept if its area is this many times the visible area of the true one.
KEPT_AREA = (0.6, 1.5)
# A ghost has at least this share of a disc's area.
GHOST_AREA = 0.125
# In pixels; kinds of smaller shapes cannot be told apart.
SMALLEST_RADIUS = 3.5
# A bounce keeps the speed if it is this many times that before.
KEPT_SPEED = (0.8, 1.25)
# How much clearer a simulator's meeting is than one of found shapes, whose places are not exact.
CLEARLY = 1.6
# Measures of what happens in some frames only.
EVENTS = ("bounces", "collisions", "elastic", "on_time", "lost_before")
# Of the best and of the worst clips.
CLIPS_SHOWN = 3
# Pixels of frames that are measured at once.
PIXELS_AT_ONCE = 2**21


@dataclass(frozen=True, eq=False)
class FoundShapes:
    """Of n frames and each color of the palette: the largest connected area.

    Attributes:
        area: [n, colors] pixels, 0 where a color does not occur.
        centroid: [n, colors, xy] pixels from the upper left corner of the frame; of no area anything, as the others.
        kind: [n, colors] of `KINDS`.
        color_error: [n, colors] levels of 0 to 255; NaN for an area so thin that no pixel is inside.
        others: [n, colors] number of further areas as large as a ghost.
    """

    area: np.ndarray
    centroid: np.ndarray
    kind: np.ndarray
    color_error: np.ndarray
    others: np.ndarray


@dataclass(frozen=True, eq=False)
class MatchedShapes:
    """The simulator's k shapes as they were found in b videos of t frames.

    Attributes:
        kept, right: [b, t, k] bool: whether its area is right, and then its kind.
        centroid: [b, t, k, xy] pixels; of no area anything.
        color_error: [b, t, k] levels of 0 to 255; NaN for an area so thin that no pixel is inside.
        ghosts: [b, t] number of areas that are no shape of the video.
    """

    kept: np.ndarray
    right: np.ndarray
    centroid: np.ndarray
    color_error: np.ndarray
    ghosts: np.ndarray


def match_shapes(videos: Tensor, truth: VisibleShapes) -> MatchedShapes:
    """Find the shapes of every frame by their color.

    Args:
        videos: [b, t, 3, h, w] in [-1, 1].
        truth: of the b t frames.
    """
    b, t, _, h, w = videos.shape
    frames = rearrange(videos, "b t c h w -> (b t) h w c").float().clamp(-1, 1).add(1).mul(127.5).cpu().numpy()
    size = max(1, PIXELS_AT_ONCE // (h * w))
    parts = [find_shapes(frames[start : start + size], truth.radius) for start in range(0, len(frames), size)]
    found = FoundShapes(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    n, own, present = np.arange(len(frames))[:, None], truth.color, truth.present
    ratio = found.area[n, own] / np.where(present, truth.coverage.sum((2, 3)), 1.0)
    kept = present & (ratio >= KEPT_AREA[0]) & (ratio <= KEPT_AREA[1])
    # An area of a color that no shape of the video has is a ghost, and so is a second area of a color.
    expected = (present[..., None] & (own[..., None] == np.arange(len(PALETTE)))).any(1)
    ghosts = found.others + (~expected & (found.area >= ghost_area(truth.radius)))
    matched = {
        "kept": kept,
        "right": kept & (found.kind[n, own] == truth.kind),
        "centroid": found.centroid[n, own],
        "color_error": found.color_error[n, own],
        "ghosts": ghosts.sum(1),
    }
    return MatchedShapes(**{name: values.reshape(b, t, *values.shape[1:]) for name, values in matched.items()})


def audit_objects(found: MatchedShapes, truth: VisibleShapes) -> dict[str, Tally]:
    """Measure the shapes of every frame.

    - `whole`: share of the clips in which every shape is kept and has the right kind, and there is no ghost.
    - `kept`: share of the shapes whose area is 0.6 to 1.5 times the visible area of the true one. The next four are
      about kept shapes only.
    - `kind`: share of the right kind; a shape has the kind whose outline, of the same centroid and area, overlaps most
      with it (intersection over union).
    - `position`: distance between the centroids of the shape and of the visible true shape, in units of the simulator,
      which are pixels at 64x64.
    - `speed`: way from the frame before, of shapes kept in both, as a share of the true way; 0 stands still.
    - `color`: difference to the shape's color (root mean square of the channels, in levels of 0 to 255), mean over the
      pixels inside the shape.
    - `ghosts`: number of connected areas of a color of the palette that are no shape of the video, each at least an
      eighth of a disc.

    Args:
        found: of b videos of t frames.
        truth: of the b t frames.
    Returns:
        Measure -> [b, t]. The first frames have no speed.
    """
    shape = found.kept.shape
    present, (h, w) = truth.present.reshape(shape), truth.coverage.shape[2:]
    true_area = np.where(truth.present, truth.coverage.sum((2, 3)), 1.0)
    columns, rows = (truth.coverage.sum(axis) @ (np.arange(side) + 0.5) for axis, side in ((2, w), (3, h)))
    true_centroid = (np.stack([columns, rows], axis=-1) / true_area[..., None]).reshape(*shape, 2)

    def way(places: np.ndarray) -> np.ndarray:
        return np.linalg.norm(np.diff(places, axis=1, prepend=places[:, :1]), axis=-1)

    before = np.zeros_like(found.kept)
    before[:, 1:] = found.kept[:, :-1]

    def tally(values: np.ndarray, of: np.ndarray, over: np.ndarray | float = 1.0) -> Tally:
        """Sums of the values and of what they are divided by, over the shapes `of`."""
        return Tally(*(torch.from_numpy(np.where(of, x, 0.0).sum(-1)) for x in (values, over)))

    ghosts, clip = found.ghosts[..., None], np.ones((*found.ghosts.shape, 1), bool)
    distance = np.linalg.norm(found.centroid - true_centroid, axis=-1) / truth.scale
    return {
        "whole": tally(((found.right == present).all(-1, keepdims=True) & (ghosts == 0)), clip),
        "kept": tally(found.kept, present),
        "kind": tally(found.right, found.kept),
        "position": tally(distance, found.kept),
        "speed": tally(way(found.centroid), found.kept & before, way(true_centroid)),
        "color": tally(found.color_error, found.kept & np.isfinite(found.color_error)),
        "ghosts": tally(ghosts, clip),
    }


def audit_bounces(found: MatchedShapes, truth: VisibleShapes, centers: np.ndarray) -> dict[str, Tally]:
    """Measure how shapes bounce off walls and off each other, see `find_meetings`.

    The first three ask what the found shapes do wherever they are. So they can be told at any time, when the simulator
    and a prediction have long parted.

    - `bounces`: share of the shapes' meetings with a wall after which they move away from it. The others go through the
      wall, stay there, or vanish.
    - `collisions`: the same of two shapes that meet.
    - `elastic`: share of these bounces and collisions after which the speed is 0.8 to 1.25 times that before.
    - `on_time`: share of the simulator's bounces and collisions after which the same shape moves away from the same
      wall or shape, in the right frame or the one before or after it.
    - `lost_before`: share of the simulator's bounces and collisions whose shape was lost before; `on_time` is about the
      others.

    Args:
        found: of the last given frame and the predicted ones.
        truth: of the same frames.
        centers: [b, context + horizon, k, xy] the simulator's in pixels of these frames.
    Returns:
        Measure -> [b, horizon], in the frame in which they touch, if nothing changes their way.
    """
    given, k = centers.shape[1] - found.kept.shape[1] + 1, centers.shape[2]
    present = np.broadcast_to(truth.present.reshape(found.kept.shape)[:, :1], centers.shape[:3])
    drop = (DROPS[truth.kind] * truth.radius).reshape(found.kept.shape)
    known, track = present.copy(), centers.astype(np.float64)
    known[:, given:] = found.kept[:, 1:]
    track[:, given:] = found.centroid[:, 1:]
    track[:, given:, :, 1] -= drop[:, 1:]
    size = np.array(truth.coverage.shape[:1:-1])
    ours = find_meetings(track, known, truth.radius, size)
    true = find_meetings(centers, present, truth.radius, size, clearly=CLEARLY)

    def around(values: np.ndarray, frames: Sequence[int]) -> np.ndarray:
        """[frames, b, t, m]: the values each number of frames later; beyond the ends, those at the ends."""
        most = max(map(abs, frames))
        padded = np.pad(values, ((0, 0), (most, most), (0, 0)), "edge")
        return np.stack([padded[:, most + n : most + n + values.shape[1]] for n in frames])

    seen = known @ ours.members.T == ours.members.sum(1)
    events, tracked = true.begin & true.alone, around(seen, [-2, -1, 0]).all(0)
    own, is_wall = ours.begin & ours.alone, np.arange(len(ours.members)) < 4 * k
    measurable = np.isfinite(ours.speed)
    kept_speed = measurable & (ours.speed >= KEPT_SPEED[0]) & (ours.speed <= KEPT_SPEED[1])

    def share(of: np.ndarray, among: np.ndarray) -> Tally:
        counts = ((x & among)[:, given - 1 : -1].sum(-1, dtype=np.float64) for x in (of, among))
        return Tally(*map(torch.from_numpy, counts))

    return {
        "bounces": share(ours.bounce, own & is_wall),
        "collisions": share(ours.bounce, own & ~is_wall),
        "elastic": share(kept_speed, measurable),
        "on_time": share(around(ours.bounce, [-1, 0, 1]).any(0), events & tracked),
        "lost_before": share(~tracked, events),
    }


def ghost_area(radius: float) -> float:
    """The smallest ghost, in pixels, where discs have this radius."""
    return GHOST_AREA * np.pi * radius**2


def find_shapes(frames: np.ndarray, radius: float) -> FoundShapes:
    """Find the largest area of each color in each frame.

    A pixel has the color of the palette nearest to it when mixed with the background, if that is at least half of it.

    Args:
        frames: [n, h, w, 3] float32 in [0, 255].
        radius: of a disc, in pixels.
    """
    n, h, w, _ = frames.shape
    colors = len(PALETTE)
    axes = PALETTE - BACKGROUND
    squares = (axes**2).sum(1)[:, None]
    projection = axes @ (frames - BACKGROUND).reshape(-1, 3).T  # [colors, pixels]
    share = (projection / squares).clip(0, 1)
    nearest = (share * (share * squares - 2 * projection)).argmin(0)
    share = np.take_along_axis(share, nearest[None], 0)[0]
    half = share >= 0.5
    color = np.where(half, nearest, -1).reshape(n, h, w)

    # Of each pixel that has a color: its index, and the number of its area.
    pixel = np.flatnonzero(half)
    _, first, member, area = np.unique(
        label_areas(color).ravel()[pixel], return_index=True, return_inverse=True, return_counts=True
    )
    slot = pixel[first] // (h * w) * colors + nearest[pixel[first]]  # which frame and color an area is of
    largest = np.full(n * colors, -1)
    by_area = np.argsort(area, kind="stable")
    largest[slot[by_area]] = by_area  # of several areas the last one, the largest, stays
    further = (area >= ghost_area(radius)) & (largest[slot] != np.arange(len(area)))

    def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Of each area the mean over its pixels; NaN without any weight."""
        with np.errstate(invalid="ignore"):
            return np.bincount(member, weights * values) / np.bincount(member, weights)

    y, x = pixel // w % h + 0.5, pixel % w + 0.5
    centroid = np.stack([mean(x, share[pixel]), mean(y, share[pixel])], axis=-1)
    difference = frames.reshape(-1, 3)[pixel] - PALETTE[nearest[pixel]]
    error = mean(np.sqrt((difference**2).mean(-1)), inner_pixels(color).ravel()[pixel].astype(np.float64))

    taken = np.flatnonzero(largest >= 0)
    chosen = largest[taken]

    def table(values: np.ndarray) -> np.ndarray:
        """[n, colors, ...] of values [number of chosen areas, ...]."""
        out = np.zeros((n * colors, *values.shape[1:]), values.dtype)
        out[taken] = values
        return out.reshape(n, colors, *values.shape[1:])

    areas = np.full(n * h * w, -1)
    areas[pixel] = member
    kind = nearest_kind(areas.reshape(n, h, w), chosen, taken // colors, centroid[chosen], area[chosen], radius)
    return FoundShapes(
        area=table(area[chosen]),
        centroid=table(centroid[chosen]),
        kind=table(kind),
        color_error=table(error[chosen]),
        others=np.bincount(slot[further], minlength=n * colors).reshape(n, colors),
    )


def label_areas(color: np.ndarray) -> np.ndarray:
    """Label connected areas of one color; pixels are connected by their sides.

    Args:
        color: [n, h, w] int; negative: no object.
    Returns:
        [n, h, w] int: equal for two pixels that have a color if and only if they are connected.
    """
    continues = np.zeros(color.shape, bool)
    continues[:, :, 1:] = color[:, :, 1:] == color[:, :, :-1]
    run = np.cumsum(~continues).reshape(color.shape) - 1  # pixels of one color beside each other
    touching = (color[:, 1:] == color[:, :-1]) & (color[:, 1:] >= 0)
    below, above = run[:, 1:][touching], run[:, :-1][touching]
    # Each pair once: two runs touch in all pixels that they share.
    first = np.diff(below, prepend=-1) | np.diff(above, prepend=-1) != 0
    below, above = below[first], above[first]
    label = np.arange(run.max(initial=0) + 1)
    while True:
        new = label.copy()
        np.minimum.at(new, below, label[above])
        np.minimum.at(new, above, label[below])
        new = new[new]
        if np.array_equal(new, label):
            return label[run]
        label = new


def inner_pixels(color: np.ndarray) -> np.ndarray:
    """Whether all eight neighbors of a pixel have its color: [n, h, w] bool, false at the frame's edges."""
    inside = np.zeros(color.shape, bool)
    middle = color[:, 1:-1, 1:-1]
    h, w = color.shape[1:]
    neighbors = (color[:, y : h - 2 + y, x : w - 2 + x] for y in range(3) for x in range(3))
    inside[:, 1:-1, 1:-1] = np.logical_and.reduce([neighbor == middle for neighbor in neighbors])
    return inside


def nearest_kind(
    areas: np.ndarray, chosen: np.ndarray, frame: np.ndarray, centroid: np.ndarray, area: np.ndarray, radius: float
) -> np.ndarray:
    """The kind whose outline fits an area best.

    Args:
        areas: [n, h, w] int: which area a pixel belongs to.
        chosen, frame: [m] int: areas, and their frames.
        centroid, area: [m, xy] and [m] of them, in pixels.
        radius: of a disc, in pixels.
    Returns:
        [m] int: of `KINDS`.
    """
    # Around the centroid, the outlines of all areas up to the largest that counts as kept.
    reach = int(np.ceil(2 * radius)) + 1
    padded = np.pad(areas, ((0, 0), (reach, reach), (reach, reach)), constant_values=-2)
    corner = np.floor(centroid).astype(np.int64)
    steps = np.arange(2 * reach + 1)
    x, y = corner[:, :1] + steps, corner[:, 1:] + steps  # in the padded array
    patch = padded[frame[:, None, None], y[:, :, None], x[:, None, :]]
    own, visible = patch == chosen[:, None, None], patch != -2
    offset_x = (x - reach + 0.5 - centroid[:, :1])[:, None, :].astype(np.float32)
    offset_y = (y - reach + 0.5 - centroid[:, 1:])[:, :, None].astype(np.float32)
    overlap = []
    for kind in range(len(KINDS)):
        outline = coverage_of_area(offset_x, offset_y, kind, area[:, None, None].astype(np.float32)) * visible
        common = (outline * own).sum((1, 2))
        overlap.append(common / (outline.sum((1, 2)) + area - common))
    return np.argmax(overlap, axis=0)


def check_shapes(source: ShapesSource) -> None:
    """Refuse shapes that are too small to be audited.

    Raises:
        ValueError: they are; says what size is enough.
    """
    radius = source.radius * source.scale
    if radius < SMALLEST_RADIUS:
        raise ValueError(
            f"kinds of shapes of radius {radius:.3g} pixels cannot be told apart; a dataset.image_size that is "
            f"{SMALLEST_RADIUS / radius:.3g} times as large is enough"
        )


def true_shapes(source: ShapesSource, clips: Sequence[Clip], first: int) -> VisibleShapes:
    """The shapes in all frames of clips from number `first` on, clip by clip."""
    steps = np.arange(first, len(clips[0].frames))
    videos = np.repeat([clip.video for clip in clips], len(steps))
    return source.shapes(videos, np.concatenate([clip.start + steps for clip in clips]))


class ObjectAudit(Measure):
    """The audit of the shapes of all subjects, and a picture of the best and the worst clips.

    Records: `<measure> <subject>` -> [clips, horizon, 2], total and count of `Tally`, added up over samples; `rank`
    -> [clips, 2] of the first prediction, smaller for better ones.
    """

    name, part = "objects", "objects"

    def __init__(self, source: ShapesSource) -> None:
        """An audit of clips of this source.

        Raises:
            ValueError: as `check_shapes`.
        """
        check_shapes(source)
        self._source = source

    def measure(self, batch: ClipBatch) -> Records:
        # From the last given frame on: the way to the first predicted one starts there.
        context, clips = batch.given.shape[1], batch.clips
        truth = true_shapes(self._source, clips, context - 1)
        videos, starts = (
            np.array(numbers)[:, None] for numbers in zip(*((c.video, c.start) for c in clips), strict=True)
        )
        centers = self._source.centers(videos, starts + np.arange(len(clips[0].frames)))
        records: Records = {}
        for subject, samples in batch.futures.items():
            if subject == "nearest_clip":
                continue  # its objects are those of another video
            of_samples = []
            for frames in samples.unbind(1):
                found = match_shapes(torch.cat([batch.given[:, -1:], frames], 1), truth)
                tallies = {
                    name: Tally(tally.total[:, 1:], tally.count[:, 1:])
                    for name, tally in audit_objects(found, truth).items()
                }
                of_samples.append(tallies | audit_bounces(found, truth, centers))
            for measure in of_samples[0]:
                tallies = [torch.stack([found[measure].total, found[measure].count], -1) for found in of_samples]
                records[f"{measure} {subject}"] = torch.stack(tallies).sum(0)
            if subject == "prediction":
                whole, position = (of_samples[0][measure] for measure in ("whole", "position"))
                error = position.total.sum(1) / position.count.sum(1)
                records["rank"] = torch.stack([-whole.total.sum(1), error.nan_to_num(torch.inf)], dim=1)
        return records

    def results(self, records: Records, counts: Tensor | None) -> dict[str, MetricValues]:
        tallies: dict[str, dict[str, Tally]] = defaultdict(dict)
        for name, values in records.items():
            if name != "rank":
                measure, subject = name.split(" ")
                tallies[measure][subject] = Tally(*values.unbind(-1))
        return {measure: summarize(subjects, counts, pooled=measure in EVENTS) for measure, subjects in tallies.items()}

    def pictures(self, records: Records, clips: Callable[[Sequence[int]], ClipBatch]) -> dict[str, Image.Image]:
        """The best clips, then the worst: those with fewer whole frames, or with a larger position error."""
        ranks = [tuple(rank) for rank in records["rank"].tolist()]
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        best = order[:CLIPS_SHOWN]
        shown = best + order[max(CLIPS_SHOWN, len(order) - CLIPS_SHOWN) :]
        batch, rows = clips(shown), []
        predicted = batch.futures["prediction"][:, 0]
        for number, clip, video in zip(shown, batch.clips, torch.cat([batch.given, predicted], 1), strict=True):
            whole, error = ranks[number]
            name = f"{clip.name}: whole in {-whole:.0f} of {predicted.shape[1]} frames, {error:.1f} pixels of 64 off"
            rows.append((name, clip_strips(to_video(clip.frames), to_video(video), batch.given.shape[1])))
        title = f"Objects of predicted clips: the best {len(best)}, then the worst {len(shown) - len(best)}"
        return {"objects.png": contact_sheet(rows, title)}
