"""The audit of silhouettes: true ones are without fault, and each kind of damage shows in its own measure."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.evaluation.measures.measure import ClipBatch
from pipelines.evaluation.measures.silhouette_audit import SilhouetteAudit
from pipelines.prediction.clips import Clip
from stage1_autoencoder.videos.source import Recording

CLIPS, CONTEXT, HORIZON = 6, 4, 10
# Of three persons: head, coat and trousers.
CLOTHES = torch.tensor([[[220, 180, 160], [200, 40, 40], [30, 30, 60]], [[90, 60, 50], [240, 240, 230], [40, 90, 200]],
                        [[230, 200, 120], [20, 20, 20], [150, 110, 60]]])  # fmt: skip
FAULTLESS = {"kept": 1.0, "speed": 1.0, "identity": 1.0}


def walk(clothes: Tensor, step: float = 3.0, width: int = 6, background: Tensor | None = None) -> Tensor:
    """A person who crosses a wall: [frames, 3, 48, 64] in [-1, 1].

    Args:
        clothes: [3, rgb].
        step: pixels per frame.
        background: [frames, 3, 48, 64].
    """
    frames = torch.full((CONTEXT + HORIZON, 3, 48, 64), 110.0) if background is None else background.clone()
    for number, frame in enumerate(frames):
        left = round(8 + step * number)
        for part, (top, bottom) in enumerate([(12, 18), (18, 28), (28, 40)]):
            frame[:, top:bottom, left : left + width] = clothes[part][:, None, None]
    return frames / 127.5 - 1


def clips_of(videos: list[Tensor], persons: list[str | None]) -> list[Clip]:
    return [
        Clip(f"clip {i}", i, Recording(f"{i}", person), 25.0, video)
        for i, (video, person) in enumerate(zip(videos, persons, strict=True))
    ]


def audit(videos: list[Tensor], persons: list[str | None], prediction: Tensor) -> dict:
    """Audit a prediction [clips, horizon, 3, h, w] in batches, beside copying."""
    measure, parts = SilhouetteAudit(), []
    clips = clips_of(videos, persons)
    for batch in (slice(0, 4), slice(4, None)):
        frames = torch.stack(videos[batch])
        given, truth = frames[:, :CONTEXT], frames[:, CONTEXT:]
        futures = {"prediction": prediction[batch][:, None], "copy_last": given[:, -1:].expand_as(truth)[:, None]}
        parts.append(measure.measure(ClipBatch(clips[batch], given, truth, None, futures, {})))
    records = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return measure.results(records, None)


PERSONS = [str(i % 3) for i in range(CLIPS)]


def walkers(change: int = 0, **options) -> list[Tensor]:
    return [walk(CLOTHES[(i + change) % 3], **options) for i in range(CLIPS)]


def true_frames() -> Tensor:
    return torch.stack(walkers())


def blurred() -> Tensor:
    """As of an autoencoder: smoother, with some noise."""
    frames = true_frames()
    smooth = torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(frames)
    return 0.7 * frames + 0.3 * smooth + 0.02 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))


def vanishing() -> Tensor:
    frames = true_frames()
    frames[:, CONTEXT + 5 :] = 110 / 127.5 - 1
    return frames


def transparent() -> Tensor:
    return 0.5 * true_frames() + 0.5 * (110 / 127.5 - 1)


def uniform() -> Tensor:
    """Like a person of one color."""
    return torch.stack([walk(CLOTHES[i % 3].float().mean(0).expand(3, 3)) for i in range(CLIPS)])


@pytest.mark.parametrize(
    ("draw", "expected", "chance"),
    [
        (true_frames, {}, 0),
        (blurred, {}, 0),
        (lambda: torch.stack(walkers(change=1)), {"identity": 0.0}, 0),
        (lambda: torch.stack(walkers(step=0.0)), {"speed": 0.0}, 0),
        (lambda: torch.stack(walkers(step=1.5)), {"speed": 0.5}, 0),
        (vanishing, {"kept": 0.5}, 0),
        (lambda: torch.stack(walkers(width=16)), {"kept": 0.0}, 0),
        (transparent, {}, 0.5),
        (uniform, {}, 0.5),
    ],
    ids=["truth", "reconstruction", "another person", "standing", "slow", "vanishing", "wide", "faded", "one color"],
)
def test_each_damage_shows_in_its_own_measure(draw, expected, chance):
    results = audit(walkers(), PERSONS, draw()[:, CONTEXT:])
    found = {measure: values.prediction for measure, values in results.items()}
    if chance:  # who looks like nobody looks like anybody
        assert found.pop("identity") <= chance
    # The first step, from the true frame to the prediction, may be any.
    found["speed"] = float(np.mean(results["speed"].per_frame["prediction"][1:4]))
    assert found == pytest.approx({key: (FAULTLESS | expected)[key] for key in found}, abs=0.06)
    copied = {measure: values.copy_last for measure, values in results.items()}
    assert copied == pytest.approx({"kept": 1.0, "speed": 0.0, "identity": 1.0})


def test_without_persons_there_is_no_identity():
    for persons in ([None] * CLIPS, ["one"] * CLIPS):
        assert audit(walkers(), persons, true_frames()[:, CONTEXT:]).keys() == {"kept", "speed"}


def test_clips_with_a_moving_background_are_left_out():
    generator = torch.Generator().manual_seed(0)
    shaken = [255 * torch.rand(CONTEXT + HORIZON, 3, 48, 64, generator=generator) for _ in range(CLIPS)]
    videos = [*walkers()[:3], *(walk(CLOTHES[0], background=shaken[i]) for i in range(3))]
    prediction = torch.stack(videos)[:, CONTEXT:]
    prediction[3:] = 0
    assert audit(videos, PERSONS, prediction)["kept"].prediction == 1
    still = walk(CLOTHES[0], step=0.0)
    with pytest.raises(ValueError, match=r"moves in 3 of 6 .* 1"):
        audit([still, *videos[1:]], PERSONS, true_frames()[:, CONTEXT:])
