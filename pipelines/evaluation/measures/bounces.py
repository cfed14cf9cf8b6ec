"""What shapes do where they meet a wall or each other: do they bounce, and do they keep their speed?

This needs no truth: wherever a shape is, it must not go through a wall. So it can be said of the farthest prediction.
"""

from dataclasses import dataclass

import numpy as np

# Pixels per frame. Places are known to a fifth of a pixel; what moves less cannot be told from what stands still.
APPROACH, REBOUND = 0.5, 0.25
# Shapes that would pass each other at more than this share of the distance of contact only graze each other.
GRAZING = 0.9


@dataclass(frozen=True, eq=False)
class Meetings:
    """Of b clips and t frames: which of k shapes are about to touch a wall or each other, and what follows.

    The m meetings that are possible are those of each shape with the left, right, upper and lower wall, shape by shape,
    then those of all pairs of shapes.

    Attributes:
        begin: [b, t, m] bool, in the last frame before they touch.
        bounce: [b, t, m] bool: they move apart after that. Not so if one of them is lost.
        speed: [b, t, m] afterwards, as a share of that before; of a pair the root of the sum of squares, which
            elastic collisions keep. Without a bounce anything.
        members: [m, k] 1 for the shapes of a meeting, else 0.
    """

    begin: np.ndarray
    alone: np.ndarray
    bounce: np.ndarray
    speed: np.ndarray
    members: np.ndarray


def find_meetings(
    centers: np.ndarray, known: np.ndarray, radius: float, world: np.ndarray, clearly: float = 1.0
) -> Meetings:
    """Find the meetings of shapes.

    Shapes meet if they touch within the next frame when they go on as in the last two. Then one or two frames pass, and
    the next two tell where they go. Meetings are left out if another one changes the way of these shapes meanwhile, if
    they are too slow or too grazing, and where frames are missing before or after.

    Args:
        centers: [b, t, k, xy] pixels; any where they are not known.
        known: [b, t, k] bool.
        radius: at which shapes touch walls and each other, in pixels.
        world: [xy] width and height, in pixels.
        clearly: above 1, only meetings that are by this factor faster and less grazing than necessary.
    """
    centers = np.where(known[..., None], centers, np.nan)  # so that nothing can be said of what is not known
    t, k = centers.shape[1:3]
    frame, (first, second) = np.arange(t), np.triu_indices(k, 1)
    members = np.concatenate([np.eye(k).repeat(4, 0), np.eye(k)[first] + np.eye(k)[second]])

    def later(values: np.ndarray, frames: int) -> np.ndarray:
        """The values this number of frames later; beyond the ends, those at the ends."""
        return values[:, (frame + frames).clip(0, t - 1)]

    def relative(vectors: np.ndarray) -> np.ndarray:
        """[b, t, m, xy] of [b, t, k, xy]: of a shape to a wall, or of a second shape to a first."""
        return np.concatenate([vectors.repeat(4, 2), vectors[:, :, second] - vectors[:, :, first]], 2)

    before = (centers - later(centers, -2)) / frame.clip(1, 2)[:, None, None]
    after = (later(centers, 3) - later(centers, 1)) / 2

    # Distance to contact now, frames until contact, and the direction in which a bounce pushes.
    pushes = np.broadcast_to(np.tile([[1.0, 0], [-1, 0], [0, 1], [0, -1]], (k, 1)), (*centers.shape[:2], 4 * k, 2))
    velocity = relative(before)
    way, passing = velocity[:, :, 4 * k :], centers[:, :, second] - centers[:, :, first]
    gap = (pushes * centers.repeat(4, 2)).sum(-1) + np.tile(world[[0, 0, 1, 1]] * [0, 1, 0, 1], k) - radius
    with np.errstate(divide="ignore", invalid="ignore"):
        wait = gap / -(pushes * velocity[:, :, : 4 * k]).sum(-1)
        square, along = (way**2).sum(-1), (way * passing).sum(-1)
        closest = (passing**2).sum(-1) - along**2 / square
        depth = (2 * radius) ** 2 - closest
        until = (-along - np.sqrt(square * depth)) / square
        contact = (passing + until[..., None] * way) / (2 * radius)
        direct = np.concatenate(
            [np.ones(gap.shape, bool), (along < 0) & (closest <= (GRAZING / clearly * 2 * radius) ** 2)], 2
        )
    gap = np.concatenate([gap, np.linalg.norm(passing, axis=-1) - 2 * radius], 2)
    wait = np.concatenate([wait, until], 2)
    pushes = np.concatenate([pushes, contact], 2)

    steps = np.linalg.norm(relative(centers - later(centers, -1)), axis=-1)
    # A contact shortens the step in which it is, so the longer one counts.
    close = gap <= np.fmax(steps, later(steps, 1)) / 2 + 0.5
    meets = direct & (wait <= 1) & ((pushes * velocity).sum(-1) <= -APPROACH * clearly)
    # The frame that is closest to the contact may be the next one.
    delayed = later(gap, 1) < gap
    judged = (frame >= 1)[:, None] & (frame[:, None] + 3 + delayed < t)
    begin = meets & ~(later(meets, -1) & (frame > 0)[:, None]) & judged

    rebound = np.where(delayed[..., None], later(relative(after), 1), relative(after))
    bounce = begin & ((pushes * rebound).sum(-1) >= REBOUND)

    # What else these shapes touch meanwhile. A second wall changes nothing along the first one, but the speed.
    shared, wall = (members @ members.T > 0) & ~np.eye(len(members), dtype=bool), np.arange(len(members)) < 4 * k
    disturbed = close @ (shared & ~(wall & wall[:, None])) > 0
    alone = ~np.any([later(disturbed, frames) for frames in range(-1, 4)], 0)
    straight = ~np.any([later(close @ shared > 0, frames) for frames in range(-2, 5)], 0)

    def energy(velocity: np.ndarray) -> np.ndarray:
        squares = (velocity**2).sum(-1)
        return np.concatenate([squares.repeat(4, 2), squares[:, :, first] + squares[:, :, second]], 2)

    with np.errstate(divide="ignore", invalid="ignore"):
        speed = np.sqrt(np.where(delayed, later(energy(after), 1), energy(after)) / energy(before))
    speed[~(bounce & straight & (frame >= 2)[:, None])] = np.nan
    return Meetings(begin, alone, bounce, speed, members)
