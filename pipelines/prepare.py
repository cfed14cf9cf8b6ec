"""`data`: fetch, check, unpack and index the raw videos."""

from pipelines import datasets
from pipelines.config import RiverConfig
from pipelines.runtime.progress import say
from pipelines.runtime.session import Session
from stage1_autoencoder.videos.base import VideoSource
from stage1_autoencoder.videos.config import Split


def prepare_data(config: RiverConfig, session: Session) -> dict[Split, VideoSource]:
    """Bring the raw videos to where the configuration looks for them, and say what is there.

    Raises:
        VideoError, UserError: archives or videos that are not what they should be.
    """
    splits = datasets.prepare(config.dataset, config.data_root, session.mirror, say)
    for source in splits.values():
        for video in source.skipped:
            session.skip(video.id, video.reason)
    return splits
