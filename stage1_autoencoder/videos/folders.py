"""A folder of video files and frame folders as a source, and how it falls into splits (`source: videos`)."""

import contextlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.index import Indexed, Listing, examine_video, find_videos, index_videos
from stage1_autoencoder.videos.preprocessing import FramePreprocessor
from stage1_autoencoder.videos.source import (
    BrokenVideoError,
    SkippedVideo,
    VideoError,
    VideoInfo,
    VideoSource,
    VideoTable,
)
from stage1_autoencoder.videos.splits import DEFAULT_FRACTIONS, join_names, rows_by_fractions
from stage1_autoencoder.videos.video_files import Keyframe, Probe, decode_folder, decode_video, list_frames


@dataclass(frozen=True)
class NamedVideos:
    """Videos that are named as their data set has it.

    Attributes:
        names: the path of each id, below the folder, in natural order of the paths.
        skipped: videos that are named otherwise, and folders that could not be looked into.
        passed_over: how many other files there are, by extension (by name where they have none).
    """

    names: dict[str, str]
    skipped: list[SkippedVideo]
    passed_over: dict[str, int]


def find_named(root: Path, id_of: Callable[[str], str | None], example: str, way_out: str) -> NamedVideos:
    """Find the videos below `root` whose names have the right form, whatever folders they lie in.

    Args:
        id_of: the id that a file's name without extension stands for; None for a name of another form.
        example: of such a name.
        way_out: how to get the data set, for messages.
    Raises:
        VideoError: no folder, no video with such a name, two for one id.
    """
    if not root.is_dir():
        raise VideoError(f"{root}: there is no such folder; {way_out}")
    try:
        found = find_videos(root)
    except VideoError as error:
        raise VideoError(f"{error}; {way_out}") from error
    names: dict[str, str] = {}
    skipped = list(found.unreadable)
    for video, name in zip(found.ids, found.names, strict=True):
        if (video_id := id_of(Path(name).stem)) is None:
            skipped.append(SkippedVideo(video, f"is not named as {example}"))
        elif (other := names.setdefault(video_id, name)) != name:
            raise VideoError(f"{root / other} and {root / name} are both {video_id}: remove one of them")
    if not names:
        raise VideoError(f"{root}: none of its {len(found)} videos is named as {example}; {way_out}")
    return NamedVideos(names, skipped, found.passed_over)


Source = TypeVar("Source", bound=VideoSource)  # one that can `select`

_SPLIT_FOLDERS: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "test"}


class Clip(NamedTuple):
    """A video, or a cut of one: its path below the source's folder, first and one-past-last frame before `frame_step`.

    `keyframes` are those of the file, from which decoding may start.
    """

    info: VideoInfo
    name: str
    first: int
    stop: int
    keyframes: tuple[Keyframe, ...]


def make_clip(video_id: str, name: str, indexed: Indexed, frame_step: int, cut: tuple[int, int] | None = None) -> Clip:
    """Make a clip of an indexed video.

    Args:
        name: of its file or folder, below the source's folder.
        cut: first and one-past-last frame, inside the video and not empty; None for all of it.
    """
    probe, fingerprint = indexed.probe, indexed.digest
    assert probe is not None, f"{name} is not usable: {indexed.reason}"
    assert fingerprint is not None, f"{name} has no digest"
    first, stop = cut or (0, probe.frames)
    assert 0 <= first < stop <= probe.frames, f"cut {cut} of the {probe.frames} frames of {name}"
    info = VideoInfo(
        id=video_id,
        frames=(stop - first - 1) // frame_step + 1,
        fps=probe.fps / frame_step,
        fingerprint=fingerprint if cut is None else f"{fingerprint} {first}:{stop}",
        size=(probe.width, probe.height),
    )
    return Clip(info, name, first, stop, probe.keyframes)


