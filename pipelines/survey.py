"""What videos a data set has, in words: how many, how long, how large, and what is skipped and why."""

import statistics
from collections.abc import Iterable

from stage1_autoencoder.videos.base import VideoSource
from stage1_autoencoder.videos.config import Split


def describe(sources: dict[Split, VideoSource]) -> list[str]:
    """Describe the splits: a line each, and a line a skipped video."""
    lines = []
    for split, source in sources.items():
        side = source.dataset.image_size
        lengths = [video.frames for video in source.videos]
        rates = _distinct(f"{video.fps:.4g}" for video in source.videos)
        sizes = _distinct(f"{video.size[0]}x{video.size[1]}" for video in source.videos if video.size)
        spread = f"{min(lengths)} to {max(lengths)}, median {statistics.median(lengths):g}" if lengths else "none"
        lines.append(
            f"{split}: {len(lengths)} videos, {sum(lengths)} frames ({spread}), {rates} fps, "
            f"{sizes or 'drawn'} -> {side}x{side}, skipped {len(source.skipped)}"
        )
        lines += [f"  skipped {video.id}: {video.reason}" for video in source.skipped]
    return lines


def _distinct(values: Iterable[str], most: int = 4) -> str:
    """The distinct values, most frequent first, as "160x120, 320x240 and 3 more"."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    ranked = sorted(counts, key=lambda value: -counts[value])
    return ", ".join(ranked[:most]) + (f" and {len(ranked) - most} more" if len(ranked) > most else "")
