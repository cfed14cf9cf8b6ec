"""Data sets in which a file's name says which video it is: finding those files below a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stage1_autoencoder.videos.base import SkippedVideo, VideoError
from stage1_autoencoder.videos.index import find_videos


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
