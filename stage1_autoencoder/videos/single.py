"""One video that somebody names, outside any data set."""

from pathlib import Path

from stage1_autoencoder.videos.base import BrokenVideoError, VideoError
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.files import probe_video
from stage1_autoencoder.videos.folders import FolderSource, make_clip
from stage1_autoencoder.videos.frame_folders import probe_folder
from stage1_autoencoder.videos.index import Indexed, Stamp


def open_video(dataset: DatasetConfig, path: Path) -> FolderSource:
    """Open a video file, or a folder of frames, as a source of one video; its frames are made as `dataset` says.

    Raises:
        VideoError: it is not there, or not a video that can be decoded.
    """
    if not path.exists():
        raise VideoError(f"{path}: there is no such video")
    try:
        probe = probe_folder(path, path.name) if path.is_dir() else probe_video(path, path.name)
    except BrokenVideoError as error:
        raise VideoError(f"{path} is not a video that can be read: {error.reason}") from error
    indexed = Indexed(Stamp(0, 0), probe)
    return FolderSource(dataset, [make_clip(path.stem, path, path.parent, indexed, dataset.frame_step)], [])
