"""Predicted clips, playing: truth, prediction and difference, given frames in green and predicted ones in red."""

import numpy as np

from pipelines.prediction.pictures import file_name
from pipelines.report.embedding import data_url, encode_all, fitting_frames, sheet, smaller
from pipelines.report.forms import Samples
from pipelines.report.inputs import Run
from pipelines.report.markup import Html, code, details, el, join, note
from pipelines.report.recorded_pictures import read_clip

MOST_CLIPS = 6
# Samples of a clip that are shown beside the first one.
MOST_OTHERS = 3
# Bytes of all pictures; in the page they take a third more.
BUDGET = 7_500_000
DIFFERENCE = 2
SPEEDS = (0.25, 0.5, 1, 2)


def predictions_section(run: Run) -> Html:
    """Controls and the clips; raises `Problem` where `samples/` is damaged."""
    samples = run.samples
    if samples is None:
        return note("missing", "No clip has been predicted yet: ", code(run.command("sample")), " predicts some.")
    chosen = np.unique(np.linspace(0, len(samples.clips) - 1, min(MOST_CLIPS, len(samples.clips))).round().astype(int))
    length = samples.context + samples.horizon
    kept, divisor = fitting_frames(length, run.image_size)
    found, problems = [], []
    for name in (samples.clips[place] for place in chosen):
        try:
            strips = read_clip(run.path / "samples" / f"{file_name(name)}.gif", run.image_size, length)
        except ValueError as error:
            problems.append(note("problem", error))
            continue
        truth, predicted, *others = (smaller(strip[kept], divisor) for strip in strips[: 2 + MOST_OTHERS])
        found.append((name, [truth, predicted, difference(truth, predicted), *others]))
    clips, left_out = _clips(found, samples, kept)
    if not clips:
        return join([problems, note("missing", code(run.command("sample")), " writes the clips anew.")])
    return join(
        [
            el("p", _introduction(samples, len(clips), len(kept) < length, divisor), class_="lead"),
            problems,
            note("problem", f"{left_out} clip(s) are left out: they would make the page too large") if left_out else "",
            _controls(samples, kept, _frames_a_second(run)),
            el("div", clips, class_="clips"),
        ]
    )


def difference(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """How far apart two videos [n, h, w, 3] are, enlarged: black where they agree."""
    apart = np.abs(truth.astype(np.int16) - predicted.astype(np.int16))
    return (DIFFERENCE * apart).clip(0, 255).astype(np.uint8)


def _clips(found: list[tuple[str, list[np.ndarray]]], samples: Samples, kept: np.ndarray) -> tuple[list[Html], int]:
    """The clips that fit into the page, and how many do not."""
    for count in range(len(found), 0, -1):
        encoded = encode_all([sheet(rows) for _, rows in found[:count]], BUDGET)
        if encoded is not None:
            pairs = zip(found, encoded, strict=False)
            return [_clip(*clip, picture, samples, kept) for clip, picture in pairs], len(found) - count
    return [], len(found)


def _clip(name: str, rows: list[np.ndarray], picture: bytes, samples: Samples, kept: np.ndarray) -> Html:
    titles = ["truth", "prediction", f"{DIFFERENCE} x difference"]
    titles += [f"sample {number}" for number in range(2, 2 + len(rows) - len(titles))]
    side = rows[0].shape[1]
    given = int((kept < samples.context).sum())
    views = [
        el(
            "figure",
            el("canvas", width=side, height=side, data_row=row, role="img", aria_label=f"{title} of {name}"),
            el("figcaption", title),
        )
        for row, title in enumerate(titles)
    ]
    words = f"{name}: all frames, a row each of {', '.join(titles)}; the first {given} are given, the others predicted"
    image = el("img", src=data_url(picture), alt=words, width=side * len(kept), height=side * len(rows), class_="sheet")
    bar = el(
        "svg",
        el("rect", class_="given", x=0, y=0, width=given, height=1),
        el("rect", class_="predicted", x=given, y=0, width=len(kept) - given, height=1),
        viewBox=f"0 0 {len(kept)} 1", preserveAspectRatio="none", width=side * len(kept), height=6, aria_hidden="true",
    )  # fmt: skip
    strip = el("div", bar, image, class_="scroll strip", tabindex=0, role="region", aria_label=f"all frames of {name}")
    return el(
        "article",
        el("h3", name),
        el("div", views, class_="views"),
        details("all frames", strip, open_=True),
        class_="clip", data_side=side, data_given=given,
    )  # fmt: skip


def _controls(samples: Samples, kept: np.ndarray, fps: float) -> Html:
    labels = [
        f"frame {frame + 1}, given" if frame < samples.context else f"predicted frame {frame + 1 - samples.context}"
        for frame in kept.tolist()
    ]
    speeds = [el("option", f"{speed:g} x", value=f"{speed:g}", selected=speed == 1) for speed in SPEEDS]
    return el(
        "div",
        el("button", "Play", type="button", class_="play"),
        el("input", type="range", min=0, max=len(kept) - 1, value=0, step=1, class_="frame", aria_label="frame"),
        el("output", labels[0], class_="where"),
        el("label", "speed ", el("select", speeds, class_="speed")),
        class_="player", data_fps=f"{fps:g}", data_labels="|".join(labels),
    )  # fmt: skip


def _introduction(samples: Samples, clips: int, some_frames: bool, divisor: int) -> Html:
    words = [
        f"{clips} clips; ",
        el("span", f"{samples.context} frames given", class_="chip given"),
        " ",
        el("span", f"{samples.horizon} predicted", class_="chip predicted"),
        f" and the difference to what really happened, {DIFFERENCE} times enlarged in brightness.",
        " Predicted frames are refined." if samples.refine else "",
        " Of long clips a regular choice of frames is shown." if some_frames else "",
        f" Frames are shown at a {divisor}th of their size." if divisor > 1 else "",
    ]
    return join(words)


def _frames_a_second(run: Run) -> float:
    flow = run.checkpoint("flow")
    fps = None if flow is None else flow.state.get("fps")
    return float(fps) if isinstance(fps, int | float) and 0 < fps < 1000 else 10.0
