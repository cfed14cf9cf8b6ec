"""Predicted clips that play: truth, prediction and difference, given frames in green and predicted ones in red."""

import base64
import io
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from pipelines.prediction.pictures import BORDER, LABEL_HEIGHT, TILE_MARGINS, enlargement, gif_frames
from pipelines.prediction.samples import Samples
from pipelines.report.run_files import Missing, Run

MAX_CLIPS = 6
# Samples of a clip that are shown beside the first one.
MAX_OTHERS = 3
DIFFERENCE_GAIN = 2
# Pixels. WebP's own limit is 16383; phones have difficulties below it.
MAX_SHEET_WIDTH = 12_000
# Bytes of one picture; in the page it takes a third more.
PICTURE_BUDGET = 1_200_000
# Options of WebP, the best quality first; `quality` of a lossless picture is effort.
QUALITIES = ({"lossless": True, "quality": 60}, *({"quality": quality} for quality in (92, 80, 60, 35)))


def predictions_section(run: Run) -> dict[str, Any]:
    """A regular choice of the sampled clips, and what the player needs."""
    samples = run.read(Samples)
    if samples is None:
        raise Missing(f"No clip is predicted yet: `{run.command('sample')}` predicts some.")
    length, (height, width) = samples.context + samples.horizon, run.config.dataset.frame_size
    frames, clips, problems = _regular(length, MAX_SHEET_WIDTH // width), [], []
    shown = [(samples.clips[i], samples.files[i], samples.fps[i]) for i in _regular(len(samples.clips), MAX_CLIPS)]
    for name, stem, fps in shown:
        path = run.path / "samples" / f"{stem}.gif"
        try:
            videos = _with_difference(read_clip(path, (height, width), length, fps))
            sheet = np.concatenate([np.concatenate(list(video[frames]), axis=1) for video in videos.values()])
            clips.append({"name": name, "fps": fps, "titles": list(videos), "sheet": picture_url(sheet)})
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}; `{run.command('sample')}` writes the clips again")
    return {
        "samples": samples,
        "gain": DIFFERENCE_GAIN,
        "problems": problems,
        "clips": clips,
        "frames": frames.tolist(),
        "all_frames": len(frames) == length,
        "given": int((frames < samples.context).sum()),
        "height": height,
        "width": width,
        "fps": statistics.mode(fps for _, _, fps in shown),
    }


def _regular(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` things, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _with_difference(strips: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Title -> [n, h, w, 3] uint8, in the order in which they are shown."""
    truth, prediction, *others = strips[: 2 + MAX_OTHERS]
    # int16: uint8 would wrap around.
    difference = DIFFERENCE_GAIN * np.abs(truth.astype(np.int16) - prediction.astype(np.int16))
    videos = {
        "truth": truth,
        "prediction": prediction,
        f"{DIFFERENCE_GAIN} x difference": difference.clip(0, 255).astype(np.uint8),
    }
    return videos | {f"sample {number}": video for number, video in enumerate(others, start=2)}


def read_clip(path: Path, frame_size: tuple[int, int], length: int, fps: float) -> list[np.ndarray]:
    """The strips of a clip's GIF as `save_gif` wrote an `animation` of one clip.

    Of the pictures that `sample` writes, GIFs are nearest to the frames: 256 colors, but no blur between neighbors.

    Args:
        frame_size: (height, width) of the frames, before they were enlarged.
        length: frames of the clip.
        fps: its frames per second.
    Returns:
        Per strip (truth, prediction, further samples) [length, height, width, 3] uint8. Frames that the GIF leaves out
        are the ones before them.
    Raises:
        OSError, ValueError: no GIF, or none of strips of this size and length.
    """
    with Image.open(path) as image:
        shown = [(np.asarray(f.convert("RGB")), f.info.get("duration", 0)) for f in ImageSequence.Iterator(image)]
    frames = _with_repeats(shown, length, fps)
    (height, width), (above, beside) = frame_size, TILE_MARGINS
    scale = enlargement(width)
    cell_height, cell_width = height * scale + 2 * BORDER, width * scale + 2 * BORDER
    strips, rest = divmod(frames.shape[2] - 2 * beside, cell_width)
    if len(frames) != length or frames.shape[1] != 2 * above + LABEL_HEIGHT + cell_height or rest or strips < 2:
        raise ValueError(
            f"expected {length} frames of clips of {width}x{height} pixels, not {len(frames)} frames of "
            f"{frames.shape[2]}x{frames.shape[1]} pixels"
        )
    top, lefts = above + LABEL_HEIGHT + BORDER, [beside + BORDER + number * cell_width for number in range(strips)]
    return [frames[:, top : top + height * scale : scale, left : left + width * scale : scale] for left in lefts]


def _with_repeats(shown: list[tuple[np.ndarray, int]], length: int, fps: float) -> np.ndarray:
    """All frames of a video whose GIF shows equal neighbors as one frame, and leaves frames out if it is fast.

    Args:
        shown: pixels and milliseconds of each frame of the GIF.
    Returns:
        [length, h, w, 3], or the frames of the GIF if it does not play for as long as such a video.
    """
    frames, durations = np.stack([pixels for pixels, _ in shown]), np.array([duration for _, duration in shown])
    numbers, expected = gif_frames(length, fps)
    if durations.sum() != expected.sum():
        return frames
    # Of each frame: the one that is shown for it, and when that one begins.
    begin = (expected.cumsum() - expected)[numbers.searchsorted(np.arange(length), side="right") - 1]
    return frames[(durations.cumsum() - durations).searchsorted(begin, side="right") - 1]


def picture_url(picture: np.ndarray) -> str:
    """A picture [h, w, 3] uint8 as a `data:` URL of WebP, in the best quality that fits into `PICTURE_BUDGET`.

    Raises:
        ValueError: it does not fit in any quality.
    """
    for options in QUALITIES:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "WEBP", method=4, **options)
        if file.tell() <= PICTURE_BUDGET:
            return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
    raise ValueError(
        f"a picture of {picture.shape[1]}x{picture.shape[0]} pixels takes more than {PICTURE_BUDGET} bytes"
    )


def picture_file_url(path: Path) -> str:
    """A file's picture, as `picture_url`.

    Raises:
        OSError, ValueError: it cannot be read, or not be shown.
    """
    with Image.open(path) as image:
        return picture_url(np.asarray(image.convert("RGB")))
