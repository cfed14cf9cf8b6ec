"""Pictures: labelled sheets, GIFs and MP4s, in which given frames have a green border and predicted ones a red one."""

import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.runtime.files import replacing

GREEN, RED, GRAY = (46, 204, 113), (231, 76, 60), (150, 150, 150)
PAPER, INK = (255, 255, 255), (40, 40, 40)
BORDER = 3
LABEL_HEIGHT = 16
# About the width that frames have on sheets and in animations of several strips; the longer side of those on their own.
MIN_SIDE, LEGIBLE_SIDE = 96, 256
# At most, on contact sheets, on sheets of reconstructions, and in animations.
FRAMES_PER_ROW, IMAGES_PER_ROW, CLIPS_PER_ROW = 16, 8, 4
# On a sheet of reconstructions.
SHEET_IMAGES = 16
# How long a GIF rests on its last frame.
LAST_FRAME_MS = 1000
# GIF counts time in hundredths of a second, in 16 bits. Viewers slow down frames that are shorter than two of them.
GIF_MAX_FPS, GIF_MAX_MS = 50, 655_350
# Colors of a GIF, of 256, that are chosen by how often they occur.
FREQUENT_COLORS = 192
# Bytes of a file name without its suffix; file systems allow 255 in all.
NAME_BYTES = 200
# White around a clip of an animation: above and below, left and right.
TILE_MARGINS = (4, 6)
# Of a sheet: around it, for the labels of rows, below each block, and between cells.
SHEET_MARGIN, SHEET_LABEL_WIDTH, SHEET_GAP, CELL_GAP = 12, 104, 10, 2


@dataclass(frozen=True)
class Strip:
    """One video of a clip's picture.

    Attributes:
        label: such as "truth" or "prediction".
        video: [n, h, w, 3] uint8.
        context: number of frames at its beginning with a green border.
        rest: color of the other frames' border.
    """

    label: str
    video: np.ndarray
    context: int
    rest: tuple[int, int, int]


def to_video(frames: Tensor) -> np.ndarray:
    """Frames in [-1, 1] to 8-bit pixels.

    Args:
        frames: [..., 3, h, w] float; clamped to [-1, 1].
    Returns:
        [..., h, w, 3] uint8, rounded to the nearest.
    """
    pixels = frames.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return rearrange(pixels, "... c h w -> ... h w c").cpu().numpy()


def clip_strips(truth: np.ndarray, prediction: np.ndarray, context: int) -> list[Strip]:
    """The true frames of a clip, and those predicted from the same context."""
    return [Strip("truth", truth, context, GRAY), Strip("prediction", prediction, context, RED)]


def enlargement(side: int, wanted: int = MIN_SIDE) -> int:
    """The factor by which frames of this side are enlarged, to about the wanted one."""
    return max(1, round(wanted / side))


def framed(strip: Strip, scale: int) -> np.ndarray:
    """Every frame enlarged by `scale` (nearest neighbor), with its border: [n, h', w', 3] uint8."""
    n, h, w, _ = strip.video.shape
    out = np.empty((n, h * scale + 2 * BORDER, w * scale + 2 * BORDER, 3), np.uint8)
    out[: strip.context] = GREEN
    out[strip.context :] = strip.rest
    out[:, BORDER:-BORDER, BORDER:-BORDER] = _enlarged(strip.video, scale)
    return out


