"""Video sources: one interface, `VideoSource`, for procedural videos, folders of videos, and public data sets."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from stage1_autoencoder.videos.config import DatasetConfig, Split
from stage1_autoencoder.videos.preprocessing import preprocessing_description
from stage1_autoencoder.videos.source import BrokenVideoError, SkippedVideo, VideoError, VideoInfo, VideoSource
from stage1_autoencoder.videos.splits import SPLITS

__all__ = [
    "SPLITS",
    "BrokenVideoError",
    "SkippedVideo",
    "VideoError",
    "VideoInfo",
    "VideoSource",
    "dataset_root",
    "open_source",
    "open_splits",
    "open_video",
    "preprocessing_description",
]


def dataset_root(dataset: DatasetConfig, data_root: str | Path) -> Path:
    """The folder of the raw videos: `dataset.root` with "{data}" replaced by `data_root`, or <data_root>/<name>."""
    if dataset.root is None:
        return Path(data_root) / dataset.name
    return Path(dataset.root.replace("{data}", str(data_root)))


def open_splits(
    dataset: DatasetConfig,
    data_root: str | Path,
    remember: bool = True,
    stored: Mapping[str, Split] = MappingProxyType({}),
) -> dict[Split, VideoSource]:
    """Open all splits of a data set and index its folder. Splits without videos are omitted; train always has some.

    Args:
        data_root: `paths.data` of the config.
        remember: store the index in a hidden file in the folder; False writes nothing.
        stored: splits by id of videos that a store holds, which they keep where fractions divide them.
    Raises:
        VideoError: no folder, no videos in it, or nothing to train on.
    """
    # Imports are local because drawing shapes needs neither FFmpeg nor an index.
    root = dataset_root(dataset, data_root)
    match dataset.source:
        case "shapes":
            from stage1_autoencoder.videos.shapes import ShapesSource

            return {split: ShapesSource(dataset, split) for split in SPLITS}
        case "kth":
            from stage1_autoencoder.videos.kth import open_kth

            return dict(open_kth(dataset, root, remember))
        case "bair":
            from stage1_autoencoder.videos.bair import open_bair

            return dict(open_bair(dataset, root, remember, stored))
        case "clevrer":
            from stage1_autoencoder.videos.clevrer import open_clevrer

            return dict(open_clevrer(dataset, root, remember))
        case "hdf5":
            from stage1_autoencoder.videos.hdf5 import open_hdf5

            return dict(open_hdf5(dataset, root, remember, stored))
        case "lerobot":
            from stage1_autoencoder.videos.lerobot import open_lerobot

            return dict(open_lerobot(dataset, root, remember, stored))
        case "videos":
            from stage1_autoencoder.videos.folders import open_folder

            return dict(open_folder(dataset, root, remember, stored))


def open_video(dataset: DatasetConfig, path: str | Path) -> VideoSource:
    """Open a video file or folder of frames anywhere as a source of one video, with the preprocessing of `dataset`.

    Raises:
        VideoError: it does not exist, or cannot be used.
    """
    from stage1_autoencoder.videos.folders import open_single

    return open_single(dataset, Path(path).expanduser())


def open_source(
    dataset: DatasetConfig, data_root: str | Path, split: Split, stored: Mapping[str, Split] = MappingProxyType({})
) -> VideoSource:
    """Open one split of a data set.

    Args:
        data_root: `paths.data` of the config.
        stored: as `open_splits`.
    Raises:
        VideoError: as `open_splits`, or the split has no videos.
    """
    if dataset.source == "shapes":  # its splits do not depend on each other
        from stage1_autoencoder.videos.shapes import ShapesSource

        return ShapesSource(dataset, split)
    sources = open_splits(dataset, data_root, stored=stored)
    if split not in sources:
        found = ", ".join(f"{name} {len(source.videos)}" for name, source in sources.items())
        few = "; new videos fill an empty split from 3 videos on: a long one can be cut into clips"
        raise VideoError(
            f"{dataset_root(dataset, data_root)}: the {split} split of {dataset.name!r} has no videos "
            f"(there are {found}); add some, or set dataset.splits.{split}{few if dataset.is_divided else ''}"
        )
    return sources[split]
