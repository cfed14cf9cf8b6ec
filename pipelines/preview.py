"""`data --dry-run`: which videos there are and what would be done to have them, before any of it."""

from pipelines import datasets
from pipelines.config import RiverConfig
from pipelines.runtime.progress import say
from pipelines.runtime.session import Session
from pipelines.survey import survey
from stage1_autoencoder.videos import dataset_root, open_splits
from stage1_autoencoder.videos.base import VideoError


def preview_data(config: RiverConfig, session: Session) -> None:
    """Say what `data` would fetch, and what of the videos is there, is used, and is skipped. Nothing is written.

    Raises:
        VideoError: videos of the user's own that are not there or cannot be used.
    """
    dataset = config.dataset
    say(f"data: {dataset.name}, source {dataset.source}, in {dataset_root(dataset, config.data_root)}")
    for line in datasets.plan(dataset, config.data_root, session.mirror):
        say(line)
    try:
        sources = open_splits(dataset, config.data_root, remember=False)
    except VideoError as error:
        if dataset.source in ("videos", "hdf5"):  # which nobody but the user can bring
            raise
        say(f"not there yet: {error}")
        return
    for line in survey(config, sources):
        say(line)