def contact_sheet(clips: Sequence[tuple[str, Sequence[Strip]]], title: str) -> Image.Image:
    """Clips on one page: one row per strip, one column per frame; long clips by evenly spaced frames.

    Args:
        clips: (name, strips) of each, all of equal length.
        title: what the page shows.
    """
    first = clips[0][1][0]
    length = len(first.video)
    columns = np.unique(np.linspace(0, length - 1, min(FRAMES_PER_ROW, length)).round().astype(int))
    given, scale = int((columns < first.context).sum()), enlargement(first.video.shape[2])
    blocks = [
        [(strip.label, framed(Strip(strip.label, strip.video[columns], given, strip.rest), scale)) for strip in strips]
        for _, strips in clips
    ]
    legend_top, head = SHEET_MARGIN + LABEL_HEIGHT + 4, 2 * LABEL_HEIGHT + 20
    page, draw, tops = _sheet(title, blocks, head=head, names=[name for name, _ in clips])
    x = SHEET_MARGIN
    for color, text in ((GREEN, "given"), (RED, "predicted"), (GRAY, "true")):
        draw.rectangle((x, legend_top + 1, x + 11, legend_top + 12), outline=color, width=3)
        draw.text((x + 17, legend_top), text, fill=INK, font=_font(11))
        x += 32 + int(draw.textlength(text, font=_font(11)))
    for number, column in enumerate(columns):
        text = f"t={column + 1}" if column < first.context else f"+{column + 1 - first.context}"
        left = SHEET_MARGIN + SHEET_LABEL_WIDTH + number * (blocks[0][0][1].shape[2] + CELL_GAP)
        draw.text((left + 4, tops[0] - LABEL_HEIGHT - 12), text, fill=INK, font=_font(10))
    return page


def save_reconstructions(
    path: Path, truth: Tensor, reconstructed: Tensor, title: str, names: tuple[str, str] = ("image", "reconstruction")
) -> None:
    """Write a sheet of images, what a network made of them, and four times the difference, below each other.

    Args:
        truth, reconstructed: [n, 3, h, w] in [-1, 1]; `SHEET_IMAGES` of them are shown, evenly spaced.
        title: what the page shows.
        names: of both rows.
    """
    # Frames of one video are neighbors: evenly spaced ones show most videos.
    shown = torch.linspace(0, len(truth) - 1, SHEET_IMAGES).round().long().unique()
    truth, reconstructed = (images[shown.to(images.device)].cpu() for images in (truth, reconstructed))
    # A difference of 0 is -1, which is black.
    difference = 4 * (reconstructed - truth).abs() - 1
    scale = enlargement(truth.shape[3])
    rows = zip((*names, "4 x difference"), (truth, reconstructed, difference), strict=True)
    cells = [(label, _enlarged(to_video(images), scale)) for label, images in rows]
    blocks = [
        [(label, images[start : start + IMAGES_PER_ROW]) for label, images in cells]
        for start in range(0, len(truth), IMAGES_PER_ROW)
    ]
    save_picture(path, _sheet(title, blocks, head=LABEL_HEIGHT + 14)[0])


def animation(clips: Sequence[tuple[str, Sequence[Strip]]]) -> np.ndarray:
    """Clips that play side by side, each strip with its label: [n, h, w, 3] uint8."""
    scale = enlargement(clips[0][1][0].video.shape[2])
    tiles = []
    for _, strips in clips:
        parts = []
        for strip in strips:
            frames = framed(strip, scale)
            label = Image.new("RGB", (frames.shape[2], LABEL_HEIGHT), PAPER)
            ImageDraw.Draw(label).text((2, 2), strip.label, fill=INK, font=_font(11))
            labels = np.broadcast_to(np.asarray(label), (len(frames), LABEL_HEIGHT, frames.shape[2], 3))
            parts.append(np.concatenate([labels, frames], axis=1))
        above, beside = TILE_MARGINS
        margins = ((0, 0), (above, above), (beside, beside), (0, 0))
        tiles.append(np.pad(np.concatenate(parts, axis=2), margins, constant_values=255))
    width = min(CLIPS_PER_ROW, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % width)
    return np.concatenate([np.concatenate(tiles[i : i + width], axis=2) for i in range(0, len(tiles), width)], axis=1)


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture in the format of its suffix, as a whole or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary)


def gif_frames(length: int, fps: float) -> tuple[np.ndarray, np.ndarray]:
    """How a GIF plays a video at its rate: without some frames if that is too fast for viewers.

    Returns:
        [n] int64 frames that are shown, with the first and the last; and [n] int64 milliseconds of each.
    """
    rate = min(fps, GIF_MAX_FPS)
    count = math.ceil((length - 1) * rate / fps) + 1
    frames = np.minimum(np.arange(count) * fps / rate + 1e-6, length - 1).astype(np.int64)
    # Rounded times, not rounded durations, whose errors would add up.
    durations = np.diff(np.round(np.arange(count + 1) * 100 / rate)) * 10
    durations[-1] = max(durations[-1], LAST_FRAME_MS)
    return frames, np.minimum(durations, GIF_MAX_MS).astype(np.int64)


