"""The KTH actions: `<action>/person01_<action>_d1_uncomp.avi`, split by persons, on request cut into sequences."""

import re
from dataclasses import dataclass
from pathlib import Path

from stage1_autoencoder.videos.base import SkippedVideo, VideoError
from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.folders import Clip, FolderSource, make_clip
from stage1_autoencoder.videos.index import find_videos, index_videos
from stage1_autoencoder.videos.splits import KTH_PERSONS, SPLITS, persons_of_splits

ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
SEQUENCES_FILE = "00sequences.txt"

_WAY_OUT = (
    "fetch the data by `make data DATASET=kth`, or unpack it from archives that you have by "
    "`make data DATASET=kth MIRROR=<folder with the zips>`"
)


@dataclass(frozen=True)
class _Name:
    video_id: str
    person: int


def _parse_name(path: str) -> _Name | None:
    match = re.fullmatch(rf"(person(\d+)_(?:{'|'.join(ACTIONS)})_d\d+)(?:_uncomp)?", Path(path).stem)
    return _Name(match[1], int(match[2])) if match else None


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
    if not root.is_dir():
        raise VideoError(f"{root}: there is no such folder; {_WAY_OUT}")
    if any(root.glob("*.zip")) and not any((root / action).is_dir() for action in ACTIONS):
        raise VideoError(f"{root}: has archives, but they are not unpacked: `make data DATASET=kth MIRROR={root}`")
    sequences = read_sequences(root / SEQUENCES_FILE) if dataset.sequences else None

    try:
        found = find_videos(root)
    except VideoError as error:
        raise VideoError(f"{error}; {_WAY_OUT}") from error
    names = [_parse_name(name) for name in found.names]
    named = [row for row, name in enumerate(names) if name]
    if not named:
        raise VideoError(
            f"{root}: none of its {len(names)} videos is named as person01_boxing_d1_uncomp.avi; {_WAY_OUT}"
        )
    seen: dict[str, str] = {}
    for row in named:
        if (other := seen.setdefault(names[row].video_id, found.names[row])) != found.names[row]:
            raise VideoError(
                f"{root / other} and {root / found.names[row]} are both {names[row].video_id}: remove one of them"
            )

    clips: dict[Split, list[Clip]] = {split: [] for split in SPLITS}
    skipped: dict[Split, list[SkippedVideo]] = {split: [] for split in SPLITS}
    skipped["train"] += found.unreadable
    skipped["train"] += [
        SkippedVideo(video_id, "is not named as person01_boxing_d1_uncomp.avi")
        for video_id, name in zip(found.ids, names, strict=True)
        if name is None
    ]
    indexed = index_videos(root, [found.names[row] for row in named], remember)
    for row, entry in zip(named, indexed, strict=True):
        name, path, split = names[row], found.names[row], owner.get(names[row].person)
        if split is None:
            continue
        if entry.probe is None:
            skipped[split].append(SkippedVideo(name.video_id, entry.reason or ""))
        elif sequences is None:
            clips[split].append(make_clip(name.video_id, path, entry, dataset.frame_step))
        elif not sequences.get(name.video_id):
            skipped[split].append(SkippedVideo(name.video_id, f"has no frame ranges in {SEQUENCES_FILE}"))
        else:
            for first, last in sequences[name.video_id]:
                sequence_id, cut = f"{name.video_id}_{first}-{last}", (max(first, 1) - 1, min(last, entry.probe.frames))
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
