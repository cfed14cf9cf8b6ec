"""Pictures inside the page: as good as the room for them allows."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

# WebP's own limit is 16383; phones don't like such pictures.
LONGEST_SIDE = 12_000
# Lossless first.
QUALITIES = (None, 92, 80, 60, 35)
# Pictures of one run are about equally large; no later one makes up for so much.
HOPELESS = 1.5


def data_url(picture: bytes) -> str:
    """A WebP picture as the address of itself."""
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}"


def encode_all(pictures: Sequence[np.ndarray], budget: int) -> list[bytes] | None:
    """WebP files of pictures [h, w, 3], in the best quality in which all fit.

    Args:
        budget: bytes for all of them together.
    Returns:
        None where they don't fit in any quality.
    """
    for quality in QUALITIES:
        encoded = []
        for picture in pictures:
            encoded.append(_webp(picture, quality))
            size = sum(map(len, encoded))
            # The next quality is tried as soon as this one cannot fit: large pictures take seconds each.
            if size > budget or size / len(encoded) * len(pictures) > HOPELESS * budget:
                break
        else:
            return encoded
    return None


def sheet(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Videos [n, h, w, 3] as one picture: a row a video, a column a frame."""
    return np.concatenate([np.concatenate(list(video), axis=1) for video in rows], axis=0)


def fitting_frames(length: int, side: int) -> tuple[np.ndarray, int]:
    """Which frames of a video go onto a sheet, and by which divisor of their side they are made smaller."""
    divisor = next(
        divisor for divisor in range(1, side + 1) if side % divisor == 0 and (side // divisor <= 256 or divisor == side)
    )
    shown = min(length, LONGEST_SIDE // (side // divisor))
    return np.unique(np.linspace(0, length - 1, shown).round().astype(int)), divisor


def smaller(video: np.ndarray, divisor: int) -> np.ndarray:
    """[n, h, w, 3] uint8 to [n, h / divisor, w / divisor, 3], by means."""
    n, h, w, _ = video.shape
    blocks = video.reshape(n, h // divisor, divisor, w // divisor, divisor, 3).astype(np.float32)
    return blocks.mean((2, 4)).round().astype(np.uint8)


def _webp(picture: np.ndarray, quality: int | None) -> bytes:
    file = io.BytesIO()
    options = {"lossless": True, "quality": 60} if quality is None else {"quality": quality}
    Image.fromarray(picture).save(file, "WEBP", method=4, **options)
    return file.getvalue()