def save_gif(path: Path, video: np.ndarray, fps: float, scale: int = 1) -> None:
    """Write [n, h, w, 3] uint8 as a GIF that loops and rests on its last frame, as a whole or not at all.

    Args:
        fps: frames per second; above 50 frames are left out, see `gif_frames`.
        scale: factor by which frames are enlarged (nearest neighbor).
    """
    numbers, durations = gif_frames(len(video), fps)
    # One palette for all frames: a palette per frame flickers.
    palette, nearest = _palette(video)
    h, w = video.shape[1:3]
    frames, shown, before = [], [], None
    for number, duration in zip(numbers.tolist(), durations.tolist(), strict=True):
        indices = nearest[_cells(video[number])].reshape(h, w)
        if np.array_equal(indices, before):
            shown[-1] = min(shown[-1] + duration, GIF_MAX_MS)
            continue
        before = indices
        frame = Image.fromarray(indices)
        frame.putpalette(palette.tobytes())
        frames.append(frame.resize((w * scale, h * scale), Image.Resampling.NEAREST))
        shown.append(duration)
    with replacing(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=shown, loop=0, optimize=False)


def save_mp4(path: Path, video: np.ndarray, fps: float, scale: int = 1) -> None:
    """Write [n, h, w, 3] uint8 as a whole or not at all; other arguments as of `writing_mp4`."""
    with writing_mp4(path, video.shape[1:3], fps, scale) as write:
        for frame in video:
            write(frame)


@contextmanager
def writing_mp4(
    path: Path, size: tuple[int, int], fps: float, scale: int = 1
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that writes one frame [h, w, 3] uint8 after the other as H.264 (MPEG-4 without that encoder).

    The file is there when the block ends, and is not on an error. Odd sides are padded by one line.

    Args:
        size: height and width of a frame.
        fps: frames per second.
        scale: factor by which frames are enlarged (nearest neighbor).
    """
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # 1001 is the denominator of NTSC rates. Slow rates are fractions of their period.
    rate = Fraction(fps).limit_denominator(1001) if fps >= 1 else 1 / Fraction(1 / fps).limit_denominator(1001)
    h, w = (side * scale for side in size)
    with replacing(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = h + h % 2, w + w % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"} if codec == "libx264" else {"qscale": "2"}

        def write(frame: np.ndarray) -> None:
            whole = np.pad(_enlarged(frame[None], scale)[0], ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(whole), format="rgb24")):
                container.mux(packet)

        yield write
        for packet in stream.encode():
            container.mux(packet)


def file_name(name: str) -> str:
    """A name, such as a video's id, as a file name that every file system accepts. Different names may become one."""
    safe = re.sub(r"[^\w.@-]+", "_", unicodedata.normalize("NFC", name)).encode()[:NAME_BYTES].decode(errors="ignore")
    return safe.strip("._") or "video"


def file_names(names: Sequence[str], taken: Iterable[str] = (), endings: Sequence[str] = ("",)) -> list[str]:
    """Names as file names that differ, also where upper and lower case are the same: by `_2`, `_3` and so on.

    Args:
        taken: file names that are not to be used.
        endings: each name is used with all of these after it.
    """
    used, found = {_folded(name) for name in taken}, []
    for name in names:
        stem = file_name(name)
        for candidate in itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2))):
            wanted = {_folded(candidate + ending) for ending in endings}
            if not wanted & used:
                break
        used |= wanted
        found.append(candidate)
    return found


