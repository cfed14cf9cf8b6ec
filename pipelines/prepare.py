"""`data`: fetch, check, unpack and index the raw videos."""

from pipelines.datasets import prepare
from pipelines.config import RiverConfig
from pipelines.runtime.progress import say
from pipelines.runtime.session import Session
from pipelines.survey import remarks
from pipelines.video_list import write_video_list
from stage1_autoencoder.videos import open_splits
from stage1_autoencoder.videos.base import VideoSource
from stage1_autoencoder.videos.config import Split


def prepare_data(config: RiverConfig, session: Session) -> dict[Split, VideoSource]:
    """Bring the raw videos to where the configuration looks for them, say what is there, and leave a list of it.

    Raises:
        VideoError, UserError: archives or videos that are not what they should be.
    """
    splits = prepare(config.dataset, config.data_root, session.mirror, say)
    for line in remarks(config, splits):
        say(line)
    if session.processes.is_first:
        path = config.run_path / "videos.tsv"
        count = write_video_list(path, splits)
        say(f"data: {count} videos, listed in {path}")
    return _note_skipped(splits, session)


def open_videos(config: RiverConfig, session: Session) -> dict[Split, VideoSource]:
    """The splits of the raw videos; with a mirror they are fetched from it first, where they lack.

    Raises:
        VideoError: no folder, or no videos in it; says how to get them.
    """
    if session.mirror is not None:
        return prepare_data(config, session)
    return _note_skipped(open_splits(config.dataset, config.data_root), session)


def _note_skipped(splits: dict[Split, VideoSource], session: Session) -> dict[Split, VideoSource]:
    for source in splits.values():
        for video in source.skipped:
            session.skip(video.id, video.reason)
    return splits
