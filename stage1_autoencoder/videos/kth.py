"""The KTH actions: `<action>/person01_<action>_d1_uncomp.avi`, split by persons, on request cut into sequences."""

import re
from pathlib import Path

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.folders import Clip, FolderSource, find_named, make_clip
from stage1_autoencoder.videos.index import index_videos
from stage1_autoencoder.videos.source import SkippedVideo, VideoError
from stage1_autoencoder.videos.splits import KTH_PERSONS, SPLITS, persons_of_splits

ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
SEQUENCES_FILE = "00sequences.txt"

_WAY_OUT = (
    "fetch the data by `make data DATASET=kth`, or unpack it from archives that you have by "
    "`make data DATASET=kth MIRROR=<folder with the zips>`"
)


def _video_id(stem: str) -> str | None:
    match = re.fullmatch(rf"(person\d+_(?:{'|'.join(ACTIONS)})_d\d+)(?:_uncomp)?", stem)
    return match[1] if match else None


def _person(video_id: str) -> int:
    return int(video_id.partition("_")[0].removeprefix("person"))


def read_sequences(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Read the frame ranges of `00sequences.txt`.

    Returns:
        ranges a video id, as the file has them: counted from 1, both ends included. A video without ranges has none.
    Raises:
        VideoError: no file, or no ranges in it.
    """
    try:
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror}), {_WAY_OUT}") from error
    sequences: dict[str, list[tuple[int, int]]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"\s*(person\d+_[a-z]+_d\d+)\s+frames\b(.*)", line):
            ranges = re.findall(r"(\d+)\s*-\s*(\d+)", match[2])
            sequences[match[1]] = [(int(first), int(last)) for first, last in ranges]
    if not any(sequences.values()):
        raise VideoError(f"{path}: has no frame ranges such as 'person01_boxing_d1  frames  1-95, 96-185'; {_WAY_OUT}")
    return sequences


def open_kth(dataset: DatasetConfig, root: Path, remember: bool = True) -> dict[Split, FolderSource]:
    """Index the KTH videos below `root` and divide them by persons; splits without videos are left out.

    Ids are as person01_boxing_d1, whatever folder the file lies in. `dataset.splits` gives the persons of each split,
    by default the paper's, 1-20 and 21-25, of which person 20 is held out for validation; see `persons_of_splits`.
    Persons in no split go unused.

    With `dataset.sequences`, each range of `00sequences.txt` is a video of its own, as person01_jogging_d1_2-46
    (counted from 1, both ends included). Ranges are clipped to the video; one that lies behind its end is listed as
    skipped. Videos that the file does not list, or lists without ranges, are listed as skipped too.

    Raises:
        VideoError: no folder, no KTH videos, two files for one video, nobody to train on, overlapping splits.
    """
    owner = persons_of_splits(dataset.splits)
    if any(root.glob("*.zip")) and not any((root / action).is_dir() for action in ACTIONS):
        raise VideoError(f"{root}: has archives, but they are not unpacked: `make data DATASET=kth MIRROR={root}`")
    found = find_named(root, _video_id, "person01_boxing_d1_uncomp.avi", _WAY_OUT)
    sequences = read_sequences(root / SEQUENCES_FILE) if dataset.sequences else None
    clips: dict[Split, list[Clip]] = {split: [] for split in SPLITS}
    skipped: dict[Split, list[SkippedVideo]] = {split: [] for split in SPLITS} | {"train": found.skipped}
    indexed = index_videos(root, list(found.names.values()), remember)
    for (video_id, path), entry in zip(found.names.items(), indexed, strict=True):
        split = owner.get(_person(video_id))
        if split is None:
            continue
        if entry.probe is None:
            skipped[split].append(SkippedVideo(video_id, entry.reason or ""))
        elif sequences is None:
            clips[split].append(make_clip(video_id, path, entry, dataset.frame_step))
        elif not sequences.get(video_id):
            skipped[split].append(SkippedVideo(video_id, f"has no frame ranges in {SEQUENCES_FILE}"))
        else:
            for first, last in sequences[video_id]:
                sequence_id, cut = f"{video_id}_{first}-{last}", (max(first, 1) - 1, min(last, entry.probe.frames))
                if cut[0] < cut[1]:
                    clips[split].append(make_clip(sequence_id, path, entry, dataset.frame_step, cut))
                else:
                    outside = f"lies outside the video's {entry.probe.frames} frames"
                    skipped[split].append(SkippedVideo(sequence_id, outside))
    if not clips["train"]:
        persons = dataset.splits.get("train", KTH_PERSONS["train"] if not dataset.splits else "nobody")
        raise VideoError(f"{root}: no usable video of the persons to train on ({persons}); {_WAY_OUT}")
    return {
        split: FolderSource(dataset, root, clips[split], skipped[split], found.passed_over if split == "train" else {})
        for split in SPLITS
        if clips[split]
    }
