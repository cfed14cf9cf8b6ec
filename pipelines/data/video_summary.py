"""The videos of a data set as text: number, lengths and sizes, what is skipped, warnings; and as a table in a file."""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from latent_cache.sampling.draws import MIN_VIDEO_FRAMES
from pipelines.config import RiverConfig
from pipelines.runtime.files import replacing
from pipelines.runtime.progress import duration
from stage1_autoencoder.videos.config import Split
from stage1_autoencoder.videos.names import join_names
from stage1_autoencoder.videos.source import SkippedVideo, VideoInfo, VideoSource, VideoTable

COLUMNS = ("split", "id", "frames", "fps", "width", "height", "fingerprint")
_MAX_SKIPPED = 50  # listed per split


def write_video_list(path: Path, sources: Mapping[Split, VideoSource]) -> int:
    """Write a tab-separated table of all usable videos, one row per video, in the order of the store.

    `fingerprint` changes with a video's content. Width and height are empty where frames are drawn.

    Returns:
        the number of videos.
    Raises:
        OSError: it cannot be written; an older list is unchanged.
    """
    count = 0
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, dialect="excel-tab", lineterminator="\n")
        rows.writerow(COLUMNS)
        for split, source in sources.items():
            for video in source.videos:
                size = video.size or ("", "")
                rows.writerow((split, video.id, video.frames, f"{video.fps:g}", *size, video.fingerprint))
                count += 1
    return count


def summarize(config: RiverConfig, sources: Mapping[Split, VideoSource]) -> list[str]:
    """Lines about all videos together, each split, and what the user may not expect.

    Args:
        sources: of the splits that have videos, as `open_splits` gives them.
    """
    return [*_describe_all(config, sources), *_describe_splits(sources), *_warnings(config, sources)]


def _describe_all(config: RiverConfig, sources: Mapping[Split, VideoSource]) -> list[str]:
    def videos() -> Iterator[VideoInfo]:  # each pass creates them again: there may be too many for a list
        return (video for source in sources.values() for video in source.videos)

    dataset = config.dataset
    frames = np.concatenate([VideoTable.of(source.videos).frames for source in sources.values()])
    skipped = sum(len(source.skipped) for source in sources.values())
    ignored: Counter[str] = Counter()
    for source in sources.values():
        ignored.update(source.passed_over)
    others = join_names((f"{count} {kind}" for kind, count in ignored.most_common()), 8)
    native = [source.native_frames for source in sources.values()]
    of_native = "" if None in native or sum(native) == frames.sum() else f"of {sum(native)} "
    seconds = sum(video.frames / video.fps for video in videos())
    sizes = _distinct(_sizes(videos()), counts=True) or "drawn"
    rates = _distinct(_rates(videos()), counts=True)
    return [
        f"found: {_count(len(frames) + skipped, 'video')}, {len(frames)} usable, {skipped} skipped"
        + (f"; other files, ignored: {others}" if ignored else ""),
        f"  used     {frames.sum()} {of_native}frames (dataset.frame_step {dataset.frame_step}), {duration(seconds)}",
        f"  lengths  {_spread(frames)} frames",
        f"  sizes    {sizes} -> center square, resized to {dataset.image_size}x{dataset.image_size}",
        f"  fps      {rates}{', after frame_step' if dataset.frame_step > 1 else ''}",
    ]


def _describe_splits(sources: Mapping[Split, VideoSource]) -> list[str]:
    lines = []
    for split, source in sources.items():
        side, lengths = source.dataset.image_size, VideoTable.of(source.videos).frames
        lines.append(
            f"{split}: {len(lengths)} videos, {lengths.sum()} frames ({_spread(lengths)}), "
            f"{_distinct(_rates(source.videos))} fps, {_distinct(_sizes(source.videos)) or 'drawn'} -> {side}x{side}, "
            f"skipped {len(source.skipped)}"
        )
        lines += _skipped(source.skipped)
    return lines


def _skipped(skipped: Iterable[SkippedVideo]) -> list[str]:
    lines = [f"  skipped {video.id}: {video.reason}" for video in skipped]
    if len(lines) > _MAX_SKIPPED:
        lines[_MAX_SKIPPED:] = [f"  skipped {len(lines) - _MAX_SKIPPED} more"]
    return lines


def _warnings(config: RiverConfig, sources: Mapping[Split, VideoSource]) -> list[str]:
    """What the user may not expect of these videos under this configuration."""
    tables = {split: VideoTable.of(source.videos) for split, source in sources.items()}
    lines = [f"note: there is no {split} split" for split in ("val", "test") if split not in sources]
    if "train" in tables:
        lines += _too_short(tables["train"], MIN_VIDEO_FRAMES, "train", "the flow learns nothing from them")
    evaluation = config.evaluation
    if evaluation.split in tables:
        needed = evaluation.context + evaluation.horizon
        why = f"evaluation.context {evaluation.context} + horizon {evaluation.horizon}: not sampled or measured"
        lines += _too_short(tables[evaluation.split], needed, evaluation.split, why)
    side = config.dataset.image_size
    small = sum(video.size is not None and min(video.size) < side for table in tables.values() for video in table)
    if small:
        lines.append(f"note: {_count(small, 'video')} smaller than {side}x{side}, enlarged")
    return lines + _leaks(tables)


def _too_short(table: VideoTable, needed: int, split: str, why: str) -> list[str]:
    short = np.flatnonzero(table.frames < needed)
    if not len(short):
        return []
    names = join_names((table.ids[row] for row in short.tolist()), 3)
    return [f"note: {len(short)} of {len(table)} {split} videos have fewer than {needed} frames ({why}): {names}"]


def _leaks(tables: Mapping[Split, VideoTable]) -> list[str]:
    """Held-out videos that are also training videos."""
    train = tables.get("train", VideoTable())
    trained = dict(zip(train.fingerprints, train.ids, strict=True))
    lines = []
    for split in ("val", "test"):
        table = tables.get(split, VideoTable())
        pairs = [
            f"{name} is {trained[fingerprint]}"
            for name, fingerprint in zip(table.ids, table.fingerprints, strict=True)
            if fingerprint in trained
        ]
        if pairs:
            count = f"{len(pairs)} of {len(table)} {split} videos"
            lines.append(f"warning: {count} are also training videos, byte for byte: {join_names(pairs, 3)}")
    return lines


def _spread(lengths: np.ndarray) -> str:
    return f"{lengths.min()} to {lengths.max()}, median {np.median(lengths):g}" if len(lengths) else "none"


def _sizes(videos: Iterable[VideoInfo]) -> Iterator[str]:
    return (f"{video.size[0]}x{video.size[1]}" for video in videos if video.size)


def _rates(videos: Iterable[VideoInfo]) -> Iterator[str]:
    return (f"{video.fps:.4g}" for video in videos)


def _distinct(values: Iterable[str], limit: int = 4, counts: bool = False) -> str:
    """Distinct values, most frequent first: "160x120, 320x240 and 3 more"; with `counts`, the number of each."""
    ranked = Counter(values).most_common()
    show = counts and len(ranked) > 1
    return join_names((f"{value} ({count})" if show else value for value, count in ranked), limit)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