def _folded(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _cells(frames: np.ndarray) -> np.ndarray:
    """[n] int32: for each pixel of [..., 3] uint8 the cell of its color, of 7 bits per channel."""
    red, green, blue = (frames.reshape(-1, 3) >> 1).T.astype(np.int32)
    return red << 14 | green << 7 | blue


def _palette(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 256 colors for all frames.

    Most of them are chosen by how often colors occur in the video. The others are, one by one, the color farthest from
    those before: so the colors of a single frame are there, too.

    Returns:
        [k, 3] uint8 colors; and [2^21] uint8: of each cell (see `_cells`), which color is nearest.
    """
    counts, color_of = np.zeros(2**21, np.int64), np.zeros((2**21, 3), np.uint8)
    for frame in video:
        cells = _cells(frame)
        found, times = np.unique(cells, return_counts=True)
        counts[found] += times
        color_of[cells] = frame.reshape(-1, 3)
    occupied = counts.nonzero()[0]
    palette = colors = color_of[occupied]
    nearest_color = member = np.arange(len(colors))
    if len(colors) > 256:
        # 6 bits per channel: the fewer colors are, the faster the search.
        _, first, member = np.unique(_cells(colors >> 1), return_index=True, return_inverse=True)
        counts, colors = np.bincount(member, counts[occupied]).astype(np.int64), colors[first]
        # A picture in which every color occurs, in the proportions of the video, and which is small.
        sample = np.repeat(colors, 1 + counts * 2**16 // counts.sum(), axis=0)
        frequent = Image.fromarray(sample[None]).quantize(FREQUENT_COLORS).getpalette()
        palette = np.unique(np.reshape(frequent, (-1, 3))[:FREQUENT_COLORS], axis=0).astype(np.uint8)
        nearest_color, distances = _nearest(colors, palette)
        while len(palette) < 256:
            farthest = colors[distances.argmax()]
            to_it = np.square(colors.astype(np.int32) - farthest).sum(1)
            nearest_color[to_it < distances] = len(palette)
            palette, distances = np.concatenate([palette, farthest[None]]), np.minimum(distances, to_it)
    nearest = np.zeros(2**21, np.uint8)
    nearest[occupied] = nearest_color[member]
    return palette, nearest


def _nearest(colors: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each color [n, 3] uint8 the nearest one in a palette [k, 3] uint8, and the squared distance to it."""
    squares, found = (palette.astype(np.float32) ** 2).sum(1), []
    for part in np.array_split(colors.astype(np.float32), 1 + len(colors) // 2**14):
        distances = squares - 2 * part @ palette.T.astype(np.float32)
        found.append((distances.argmin(1), distances.min(1) + (part**2).sum(1)))
    indices, distances = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return indices, distances


def _sheet(
    title: str,
    blocks: Sequence[Sequence[tuple[str, np.ndarray]]],
    *,
    head: int,
    names: Sequence[str] | None = None,
) -> tuple[Image.Image, ImageDraw.ImageDraw, list[int]]:
    """A page with blocks below each other.

    Args:
        blocks: of each the rows: label, cells [n, h, w, 3] uint8; the first block has most cells per row.
        head: height of title and what else is drawn above the blocks.
        names: of the blocks, written above each; None: no names.
    Returns:
        The page, what to draw on it with, and the y of each block's first row.
    """
    n, h, w, _ = blocks[0][0][1].shape
    cell_h, cell_w = h + CELL_GAP, w + CELL_GAP
    name_height = 0 if names is None else LABEL_HEIGHT
    block_height = name_height + len(blocks[0]) * cell_h + SHEET_GAP
    width = 2 * SHEET_MARGIN + SHEET_LABEL_WIDTH + n * cell_w
    page = Image.new("RGB", (width, 2 * SHEET_MARGIN + head + block_height * len(blocks)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((SHEET_MARGIN, SHEET_MARGIN), title, fill=INK, font=_font(14))
    tops = [SHEET_MARGIN + head + number * block_height + name_height for number in range(len(blocks))]
    for name, top in zip(names or (), tops, strict=False):
        draw.text((SHEET_MARGIN, top - LABEL_HEIGHT + 2), name, fill=GRAY, font=_font(10))
    for rows, top in zip(blocks, tops, strict=True):
        for row, (label, cells) in enumerate(rows):
            y = top + row * cell_h
            draw.text((SHEET_MARGIN, y + cell_h // 2 - 7), label, fill=INK, font=_font(12))
            for number, cell in enumerate(cells):
                page.paste(Image.fromarray(cell), (SHEET_MARGIN + SHEET_LABEL_WIDTH + number * cell_w, y))
    return page, draw, tops


def _enlarged(video: np.ndarray, scale: int) -> np.ndarray:
    """[n, h, w, 3] to [n, h scale, w scale, 3], nearest neighbor."""
    return video.repeat(scale, axis=1).repeat(scale, axis=2)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
