"""What videos a data set has, in words: how many, how long, how large, what of it is used, what is skipped and why."""

import csv
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from latent_cache.sampling.draws import MIN_VIDEO_FRAMES
from latent_cache.writing.disk import PARTIAL
from pipelines.config import RiverConfig
from pipelines.runtime.progress import duration
from stage1_autoencoder.videos.config import Split
from stage1_autoencoder.videos.source import SkippedVideo, VideoInfo, VideoSource, VideoTable
from stage1_autoencoder.videos.splits import join_names

COLUMNS = ("split", "id", "frames", "fps", "width", "height", "fingerprint")


def write_video_list(path: Path, sources: Mapping[Split, VideoSource]) -> int:
    """Write a table of all usable videos, tab-separated with a heading, a row a video, in the order of the store.

    The file is written aside and renamed: it is there whole or as it was before. `fingerprint` is what tells whether a
    video has changed; width and height are empty where frames are drawn.

    Returns:
        how many videos there are.
    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    count = 0
    try:
        with aside.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, dialect="excel-tab", lineterminator="\n")
            rows.writerow(COLUMNS)
            for split, source in sources.items():
                for video in source.videos:
                    size = video.size or ("", "")
                    rows.writerow((split, video.id, video.frames, f"{video.fps:g}", *size, video.fingerprint))
                    count += 1
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return count


_MOST_SKIPPED = 50  # that are named, of one split


def survey(config: RiverConfig, sources: Mapping[Split, VideoSource]) -> list[str]:
    """Describe all videos together, then each split, then what may surprise.

    Args:
        sources: of the splits that have videos, as `open_splits` gives them.
    """
    return [*_totals(config, sources), *describe(sources), *remarks(config, sources)]


def _totals(config: RiverConfig, sources: Mapping[Split, VideoSource]) -> list[str]:
    dataset = config.dataset
    videos = _all_videos(sources)
    frames = np.concatenate([VideoTable.of(source.videos).frames for source in sources.values()])
    skipped = sum(len(source.skipped) for source in sources.values())
    lines = [f"found: {_count(len(frames) + skipped, 'video')}, {len(frames)} usable, {skipped} skipped"]
    passed_over: Counter[str] = Counter()
    for source in sources.values():
        passed_over.update(source.passed_over)
    if passed_over:
        kinds = join_names((f"{count} {kind}" for kind, count in passed_over.most_common()), 8)
        lines[0] += f"; other files, passed over: {kinds}"
    there = [source.native_frames for source in sources.values()]
    of_all = "" if None in there or sum(there) == frames.sum() else f"of {sum(there)} "
    used = f"{frames.sum()} {of_all}frames"
    seconds = sum(video.frames / video.fps for video in videos())
    lines.append(f"  used     {used} (dataset.frame_step {dataset.frame_step}), {duration(seconds)}")
    lines.append(f"  lengths  {_spread(frames)} frames")
    crop = f"centred square, resized to {dataset.image_size}x{dataset.image_size}"
    lines.append(f"  sizes    {_sizes(videos(), counts=True) or 'drawn'} -> {crop}")
    rates = _distinct((f"{video.fps:.4g}" for video in videos()), counts=True)
    lines.append(f"  fps      {rates}{', after frame_step' if dataset.frame_step > 1 else ''}")
    return lines


def describe(sources: Mapping[Split, VideoSource]) -> list[str]:
    """Describe the splits: a line each, and a line a skipped video."""
    lines = []
    for split, source in sources.items():
        side = source.dataset.image_size
        lengths = VideoTable.of(source.videos).frames
        rates = _distinct(f"{video.fps:.4g}" for video in source.videos)
        spread = _spread(lengths) if len(lengths) else "none"
        lines.append(
            f"{split}: {len(lengths)} videos, {lengths.sum()} frames ({spread}), {rates} fps, "
            f"{_sizes(source.videos) or 'drawn'} -> {side}x{side}, skipped {len(source.skipped)}"
        )
        lines += _skipped(source.skipped)
    return lines


def remarks(config: RiverConfig, sources: Mapping[Split, VideoSource]) -> list[str]:
    """What the user may not expect of these videos under this configuration; nothing where all is ordinary."""
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
    names = join_names((table.ids[row] for row in short[:4].tolist()), 3)
    if len(short) > 3:
        names = f"{names.partition(' and ')[0]} and {len(short) - 3} more"
    return [f"note: {len(short)} of the {len(table)} {split} videos have fewer than {needed} frames ({why}): {names}"]


def _leaks(tables: Mapping[Split, VideoTable]) -> list[str]:
    """Videos of held-out splits that are trained on too."""
    if "train" not in tables:
        return []
    trained = dict(zip(tables["train"].fingerprints, tables["train"].ids, strict=True))
    lines = []
    for split in ("val", "test"):
        table = tables.get(split, VideoTable())
        pairs = [
            f"{name} is {trained[fingerprint]}"
            for name, fingerprint in zip(table.ids, table.fingerprints, strict=True)
            if fingerprint in trained
        ]
        if pairs:
            count = f"{len(pairs)} of the {len(table)} {split} videos"
            lines.append(f"warning: {count} are training videos too, to the byte: {join_names(pairs, 3)}")
    return lines


def _skipped(skipped: Iterable[SkippedVideo]) -> list[str]:
    lines = [f"  skipped {video.id}: {video.reason}" for video in skipped]
    if len(lines) > _MOST_SKIPPED:
        lines[_MOST_SKIPPED:] = [f"  skipped {len(lines) - _MOST_SKIPPED} more"]
    return lines


def _all_videos(sources: Mapping[Split, VideoSource]) -> Callable[[], Iterator[VideoInfo]]:
    """Each call goes through them once more: there may be too many for a list."""
    return lambda: (video for source in sources.values() for video in source.videos)


def _spread(lengths: np.ndarray) -> str:
    return f"{lengths.min()} to {lengths.max()}, median {np.median(lengths):g}"


def _sizes(videos: Iterable[VideoInfo], counts: bool = False) -> str:
    return _distinct((f"{video.size[0]}x{video.size[1]}" for video in videos if video.size), counts=counts)


def _distinct(values: Iterable[str], most: int = 4, counts: bool = False) -> str:
    """The distinct values, most frequent first, as "160x120, 320x240 and 3 more"; with their counts on request."""
    ranked = Counter(values).most_common()
    several = counts and len(ranked) > 1
    names = [f"{value} ({count})" if several else value for value, count in ranked[:most]]
    return ", ".join(names) + (f" and {len(ranked) - most} more" if len(ranked) > most else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
