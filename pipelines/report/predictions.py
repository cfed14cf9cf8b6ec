"""Predicted clips that play: truth, prediction and difference, given frames in green and predicted ones in red."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.prediction.pictures import file_name
from pipelines.prediction.samples import Samples
from pipelines.report.embedded_pictures import encode_all, fitting_divisor, fitting_frames, read_clip, sheet, shrunk
from pipelines.report.run_files import Missing, Run

MAX_CLIPS = 6
# Samples of a clip that are shown beside the first one.
MAX_OTHERS = 3
# Bytes of all pictures; in the page they take a third more.
BUDGET = 7_500_000
DIFFERENCE_GAIN = 2


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip of the page: name, and [n, h, w, 3] uint8 videos by title."""

    name: str
    videos: dict[str, np.ndarray]


def predictions_section(run: Run) -> dict[str, Any]:
    """A regular choice of the sampled clips, and what the player needs."""
    samples = run.read(Samples)
    if samples is None:
        raise Missing(f"No clip is predicted yet: `{run.command('sample')}` predicts some.")
    chosen = np.unique(np.linspace(0, len(samples.clips) - 1, min(MAX_CLIPS, len(samples.clips))).round().astype(int))
    length, side = samples.context + samples.horizon, run.config.dataset.image_size
    kept = fitting_frames(length, side)
    clips, problems = [], []
    for name in (samples.clips[place] for place in chosen):
        try:
            strips = read_clip(run.path / "samples" / f"{file_name(name)}.gif", side, length)
        except ValueError as error:
            problems.append(str(error))
        else:
            clips.append(_clip(name, [shrunk(strip[kept]) for strip in strips[: 2 + MAX_OTHERS]]))
    pictures = _fitting_pictures(clips)
    if len(pictures) < len(clips):
        problems.append(f"{len(clips) - len(pictures)} clip(s) are left out: they would make the page too large")
    flow = run.checkpoints["flow"]
    return {
        "samples": samples,
        "gain": DIFFERENCE_GAIN,
        "problems": problems,
        "clips": list(zip(clips, pictures, strict=False)),
        "frames": kept.tolist(),
        "all_frames": len(kept) == length,
        "given": int((kept < samples.context).sum()),
        "divisor": fitting_divisor(side),
        "side": side // fitting_divisor(side),
        "fps": 10.0 if flow is None else flow.state.get("fps", 10.0),
    }


def _clip(name: str, strips: list[np.ndarray]) -> Clip:
    truth, predicted, *others = strips
    # int16: uint8 would wrap around.
    apart = DIFFERENCE_GAIN * np.abs(truth.astype(np.int16) - predicted.astype(np.int16))
    videos = {
        "truth": truth,
        "prediction": predicted,
        f"{DIFFERENCE_GAIN} x difference": apart.clip(0, 255).astype(np.uint8),
    }
    return Clip(name, videos | {f"sample {number}": video for number, video in enumerate(others, start=2)})


def _fitting_pictures(clips: list[Clip]) -> list[str]:
    """The sheets of as many of the first clips as fit into the budget."""
    for count in range(len(clips), 0, -1):
        with suppress(ValueError):
            return encode_all([sheet(list(clip.videos.values())) for clip in clips[:count]], BUDGET)
    return []
