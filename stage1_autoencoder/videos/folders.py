"""Video files and frame folders as a source (`source: videos`, and the base of KTH and CLEVRER)."""

import contextlib
import itertools
import math
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Self

import av
import numpy as np

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.display import Display
from stage1_autoencoder.videos.division import choose_fractions, split_training
from stage1_autoencoder.videos.image_folders import decode_folder, decode_webp, is_webp, list_frames
from stage1_autoencoder.videos.index import Indexed, examine_video, index_videos
from stage1_autoencoder.videos.listing import Listing, count_videos, find_videos
from stage1_autoencoder.videos.names import join_names
from stage1_autoencoder.videos.preprocessing import FramePreprocessor
from stage1_autoencoder.videos.source import (
    BrokenVideoError,
    DivisibleSource,
    Recording,
    SkippedVideo,
    UnreadableVideoError,
    VideoError,
    VideoInfo,
    VideoTable,
)
from stage1_autoencoder.videos.splits import SPLITS, skip_beside, split_folders
from stage1_autoencoder.videos.video_files import Keyframe, Probe, decode_video


class Cut(NamedTuple):
    """A part of a video with an id of its own: first and one-past-last frame, before resampling and `frame_step`."""

    id: str
    first: int
    stop: int


# Numbers of frames this much below the next whole number are that number.
ROUNDING = 1e-6

# Maps a video's id and number of frames to its cuts.
CutVideo = Callable[[str, int], Iterable[Cut | SkippedVideo]]


class Clip(NamedTuple):
    """A video or a cut of one: its path below the source's folder, first and one-past-last frame before `frame_step`.

    `probe` is that of the whole video.
    """

    info: VideoInfo
    name: str
    first: int
    stop: int
    probe: Probe


def frame_stride(dataset: DatasetConfig, fps: float) -> float:
    """Frames of a video of this rate from one used frame to the next: its frame k * stride, rounded down, is used.

    With `dataset.fps` that is the frame shown at the time of frame k, if frames are evenly spaced.
    """
    return dataset.frame_step if dataset.fps is None else dataset.frame_step * fps / dataset.fps


def make_clip(
    dataset: DatasetConfig, video_id: str, name: str, indexed: Indexed, cut: tuple[int, int] | None = None
) -> Clip:
    """Make a clip of a usable video.

    Args:
        name: path of the video below the source's folder.
        cut: first and one-past-last frame, inside the video and not empty; None for the whole video.
    """
    probe, fingerprint = indexed.probe, indexed.digest
    assert probe is not None, f"{name} is not usable: {indexed.reason}"
    assert fingerprint is not None, f"{name} has no digest"
    first, stop = cut or (0, probe.frames)
    assert 0 <= first < stop <= probe.frames, f"cut {cut} of the {probe.frames} frames of {name}"
    stride = frame_stride(dataset, probe.fps)
    info = VideoInfo(
        id=video_id,
        frames=math.ceil((stop - first - ROUNDING) / stride),
        fps=(probe.fps if dataset.fps is None else dataset.fps) / dataset.frame_step,
        fingerprint=fingerprint if cut is None else f"{indexed.cuts.get(stop, fingerprint)} {first}:{stop}",
        size=probe.display.size(probe.width, probe.height),
    )
    return Clip(info, name, first, stop, probe)


