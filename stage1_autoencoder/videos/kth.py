"""The KTH actions: `<action>/person01_<action>_d1_uncomp.avi`, split by persons, optionally cut into sequences."""

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.folders import Cut, FolderSource, open_divided
from stage1_autoencoder.videos.listing import find_named_videos
from stage1_autoencoder.videos.source import Recording, SkippedVideo, VideoError
from stage1_autoencoder.videos.splits import assign_numbers

ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
SEQUENCES_FILE = "00sequences.txt"
MOST_SEQUENCES_BYTES = 2**20  # the file has 70 kB
# The paper's splits. Person 20 is held out for validation, see `persons_of_splits`.
PERSONS: dict[Split, str] = {"train": "1-20", "test": "21-25"}

_WAY_OUT = (
    "download the data with `river data --config kth`, or unpack archives with "
    "`river data --config kth --mirror <folder with the zips>`"
)


class KthSource(FolderSource):
    """Videos or sequences of KTH, whose recordings know the person."""

    def recording(self, index: int) -> Recording:
        """The AVI file, and the person's number."""
        return Recording(super().recording(index).name, str(_person(self.videos[index].id)))


def open_kth(dataset: DatasetConfig, root: Path, remember: bool = True) -> dict[Split, FolderSource]:
    """Index the KTH videos below `root` and divide them by persons; splits without videos are omitted.

    An id such as person01_boxing_d1 does not depend on the folder. `dataset.splits` has the persons of each split, by
    default the paper's, 1-20 and 21-25, of which person 20 is held out for validation; see `persons_of_splits`. Other
    persons are not used.

    With `dataset.sequences`, each range of `00sequences.txt` is a video of its own, such as person01_jogging_d1_2-46
    (counted from 1, both ends included). Ranges are clipped to the video; one behind its end is skipped, and so are
    videos without ranges.

    Raises:
        VideoError: no folder, no KTH videos, two files for one video, nobody to train on, overlapping splits.
    """
    splits = dataset.splits or PERSONS
    owner = persons_of_splits(splits)
    if any(root.glob("*.zip")) and not any((root / action).is_dir() for action in ACTIONS):
        quoted = shlex.quote(str(root))
        raise VideoError(f"{root}: has archives that are not unpacked: run `river data --config kth --mirror {quoted}`")
    listing = find_named_videos(root, _video_id, "person01_boxing_d1_uncomp.avi", _WAY_OUT)
    ranges = read_sequences(root / SEQUENCES_FILE) if dataset.sequences else {}

    def cut(video_id: str, frames: int) -> Iterator[Cut | SkippedVideo]:
        if not ranges.get(video_id):
            yield SkippedVideo(video_id, f"has no frame ranges in {SEQUENCES_FILE}")
        for first, last in ranges.get(video_id, ()):
            sequence = Cut(f"{video_id}_{first}-{last}", max(first, 1) - 1, min(last, frames))
            if sequence.first < sequence.stop:
                yield sequence
            else:
                yield SkippedVideo(sequence.id, f"lies outside the video's {frames} frames")

    sources = open_divided(
        dataset,
        listing,
        lambda video_id: owner.get(_person(video_id)),
        remember,
        cut if dataset.sequences else None,
        KthSource,
    )
    if "train" not in sources:
        raise VideoError(
            f"{root}: no usable video to train on (dataset.splits.train {splits.get('train')}); {_WAY_OUT}"
        )
    return sources


def persons_of_splits(splits: Mapping[Split, int | float | str]) -> dict[int, Split]:
    """Find the split of each person.

    Without `val`, the last of several training persons is held out for validation: 1-20 and 21-25 means 1-19, 20 and
    21-25. `val: none` holds out nobody.

    Raises:
        VideoError: a person in two splits, or a range that cannot be parsed.
    """
    given = {split: value for split, value in splits.items() if (split, value) != ("val", "none")}
    owner = assign_numbers(given, "person", example="1-19")
    training = sorted(person for person, split in owner.items() if split == "train")
    if "val" not in splits and len(training) > 1:
        owner[training[-1]] = "val"
    return owner


def read_sequences(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Read the frame ranges of `00sequences.txt`.

    Returns:
        ranges per video id as in the file: counted from 1, both ends included. The list may be empty.
    Raises:
        VideoError: no file, no ranges in it, or absurdly many or large ones.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise VideoError(f"{path}: not a regular file; {_WAY_OUT}")
        with path.open(encoding="latin-1") as file:
            text = file.read(MOST_SEQUENCES_BYTES + 1)
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror}); {_WAY_OUT}") from error
    if len(text) > MOST_SEQUENCES_BYTES or re.search(r"\d{10}", text):
        raise VideoError(f"{path}: has more than {MOST_SEQUENCES_BYTES} bytes or 9 digits in a number; {_WAY_OUT}")
    sequences: dict[str, list[tuple[int, int]]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"\s*(person\d+_[a-z]+_d\d+)\s+frames\b(.*)", line):
            ranges = re.findall(r"(\d+)\s*-\s*(\d+)", match[2])
            sequences[match[1]] = [(int(first), int(last)) for first, last in ranges]
    if not any(sequences.values()):
        raise VideoError(f"{path}: has no frame ranges such as 'person01_boxing_d1  frames  1-95, 96-185'; {_WAY_OUT}")
    return sequences


def _video_id(stem: str) -> str | None:
    match = re.fullmatch(rf"(person\d+_(?:{'|'.join(ACTIONS)})_d\d+)(?:_uncomp)?", stem)
    return match[1] if match else None


def _person(video_id: str) -> int:
    return int(video_id.partition("_")[0].removeprefix("person"))
