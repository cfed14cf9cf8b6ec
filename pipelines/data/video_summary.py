"""The videos of a data set as text: number, lengths and sizes, warnings; and as a table in a file."""

import csv
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from latent_cache.sampling.draws import MIN_VIDEO_FRAMES
from pipelines.config import RiverConfig
from pipelines.runtime.files import replacing, size_text
from pipelines.runtime.progress import counted, duration
from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.display import AS_STORED, Placement
from stage1_autoencoder.videos.names import join_names
from stage1_autoencoder.videos.source import VideoSource, VideoTable

COLUMNS = ("split", "id", "frames", "fps", "width", "height", "fingerprint")


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
    return [*_describe(config, sources), *_warnings(config, sources)]


def _describe(config: RiverConfig, sources: Mapping[Split, VideoSource]) -> list[str]:
    # Each pass over `source.videos` creates them again: there may be too many for a list.
    lengths = {split: VideoTable.of(source.videos).frames for split, source in sources.items()}
    frames = np.concatenate(list(lengths.values()))
    skipped = sum(len(source.skipped) for source in sources.values())
    ignored, sizes, rates, seconds = Counter[str](), _sizes(sources), Counter[str](), 0.0
    for source in sources.values():
        ignored.update(source.passed_over)
        for video in source.videos:
            rates[f"{video.fps:.4g}"] += 1
            seconds += video.frames / video.fps
    others = join_names((f"{count} {kind}" for kind, count in ignored.most_common()), 8)
    native = [source.native_frames for source in sources.values()]
    of_native = "" if None in native or sum(native) == frames.sum() else f"of {sum(native)} "
    dataset, cache = config.dataset, config.cache
    stored = sum(int(those.sum()) * (len(cache.views) if split == "train" else 1) for split, those in lengths.items())
    shape = config.autoencoder.model.latent_shape(dataset.frame_size)
    latents = stored * math.prod(shape) * np.dtype(cache.dtype).itemsize
    return [
        f"found: {counted(len(frames) + skipped, 'video')}, {len(frames)} usable, {skipped} skipped"
        + (f"; other files, ignored: {others}" if ignored else ""),
        f"  used     {frames.sum()} {of_native}frames ({dataset.sampling_text}), {duration(seconds)}",
        f"  lengths  {_spread(frames)} frames",
        f"  sizes    {_most_common(Counter({_size_text(size): n for size, n in sizes.items()}))} -> "
        + _fitting(dataset, sizes),
        f"  fps      {_most_common(rates)}{', after frame_step' if dataset.frame_step > 1 else ''}",
        f"  store    {stored} latents of {'x'.join(map(str, shape))} {cache.dtype}, {size_text(latents)}",
        *(
            f"{split}: {counted(len(those), 'video')}, {those.sum()} frames ({_spread(those)}), "
            f"{len(sources[split].skipped)} skipped"
            for split, those in lengths.items()
        ),
    ]


def _warnings(config: RiverConfig, sources: Mapping[Split, VideoSource]) -> list[str]:
    """What the user may not expect of these videos under this configuration."""
    tables = {split: VideoTable.of(source.videos) for split, source in sources.items()}
    why = {"val": "", "test": ""} | {config.evaluation.split: ": `sample` and `evaluate` need one, or evaluation.split"}
    lines = [f"note: there is no {split} split{reason}" for split, reason in why.items() if split not in sources]
    if "train" in tables:
        lines += _too_short(tables["train"], MIN_VIDEO_FRAMES, "train", "the flow learns nothing from them")
    evaluation = config.evaluation
    if evaluation.split in tables and config.dataset.source != "shapes":  # which are simulated for longer
        needed = evaluation.context + evaluation.horizon
        why = f"evaluation.context {evaluation.context} + horizon {evaluation.horizon}: not sampled or measured"
        lines += _too_short(tables[evaluation.split], needed, evaluation.split, why)
    sizes, frame_size = _sizes(sources), config.dataset.frame_size
    small = sum(count for size, count in sizes.items() if size and _place(config.dataset, size).enlarges)
    if small:
        lines.append(f"note: {counted(small, 'video')} smaller than {_size_text(frame_size[::-1])}, enlarged")
    return lines + _leaks(tables)


def _sizes(sources: Mapping[Split, VideoSource]) -> Counter[tuple[int, int] | None]:
    """Number of videos of each (width, height); None: drawn."""
    return Counter(video.size for source in sources.values() for video in source.videos)


def _size_text(size: tuple[int, int] | None) -> str:
    return f"{size[0]}x{size[1]}" if size else "drawn"


def _place(dataset: DatasetConfig, size: tuple[int, int]) -> Placement:
    return AS_STORED.place(*size, dataset.frame_size, dataset.fit)


def _fitting(dataset: DatasetConfig, sizes: Counter[tuple[int, int] | None]) -> str:
    """What is done with the pictures, and how much of them is used on average."""
    result = _size_text(dataset.frame_size[::-1])
    if dataset.fit != "crop":
        return {"pad": f"between black bars in {result}", "stretch": f"stretched to {result}"}[dataset.fit]
    shares = [(math.prod(_place(dataset, size).region[2:]) / math.prod(size), n) for size, n in sizes.items() if size]
    used = sum(share * n for share, n in shares) / sum(n for _, n in shares) if shares else 1
    share = f" ({used:.0%} of the picture)".replace("%", " %") if used < 0.995 else ""
    part = "square" if isinstance(dataset.image_size, int) else "part"
    return f"center {part}{share}, resized to {result}"


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


def _most_common(counts: Counter[str]) -> str:
    """Values, most frequent first: "160x120 (3), 320x240 (1) and 3 more"; a single one without its number."""
    if len(counts) == 1:
        return next(iter(counts))
    return join_names((f"{value} ({count})" for value, count in counts.most_common()), 4)