class FolderSource(DivisibleSource):
    """Videos in a folder, as files or as folders of frames."""

    def __init__(
        self,
        dataset: DatasetConfig,
        root: Path,
        clips: Iterable[Clip],
        skipped: Iterable[SkippedVideo] = (),
        passed_over: Mapping[str, int] | None = None,
    ) -> None:
        """Consume a stream of clips, one at a time; `skipped` is read after it."""
        self.dataset = dataset
        self.root = root
        self._names: list[str] = []
        self._pictures: list[tuple[int, int, Display]] = []  # size and display of the decoded frames
        ends, keyframes, per_video, rates = array("q"), array("q"), array("q"), array("d")
        shared: dict[tuple[int, int, Display], tuple[int, int, Display]] = {}  # most videos are alike

        def infos() -> Iterator[VideoInfo]:
            for clip in clips:
                self._names.append(clip.name)
                pictures = (clip.probe.width, clip.probe.height, clip.probe.display)
                self._pictures.append(shared.setdefault(pictures, pictures))
                ends.extend((clip.first, clip.stop))
                rates.append(clip.probe.fps)
                keyframes.extend(itertools.chain.from_iterable(clip.probe.keyframes))
                per_video.append(len(clip.probe.keyframes))
                yield clip.info

        self.videos = VideoTable(infos())
        self._ends = np.array(ends, np.int64).reshape(-1, 2)
        self._rates = np.array(rates, np.float64)
        # Video i has the keyframes of rows offsets[i] to offsets[i + 1].
        self._keyframes = np.array(keyframes, np.int64).reshape(-1, 2)
        self._keyframe_offsets = np.concatenate([[0], np.cumsum(np.array(per_video, np.int64))])
        self.skipped = list(skipped)
        self.passed_over = dict(passed_over or {})

    @property
    def native_frames(self) -> int:
        return int((self._ends[:, 1] - self._ends[:, 0]).sum())

    def select(self, rows: np.ndarray) -> Self:
        source = super().select(rows)
        source._names = [self._names[row] for row in rows.tolist()]
        source._pictures = [self._pictures[row] for row in rows.tolist()]
        source._ends, source._rates = self._ends[rows], self._rates[rows]
        starts, counts = self._keyframe_offsets[rows], np.diff(self._keyframe_offsets)[rows]
        source._keyframe_offsets = np.concatenate([[0], np.cumsum(counts)])
        within = np.arange(counts.sum()) - np.repeat(source._keyframe_offsets[:-1], counts)
        source._keyframes = self._keyframes[np.repeat(starts, counts) + within]
        return source

    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        start, stop = self.check_range(index, start, stop)
        if start == stop:
            return
        video, path, probe = self.videos[index], self.root / self._names[index], self.probe(index)
        wanted, stride = self.positions(index, start, stop), frame_stride(self.dataset, probe.fps)
        first, last, step = int(wanted[0]), int(wanted[-1]), int(stride) if stride == int(stride) else 1
        # How often each decoded frame is used: once, unless videos are resampled.
        uses = np.bincount((wanted - first) // step).tolist()
        if path.is_dir():
            decode = decode_folder
        elif is_webp(path):
            decode = decode_webp
        else:
            decode = partial(decode_video, probe=probe)
        preprocess = FramePreprocessor(self.dataset.frame_size, self.dataset.fit, display=probe.display)
        with contextlib.closing(decode(path, video.id, first, last + 1, step)) as frames:
            for times, frame in zip(uses, frames, strict=False):
                for _ in range(times):
                    try:
                        pixels = preprocess(frame)
                    except av.error.FFmpegError as error:  # such as a color space that FFmpeg cannot convert
                        raise BrokenVideoError(
                            video.id, f"its frames cannot be converted ({error.strerror})"
                        ) from error
                    yield pixels

    def positions(self, index: int, start: int, stop: int) -> np.ndarray:
        """Numbers [n] int64 in the file of frames `start` to `stop` (excluded) of a video."""
        stride = frame_stride(self.dataset, float(self._rates[index]))
        return int(self._ends[index, 0]) + np.floor(np.arange(start, stop) * stride + ROUNDING).astype(np.int64)

    def recording(self, index: int) -> Recording:
        """The file or frame folder, of which a video may be a cut."""
        return Recording(self._names[index])

    def restarts(self, index: int) -> np.ndarray:
        """The frames at or after the keyframes of the index."""
        keyframes = self._keyframes[self._keyframe_offsets[index] : self._keyframe_offsets[index + 1], 0]
        after = keyframes[keyframes > self._ends[index, 0]] - self._ends[index, 0]
        return np.ceil(after / frame_stride(self.dataset, self._rates[index]) - ROUNDING).astype(np.int64)

    def probe(self, index: int) -> Probe:
        """What decoding needs to know about a file; of a cut, the number of frames is its end."""
        width, height, display = self._pictures[index]
        keyframes = self._keyframes[self._keyframe_offsets[index] : self._keyframe_offsets[index + 1]].tolist()
        stop, chosen = int(self._ends[index, 1]), tuple(Keyframe(*pair) for pair in keyframes)
        return Probe(stop, float(self._rates[index]), width, height, chosen, display)


def open_folder(
    dataset: DatasetConfig, root: Path, remember: bool, stored: Mapping[str, Split]
) -> dict[Split, FolderSource]:
    """Index a folder of videos and divide it into splits; splits without videos are omitted.

    If `root` has a folder `train`, then `train`, `val` (or `validation`) and `test` are the splits. Without `val`,
    the fraction `dataset.splits.val` (0.1 unless set) of the training videos is taken for validation; without `test`,
    the fraction `dataset.splits.test` if it is set, and otherwise there is no test split. If `root` has no such
    folders, both fractions (0.1 each unless set) are taken of all videos. See `division`.

    Unusable videos are listed as `skipped` in the split of their folder, or in train, and there too what lies beside
    these folders.

    Args:
        remember: False writes nothing; see `index_videos`.
        stored: splits by id of videos that a store holds, which they keep.
    Raises:
        VideoError: no folder, no videos, a split folder without usable videos, no video left to train on.
    """
    if not root.is_dir():
        raise VideoError(f"{root}: no such folder; put the videos of {dataset.name!r} there, or set dataset.root")
    named = split_folders(root)
    folders = named or {"train": root}
    fractions = choose_fractions(dataset, has_folders=bool(named))
    listings = {}
    for split, folder in folders.items():
        listing = find_videos(folder)
        inside = "" if folder == root else f"{folder.relative_to(root)}/"
        listings[split] = replace(listing, folder=root, names=[inside + name for name in listing.names])
    skipped = [*listings["train"].skipped, *skip_beside(root, named, count_videos)]
    listings["train"] = replace(listings["train"], skipped=skipped)
    sources = index_listings(dataset, root, listings, remember)
    for split, source in sources.items():
        if not source.videos:
            reasons = join_names(f"{video.id} {video.reason}" for video in source.skipped)
            raise VideoError(f"{folders[split]}: none of its {len(listings[split])} videos can be used: {reasons}")
    return split_training(dataset, root, sources, fractions, stored, remember)


def open_divided(
    dataset: DatasetConfig,
    listing: Listing,
    split_of: Callable[[str], Split | None],
    remember: bool = True,
    cut: CutVideo | None = None,
    kind: type[FolderSource] = FolderSource,
) -> dict[Split, FolderSource]:
    """Divide the videos of a listing into splits by their ids, and index them; splits without videos are omitted.

    Args:
        split_of: maps an id to its split; None for a video that is not used.
        cut, kind: see `index_listings`.
    """
    rows: dict[Split, list[int]] = {split: [] for split in SPLITS}
    for row, video_id in enumerate(listing.ids):
        if (split := split_of(video_id)) is not None:
            rows[split].append(row)
    listings = {split: listing.select(rows[split]) for split in SPLITS}
    for split in ("val", "test"):  # what was skipped is counted once
        listings[split] = replace(listings[split], skipped=[], passed_over={})
    sources = index_listings(dataset, listing.folder, listings, remember, cut, kind)
    return {split: source for split, source in sources.items() if source.videos}


def index_listings(
    dataset: DatasetConfig,
    root: Path,
    listings: Mapping[Split, Listing],
    remember: bool = True,
    cut: CutVideo | None = None,
    kind: Callable[..., FolderSource] = FolderSource,
    stops: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> dict[Split, FolderSource]:
    """Index the videos of all splits as one, since one file in `root` stores the index.

    Args:
        listings: their names are relative to `root`.
        remember: see `index_videos`.
        cut: maps a video's id and number of frames to its cuts; without it, videos are used as a whole.
        kind: makes a source, as the class does.
        stops: by name, ends of cuts, whose fingerprints then do not change with what comes behind them in the file.
    """
    indexed = index_videos(root, [name for listing in listings.values() for name in listing.names], remember, stops)

    def clips(listing: Listing, skipped: list[SkippedVideo]) -> Iterator[Clip]:
        for video_id, name, entry in zip(listing.ids, listing.names, indexed, strict=False):
            if entry.probe is None:
                skipped.append(SkippedVideo(video_id, entry.reason or ""))
            elif cut is None:
                yield make_clip(dataset, video_id, name, entry)
            else:
                for part in cut(video_id, entry.probe.frames):
                    if isinstance(part, SkippedVideo):
                        skipped.append(part)
                    else:
                        yield make_clip(dataset, part.id, name, entry, (part.first, part.stop))

    sources = {}
    with contextlib.closing(indexed):
        for split, listing in listings.items():
            skipped = list(listing.skipped)
            sources[split] = kind(dataset, root, clips(listing, skipped), skipped, listing.passed_over)
    return sources


def open_single(dataset: DatasetConfig, path: Path) -> FolderSource:
    """Open one video file or folder of frames as a source of one video; nothing is stored.

    Raises:
        VideoError: no such file or folder.
        BrokenVideoError: it cannot be used.
    """
    if not path.exists():
        raise VideoError(f"{path}: no such video file or folder of frames")
    try:
        if path.is_dir() and not list_frames(path):
            raise VideoError(f"{path}: the folder contains no .png or .jpg frames")
    except OSError as error:
        raise UnreadableVideoError.of(str(path), error) from error
    indexed = examine_video(path, str(path))
    return FolderSource(dataset, path.parent, [make_clip(dataset, path.stem, path.name, indexed)])
