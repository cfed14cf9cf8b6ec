"""The rule by which a study chooses a sampler."""

import math

from pipelines.runtime.results import StudyPoint

# dB that a setting with fewer evaluations may lose against the best score.
SCORE_MARGIN = 0.1
# Below this, distances and sharpness are those of sets without any variation.
SMALLEST = 1e-9


def score_points(points: list[StudyPoint]) -> list[StudyPoint]:
    """The points with their scores, in dB, so that one number decides between measures that disagree.

    PSNR alone prefers the mean of all possible futures. Against that, a doubled Fréchet distance costs 1 dB, and 10 %
    of the clips that are no longer whole cost 1 dB; where the shapes are not known, a halved or doubled sharpness (an
    energy: gradients differ by a factor of 1.4) costs 5 dB.
    """
    lowest = max(SMALLEST, min(point.frechet for point in points))

    def score(point: StudyPoint) -> float:
        blurred = abs(math.log2(max(SMALLEST, point.sharpness)))
        kept = -5 * blurred if point.whole is None else 10 * point.whole
        return point.psnr - math.log2(max(SMALLEST, point.frechet) / lowest) + kept

    return [point.model_copy(update={"score": score(point)}) for point in points]


def choose(points: list[StudyPoint]) -> int | None:
    """The index of the point with the fewest evaluations whose score is within `SCORE_MARGIN` of the best.

    Of several with as many evaluations, the best. Points of other seeds than the first one's only show the scatter.

    Args:
        points: with scores.
    Returns:
        None if no score is a number.
    """
    scores = {
        index: point.score
        for index, point in enumerate(points)
        if point.seed == points[0].seed and math.isfinite(point.score)
    }
    near = [index for index, score in scores.items() if score >= max(scores.values()) - SCORE_MARGIN]
    return min(near, key=lambda index: (points[index].nfe, -scores[index]), default=None)
