"""What people look at: contact sheets, GIFs and MP4s in which context is framed green and prediction red."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GREEN, RED, GREY = (46, 204, 113), (231, 76, 60), (150, 150, 150)
PAPER, INK = (255, 255, 255), (40, 40, 40)
BORDER = 3
LABEL_HEIGHT = 16
SMALLEST_SIDE = 96
# How long a GIF rests before it begins again.
LAST_FRAME_MS = 1000
# White around a tile of an animation, above and below, left and right.
TILE_MARGINS = (4, 6)
# Of a sheet of reconstructions: around it, for the rows' names, between blocks, and above them.
SHEET_MARGIN, SHEET_LABEL_WIDTH, SHEET_GAP, SHEET_HEAD = 12, 104, 10, LABEL_HEIGHT + 14


@dataclass(frozen=True)
class Strip:
    """One row of a picture: a video with a label.

    Attributes:
        label: such as "truth" or "prediction".
        video: [n, h, w, 3] uint8.
        context: the first so many frames are framed green.
        rest: the colour of the other frames' border.
    """

    label: str
    video: np.ndarray
    context: int
    rest: tuple[int, int, int]


def clip_strips(truth: np.ndarray, prediction: np.ndarray, context: int) -> list[Strip]:
    """The two rows of a clip: what happened, and what was predicted from the same context."""
    return [Strip("truth", truth, context, GREY), Strip("prediction", prediction, context, RED)]


def enlargement(side: int) -> int:
    """How many times as large frames of this width are shown."""
    return max(1, round(SMALLEST_SIDE / side))


def framed(strip: Strip, scale: int) -> np.ndarray:
    """Every frame enlarged by `scale` (nearest neighbour) with its border: [n, h', w', 3] uint8."""
    n, h, w, _ = strip.video.shape
    enlarged = strip.video.repeat(scale, axis=1).repeat(scale, axis=2)
    out = np.empty((n, h * scale + 2 * BORDER, w * scale + 2 * BORDER, 3), np.uint8)
    out[: strip.context] = GREEN
    out[strip.context :] = strip.rest
    out[:, BORDER:-BORDER, BORDER:-BORDER] = enlarged
    return out


def contact_sheet(clips: Sequence[tuple[str, Sequence[Strip]]], title: str, max_columns: int = 16) -> Image.Image:
    """All clips on one page: a row a strip, a column a frame; of longer clips a regular choice of frames.

    Args:
        clips: (name, strips) of each.
        title: what the page shows.
        max_columns: frames shown at most, first and last always among them.
    """
    length = len(clips[0][1][0].video)
    columns = np.unique(np.linspace(0, length - 1, min(max_columns, length)).round().astype(int))
    context = clips[0][1][0].context
    scale = 1 if clips[0][1][0].video.shape[1] >= SMALLEST_SIDE else 2 if clips[0][1][0].video.shape[1] >= 48 else 3
    sample = framed(clips[0][1][0], scale)
    cell_h, cell_w = sample.shape[1] + 2, sample.shape[2] + 2
    margin, label_w, gap = 12, 84, 10
    strips = len(clips[0][1])
    block = LABEL_HEIGHT + strips * cell_h + gap
    head = 2 * LABEL_HEIGHT + 20
    page = Image.new(
        "RGB", (2 * margin + label_w + len(columns) * cell_w, 2 * margin + head + block * len(clips)), PAPER
    )
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin), title, fill=INK, font=_font(14))
    _legend(draw, margin, margin + LABEL_HEIGHT + 4)
    for i, column in enumerate(columns):
        text = f"t={column + 1}" if column < context else f"+{column + 1 - context}"
        draw.text((margin + label_w + i * cell_w + 4, margin + head - 12), text, fill=INK, font=_font(10))
    for number, (name, rows) in enumerate(clips):
        top = margin + head + number * block
        draw.text((margin, top + 2), name, fill=GREY, font=_font(10))
        for row, strip in enumerate(rows):
            y = top + LABEL_HEIGHT + row * cell_h
            draw.text((margin, y + cell_h // 2 - 7), strip.label, fill=INK, font=_font(12))
            cells = framed(Strip(strip.label, strip.video[columns], int((columns < context).sum()), strip.rest), scale)
            for i, cell in enumerate(cells):
                page.paste(Image.fromarray(cell), (margin + label_w + i * cell_w, y))
    return page


def reconstruction_sheet(truth: Tensor, reconstructed: Tensor, title: str, columns: int = 8) -> Image.Image:
    """Images, what an autoencoder made of them, and four times the difference, below each other.

    Args:
        truth, reconstructed: [n, 3, h, w] in [-1, 1].
        title: what the page shows.
        columns: images beside each other; more go below.
    """
    # In [-1, 1], 0 of a difference is black.
    difference = 4 * (reconstructed - truth).abs() - 1
    rows = {"image": truth, "reconstruction": reconstructed, "4 x difference": difference}
    pixels = {
        name: rearrange(images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8), "n c h w -> n h w c").numpy()
        for name, images in rows.items()
    }
    n, h, w, _ = pixels["image"].shape
    scale = enlargement(w)
    cell_h, cell_w, margin, label_w = h * scale + 2, w * scale + 2, SHEET_MARGIN, SHEET_LABEL_WIDTH
    blocks = -(-n // columns)
    head = SHEET_HEAD
    block = len(rows) * cell_h + SHEET_GAP
    page = Image.new(
        "RGB", (2 * margin + label_w + min(n, columns) * cell_w, 2 * margin + head + blocks * block), PAPER
    )
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin), title, fill=INK, font=_font(14))
    for number in range(n):
        x = margin + label_w + number % columns * cell_w
        top = margin + head + number // columns * block
        for row, images in enumerate(pixels.values()):
            cell = images[number].repeat(scale, axis=0).repeat(scale, axis=1)
            page.paste(Image.fromarray(cell), (x, top + row * cell_h))
    for number in range(blocks):
        for row, name in enumerate(pixels):
            y = margin + head + number * block + row * cell_h + cell_h // 2 - 7
            draw.text((margin, y), name, fill=INK, font=_font(12))
    return page


def animation(clips: Sequence[tuple[str, Sequence[Strip]]], columns: int = 4) -> np.ndarray:
    """Clips playing side by side, each strip labelled: [n, h, w, 3] uint8."""
    side = clips[0][1][0].video.shape[1]
    scale = enlargement(side)
    tiles = []
    for _, strips in clips:
        parts = []
        for strip in strips:
            frames = framed(strip, scale)
            label = Image.new("RGB", (frames.shape[2], LABEL_HEIGHT), PAPER)
            ImageDraw.Draw(label).text((2, 2), strip.label, fill=INK, font=_font(11))
            parts.append(
                np.concatenate([np.broadcast_to(np.asarray(label), (len(frames), *np.asarray(label).shape)), frames], 1)
            )
        tile = np.concatenate(parts, axis=2)
        above, beside = TILE_MARGINS
        tiles.append(np.pad(tile, ((0, 0), (above, above), (beside, beside), (0, 0)), constant_values=255))
    while len(tiles) % min(columns, len(tiles)):
        tiles.append(np.full_like(tiles[0], 255))
    width = min(columns, len(tiles))
    return np.concatenate([np.concatenate(tiles[i : i + width], axis=2) for i in range(0, len(tiles), width)], axis=1)


def save_gif(path: Path, video: np.ndarray, fps: float) -> None:
    """Write [n, h, w, 3] uint8 as a GIF that loops, resting on its last frame."""
    # GIF counts time in hundredths of a second, and viewers slow down what is shorter than two of them.
    duration = max(20, round(100 / fps) * 10)
    durations = [duration] * (len(video) - 1) + [max(duration, LAST_FRAME_MS)]
    # One palette for all frames, made of a sample of all of them: frame-wise palettes flicker.
    palette = Image.fromarray(np.concatenate(list(video[:: max(1, len(video) // 8)]), axis=0)).quantize(256)
    frames = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in video]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False)


def save_mp4(path: Path, video: np.ndarray, fps: float) -> None:
    """Write [n, h, w, 3] uint8 as H.264 (MPEG-4 where that encoder is missing); odd sides get one more line."""
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16"} if codec == "libx264" else {"qscale": "2"}
        for frame in video:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    for colour, text in ((GREEN, "context, given"), (RED, "predicted"), (GREY, "what really happened")):
        draw.rectangle((x, y + 1, x + 11, y + 12), outline=colour, width=3)
        draw.text((x + 17, y), text, fill=INK, font=_font(11))
        x += 32 + int(draw.textlength(text, font=_font(11)))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def file_name(video_id: str) -> str:
    """A video's id as a file name that every file system takes."""
    return re.sub(r"[^\w.@-]+", "_", video_id).strip("._") or "video"
