"""Finding videos: which video files and frame folders lie below a folder, and the ids they get."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stage1_autoencoder.videos.image_folders import IMAGE_EXTENSIONS, WEBP, is_frame, is_still_webp
from stage1_autoencoder.videos.names import escaped, join_names, natural_order
from stage1_autoencoder.videos.source import SkippedVideo, VideoError
from stage1_autoencoder.videos.video_files import VIDEO_EXTENSIONS

_MOST_KINDS = 100  # kinds of other files that are counted separately


@dataclass(frozen=True)
class Listing:
    """Videos below a folder.

    Attributes:
        ids: unique, in natural order.
        names: per video, the path of its file or frame folder, relative to `folder`.
        skipped: folders that cannot be listed, and videos that cannot be named.
        passed_over: number of other files by extension (by name where they have none).
    """

    folder: Path
    ids: list[str]
    names: list[str]
    skipped: list[SkippedVideo] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int]) -> "Listing":
        """Some of the videos, by their positions, in that order; all else stays."""
        return replace(self, ids=[self.ids[row] for row in rows], names=[self.names[row] for row in rows])


def find_videos(folder: Path) -> Listing:
    """Find all video files and frame folders below a folder.

    An id is the path relative to `folder` without the extension; files whose ids would be equal keep their extensions.
    Hidden files and unknown extensions are ignored, and so are pictures beside video files (thumbnails) or directly in
    `folder`. Of WebP files, the only ones that may be either, the header is read.

    Raises:
        VideoError: no folder, no videos in it, or two videos with equal ids, also if only upper and lower case differ.
    """
    if not folder.is_dir():
        raise VideoError(f"{folder}: no such folder")
    found: list[str] = []
    folders_of_frames: set[str] = set()
    others: Counter[str] = Counter()
    unreadable: list[SkippedVideo] = []

    def note_unreadable(error: OSError) -> None:
        name = os.path.relpath(error.filename, folder)
        unreadable.append(SkippedVideo(_text(name), f"cannot be listed ({error.strerror})"))

    visited: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=note_unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a link to a folder above would be followed forever
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = os.path.relpath(place, folder)
        inside = "" if here == os.curdir else here + os.sep
        names = [name for name in names if not name.startswith(".")]
        videos = [name for name in names if _is_video(os.path.join(place, name))]
        found += [inside + name for name in videos]
        if not videos and inside and any(map(is_frame, names)):
            found.append(here)
            folders_of_frames.add(here)
            names = [name for name in names if not is_frame(name)]
        counted = set(videos)
        for name in names:
            if name not in counted:
                kind = os.path.splitext(name)[1].lower() or name
                others[kind if kind in others or len(others) < _MOST_KINDS else "others"] += 1
    if not found:
        for video in unreadable:
            raise VideoError(f"{folder / video.id}: {video.reason}")
        raise VideoError(_nothing_found(folder, others))
    listing = Listing(folder, _ids(folder, found, folders_of_frames), found, unreadable, dict(others))
    return listing.select(natural_order(listing.ids))


def count_videos(path: Path) -> int:
    """The number of videos that a file or folder is or holds; 0 if there are none."""
    if not path.is_dir():
        return int(_is_video(path))
    try:
        return len(find_videos(path))
    except VideoError:  # there are none in it, but it may be a folder of frames itself
        return int(any(map(is_frame, os.listdir(path))))


def find_named_videos(root: Path, id_of: Callable[[str], str | None], example: str, way_out: str) -> Listing:
    """Find the videos below `root` that are named as their data set names them, in any folder.

    Args:
        id_of: maps a file's name without extension to the id; None for other names.
        example: an expected name.
        way_out: how to get the data set, for messages.
    Returns:
        the videos in natural order of their paths; those with other names are skipped.
    Raises:
        VideoError: no folder, no video with such a name, two for one id.
    """
    try:
        found = find_videos(root)
    except VideoError as error:
        raise VideoError(f"{error}; {way_out}") from error
    names: dict[str, str] = {}
    skipped = list(found.skipped)
    for video, name in zip(found.ids, found.names, strict=True):
        if (video_id := id_of(Path(name).stem)) is None:
            skipped.append(SkippedVideo(video, f"is not named like {example}"))
        elif (other := names.setdefault(video_id, name)) != name:
            raise VideoError(f"{root / other} and {root / name} are both {video_id}: remove one of them")
    if not names:
        raise VideoError(f"{root}: none of its {len(found)} videos is named like {example}; {way_out}")
    return replace(found, ids=list(names), names=list(names.values()), skipped=skipped)


def _is_video(path: str | Path) -> bool:
    """Whether a file is a video by its extension; of WebP files, animated ones are, and thumbnails are not."""
    extension = os.path.splitext(path)[1].lower()
    return extension in VIDEO_EXTENSIONS and (extension != WEBP or not is_still_webp(path))


def _nothing_found(folder: Path, extensions: Iterable[str]) -> str:
    expected = f"expected {' '.join(sorted(VIDEO_EXTENSIONS))} files, or one folder of .png or .jpg frames per video"
    if not extensions:
        return f"{folder}: the folder is empty; {expected}"
    if not IMAGE_EXTENSIONS.isdisjoint(extensions):
        return f"{folder}: contains pictures; move the frames of each video into a folder of its own"
    return f"{folder}: contains no videos, only {join_names(sorted(extensions))}; {expected}"


def _text(name: str) -> str:
    """A file name, which is bytes to the file system, as one line: bytes that are not UTF-8 become \\xe9 and so on."""
    return escaped(os.fsencode(name).decode(errors="backslashreplace"))


def _ids(folder: Path, found: list[str], folders_of_frames: set[str]) -> list[str]:
    ids = [_text(name if name in folders_of_frames else os.path.splitext(name)[0]) for name in found]
    if repeated := _repeated(ids):
        ids = [_text(name) if video_id in repeated else video_id for video_id, name in zip(ids, found, strict=True)]
        if repeated := _repeated(ids):
            video_id = min(repeated)
            one, other, *_ = (folder / name for this, name in zip(ids, found, strict=True) if this == video_id)
            raise VideoError(f"{one} and {other} would both get the id {video_id!r}: rename one of them")
    if repeated := _repeated(map(str.casefold, ids)):
        folded = min(repeated)
        one, other, *_ = (folder / name for this, name in zip(ids, found, strict=True) if this.casefold() == folded)
        raise VideoError(
            f"{one} and {other} differ only in upper and lower case, which some file systems ignore: rename one of them"
        )
    return ids


def _repeated(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}