class FolderSource(VideoSource):
    """Videos that lie in a folder, as files or as folders of frames."""

    videos: VideoTable

    def __init__(
        self,
        dataset: DatasetConfig,
        root: Path,
        clips: Iterable[Clip],
        skipped: Iterable[SkippedVideo] = (),
        passed_over: Mapping[str, int] | None = None,
    ) -> None:
        """Take clips from any stream, one at a time; `skipped` is looked at after it."""
        self.dataset = dataset
        self.root = root
        self._names: list[str] = []
        ends, keyframes, per_video = array("q"), array("q"), array("q")

        def infos() -> Iterator[VideoInfo]:
            for clip in clips:
                self._names.append(clip.name)
                ends.extend((clip.first, clip.stop))
                keyframes.extend(itertools.chain.from_iterable(clip.keyframes))
                per_video.append(len(clip.keyframes))
                yield clip.info

        self.videos = VideoTable(infos())
        self._ends = np.array(ends, np.int64).reshape(-1, 2)
        # Those of video i: rows offsets[i] to offsets[i + 1] of all.
        self._keyframes = np.array(keyframes, np.int64).reshape(-1, 2)
        self._keyframe_offsets = np.concatenate([[0], np.cumsum(np.array(per_video, np.int64))])
        self.skipped = list(skipped)
        self.passed_over = dict(passed_over or {})

    @property
    def native_frames(self) -> int:
        return int((self._ends[:, 1] - self._ends[:, 0]).sum())

    def select(self, rows: np.ndarray, skipped: Iterable[SkippedVideo] = ()) -> "FolderSource":
        """A source of some of the videos, by their positions [m] int64."""
        source = FolderSource(self.dataset, self.root, (), skipped)
        source.videos = self.videos.select(rows)
        source._names = [self._names[row] for row in rows.tolist()]
        source._ends = self._ends[rows]
        starts, counts = self._keyframe_offsets[rows], np.diff(self._keyframe_offsets)[rows]
        source._keyframe_offsets = np.concatenate([[0], np.cumsum(counts)])
        within = np.arange(counts.sum()) - np.repeat(source._keyframe_offsets[:-1], counts)
        source._keyframes = self._keyframes[np.repeat(starts, counts) + within]
        return source

    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        start, stop = self.check_range(index, start, stop)
        if start == stop:
            return
        video, path, step = self.videos[index], self.root / self._names[index], self.dataset.frame_step
        first = int(self._ends[index, 0]) + start * step
        last = first + (stop - 1 - start) * step
        if path.is_dir():
            decode = decode_folder
        else:
            decode = partial(decode_video, probe=self._probe(index))
        preprocess = FramePreprocessor(self.dataset.image_size)
        with contextlib.closing(decode(path, video.id, first, last + 1, step)) as frames:
            for frame in frames:
                yield preprocess(frame)

    def _probe(self, index: int) -> Probe:
        """What decoding wants to know of a file; a cut knows no more than its own end."""
        video = self.videos[index]
        keyframes = self._keyframes[self._keyframe_offsets[index] : self._keyframe_offsets[index + 1]].tolist()
        stop = int(self._ends[index, 1])
        return Probe(stop, video.fps, *video.size, tuple(Keyframe(*pair) for pair in keyframes))


def open_folder(dataset: DatasetConfig, root: Path, remember: bool = True) -> dict[Split, FolderSource]:
    """Index a folder of videos and divide it into splits; splits without videos are left out.

    If `root` has a folder `train`, then `train`, `val` (or `validation`) and `test` are the splits. Without `val`,
    the fraction `dataset.splits.val` (0.1 unless given) of the training videos is taken for validation; without `test`,
    the fraction `dataset.splits.test` if it is given, and otherwise there is no test split. If `root` has no such
    folders, both fractions (0.1 each unless given) are taken of all videos. See `rows_by_fractions`.

    Unusable videos are listed as `skipped` in the split of their folder, or in train.

    Args:
        remember: without it, nothing is written; see `index_videos`.
    Raises:
        VideoError: no folder, no videos, a split folder with none that can be used, nothing left to train on.
    """
    if not root.is_dir():
        raise VideoError(
            f"{root}: there is no such folder; put the videos of {dataset.name!r} there, or set dataset.root"
        )
    folders = split_folders(root) or {"train": root}
    fractions = choose_fractions(dataset, has_folders=folders["train"] != root)
    found = {split: find_videos(folder) for split, folder in folders.items()}
    return split_training(dataset, root, _index_folders(dataset, root, found, remember), fractions)


def choose_fractions(dataset: DatasetConfig, has_folders: bool) -> dict[Split, float]:
    """The fractions that are held out for splits without a folder of their own; see `open_folder`.

    Raises:
        VideoError: they don't add up.
    """
    fractions = DEFAULT_FRACTIONS | ({"test": 0.0} if has_folders else {})
    fractions |= {split: float(fraction) for split, fraction in dataset.splits.items()}
    if "train" in fractions and abs(sum(fractions.values()) - 1) > 1e-6:
        raise VideoError(f"dataset.splits: {fractions} do not add up to 1; leave train out, it gets the rest")
    return fractions


