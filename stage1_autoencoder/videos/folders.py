"""A folder of video files and frame folders as a source, and how it falls into splits (`source: videos`)."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from stage1_autoencoder.videos.base import SkippedVideo, VideoError, VideoInfo, VideoSource
from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.files import Probe, decode_video
from stage1_autoencoder.videos.frame_folders import decode_folder, list_frames
from stage1_autoencoder.videos.index import Indexed, examine_video, find_videos, index_videos, stamp
from stage1_autoencoder.videos.preprocessing import FramePreprocessor
from stage1_autoencoder.videos.splits import DEFAULT_FRACTIONS, join_names, split_by_fractions

_SPLIT_FOLDERS: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Clip:
    """A video, or a cut of one: where it lies, what is in it, its first and one-past-last frame before `frame_step`."""

    info: VideoInfo
    path: Path
    probe: Probe
    first: int
    stop: int


def make_clip(video_id: str, path: Path, indexed: Indexed, frame_step: int, cut: tuple[int, int] | None = None) -> Clip:
    """Make a clip of an indexed video.

    Args:
        cut: first and one-past-last frame, inside the video and not empty; None for all of it.
    """
    probe, fingerprint = indexed.probe, indexed.digest
    assert probe is not None, f"{path} is not usable: {indexed.reason}"
    assert fingerprint is not None, f"{path} has no digest"
    first, stop = cut or (0, probe.frames)
    assert 0 <= first < stop <= probe.frames, f"cut {cut} of the {probe.frames} frames of {path}"
    info = VideoInfo(
        id=video_id,
        frames=(stop - first - 1) // frame_step + 1,
        fps=probe.fps / frame_step,
        fingerprint=fingerprint if cut is None else f"{fingerprint} {first}:{stop}",
        size=(probe.width, probe.height),
    )
    return Clip(info, path, probe, first, stop)


class FolderSource(VideoSource):
    """Videos that lie in a folder, as files or as folders of frames."""

    def __init__(self, dataset: DatasetConfig, clips: Sequence[Clip], skipped: Sequence[SkippedVideo]) -> None:
        self.dataset = dataset
        self.videos = [clip.info for clip in clips]
        self.skipped = list(skipped)
        self._clips = list(clips)

    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        start, stop = self.check_range(index, start, stop)
        if start == stop:
            return
        clip, step = self._clips[index], self.dataset.frame_step
        decode = decode_folder if clip.path.is_dir() else partial(decode_video, probe=clip.probe)
        first, last = clip.first + start * step, clip.first + (stop - 1) * step
        preprocess = FramePreprocessor(self.dataset.image_size)
        with contextlib.closing(decode(clip.path, clip.info.id, first, last + 1, step)) as frames:
            for frame in frames:
                yield preprocess(frame)


def open_folder(dataset: DatasetConfig, root: Path) -> dict[Split, FolderSource]:
    """Index a folder of videos and divide it into splits; splits without videos are left out.

    If `root` has a folder `train`, then `train`, `val` (or `validation`) and `test` are the splits. Without `val`,
    the fraction `dataset.splits.val` (0.1 unless given) of the training videos is taken for validation; without `test`,
    the fraction `dataset.splits.test` if it is given, and otherwise there is no test split. If `root` has no such
    folders, both fractions (0.1 each unless given) are taken of all videos. See `split_by_fractions`.

    Unusable videos are listed as `skipped` in the split of their folder, or in train.

    Raises:
        VideoError: no folder, no videos, a split folder with none that can be used, nothing left to train on.
    """
    if not root.is_dir():
        raise VideoError(
            f"{root}: there is no such folder; put the videos of {dataset.name!r} there, or set dataset.root"
        )
    folders = _split_folders(root) or {"train": root}
    fractions = {"val": DEFAULT_FRACTIONS["val"], "test": DEFAULT_FRACTIONS["test"]}
    if folders["train"] != root:
        fractions["test"] = 0.0
    fractions |= {split: float(fraction) for split, fraction in dataset.splits.items()}
    if "train" in fractions and abs(sum(fractions.values()) - 1) > 1e-6:
        raise VideoError(f"dataset.splits: {fractions} do not add up to 1; leave train out, it gets the rest")

    found = {split: find_videos(folder) for split, folder in folders.items()}
    indexed = index_videos(root, [path for videos in found.values() for path in videos.values()])
    clips: dict[Split, dict[str, Clip]] = {}
    skipped: dict[Split, list[SkippedVideo]] = {}
    for split, videos in found.items():
        skipped[split] = [SkippedVideo(i, indexed[path].reason) for i, path in videos.items() if indexed[path].reason]
        clips[split] = {
            video_id: make_clip(video_id, path, indexed[path], dataset.frame_step)
            for video_id, path in videos.items()
            if indexed[path].probe
        }
        if not clips[split]:
            reasons = join_names(f"{video.id} {video.reason}" for video in skipped[split])
            raise VideoError(f"{folders[split]}: none of its {len(videos)} videos can be used: {reasons}")

    shares = split_by_fractions(
        list(clips["train"]),
        val=0.0 if "val" in clips else fractions["val"],
        test=0.0 if "test" in clips else fractions["test"],
        seed=dataset.split_seed,
    )
    if not shares["train"]:
        raise VideoError(
            f"{root}: of {len(clips['train'])} videos, dataset.splits {fractions} leave none to train on; "
            "lower the fractions or add videos"
        )
    taken = {split: [clips["train"][video_id] for video_id in ids] for split, ids in shares.items()}
    taken |= {split: list(videos.values()) for split, videos in clips.items() if split != "train"}
    return {split: FolderSource(dataset, videos, skipped.get(split, [])) for split, videos in taken.items() if videos}


def open_single(dataset: DatasetConfig, path: Path) -> FolderSource:
    """Open one video file or folder of frames, wherever it lies, as a source of one video; nothing is cached.

    Raises:
        VideoError: it is not there.
        BrokenVideoError: it cannot be used.
    """
    if not path.exists():
        raise VideoError(f"{path}: there is no such video file or folder of frames")
    if path.is_dir() and not list_frames(path):
        raise VideoError(f"{path}: a folder without .png or .jpg frames directly in it")
    indexed = examine_video(path, str(path), stamp(path))
    return FolderSource(dataset, [make_clip(path.stem, path, indexed, dataset.frame_step)], [])


def _split_folders(root: Path) -> dict[Split, Path]:
    """Find the split folders in `root`; empty if there are none."""
    folders: dict[Split, Path] = {}
    for path in sorted(root.iterdir()):
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