def split_training(
    dataset: DatasetConfig, root: Path, sources: dict[Split, Source], fractions: Mapping[Split, float]
) -> dict[Split, Source]:
    """Take the splits that lack out of the training videos, by fractions.

    Args:
        sources: of the splits that have folders, train among them.
    Raises:
        VideoError: nothing is left to train on.
    """
    train, sources = sources["train"], dict(sources)
    shares = rows_by_fractions(
        train.videos.ids,
        val=0.0 if "val" in sources else fractions["val"],
        test=0.0 if "test" in sources else fractions["test"],
        seed=dataset.split_seed,
    )
    if not len(shares["train"]):
        raise VideoError(
            f"{root}: of {len(train.videos)} videos, dataset.splits {fractions} leave none to train on; "
            "lower the fractions or add videos"
        )
    for split in ("val", "test"):
        if len(shares[split]):
            sources[split] = train.select(shares[split])
    if len(shares["train"]) < len(train.videos):
        sources["train"] = train.select(shares["train"], train.skipped)
        sources["train"].passed_over = train.passed_over
    return {split: sources[split] for split in ("train", "val", "test") if split in sources}


def _index_folders(
    dataset: DatasetConfig, root: Path, found: dict[Split, Listing], remember: bool
) -> dict[Split, FolderSource]:
    """Index the videos of all split folders as one, since one file below `root` remembers them.

    Raises:
        VideoError: a folder with none that can be used.
    """
    inside = {split: _below(root, listing.folder) for split, listing in found.items()}
    names = [inside[split] + name for split, listing in found.items() for name in listing.names]
    indexed = index_videos(root, names, remember)
    sources: dict[Split, FolderSource] = {}
    with contextlib.closing(indexed):
        for split, listing in found.items():
            skipped = list(listing.unreadable)

            def usable(split: Split = split, listing: Listing = listing, skipped: list = skipped) -> Iterator[Clip]:
                for video_id, name, entry in zip(listing.ids, listing.names, indexed, strict=False):
                    if entry.probe is None:
                        skipped.append(SkippedVideo(video_id, entry.reason or ""))
                    else:
                        yield make_clip(video_id, inside[split] + name, entry, dataset.frame_step)

            source = FolderSource(dataset, root, usable(), skipped, listing.passed_over)
            if not len(source.videos):
                reasons = join_names(f"{video.id} {video.reason}" for video in skipped)
                raise VideoError(f"{listing.folder}: none of its {len(listing)} videos can be used: {reasons}")
            sources[split] = source
    return sources


def _below(root: Path, folder: Path) -> str:
    return "" if folder == root else f"{folder.relative_to(root)}/"


def open_single(dataset: DatasetConfig, path: Path) -> FolderSource:
    """Open one video file or folder of frames, wherever it lies, as a source of one video; nothing is cached.

    Raises:
        VideoError: it is not there.
        BrokenVideoError: it cannot be used.
    """
    if not path.exists():
        raise VideoError(f"{path}: there is no such video file or folder of frames")
    try:
        if path.is_dir() and not list_frames(path):
            raise VideoError(f"{path}: a folder without .png or .jpg frames directly in it")
    except OSError as error:
        raise BrokenVideoError(str(path), f"cannot be looked into ({error.strerror})") from error
    indexed = examine_video(path, str(path))
    return FolderSource(dataset, path.parent, [make_clip(path.stem, path.name, indexed, dataset.frame_step)])


def split_folders(root: Path) -> dict[Split, Path]:
    """Find the split folders in `root`; empty if there are none."""
    folders: dict[Split, Path] = {}
    try:
        paths = sorted(root.iterdir())
    except OSError as error:
        raise VideoError(f"{root}: cannot be looked into ({error.strerror})") from error
    for path in paths:
        split = _SPLIT_FOLDERS.get(path.name.lower())
        if split is None or not path.is_dir():
            continue
        if split in folders:
            raise VideoError(f"{root}: both {folders[split].name} and {path.name} are for {split}; remove one of them")
        folders[split] = path
    if folders and "train" not in folders:
        raise VideoError(
            f"{root}: has {join_names(path.name for path in folders.values())}, but no folder train; "
            "add one, or rename the others"
        )
    return folders
