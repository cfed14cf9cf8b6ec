"""What a user reads about the videos before any work is done."""

from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.config import RiverConfig, parse_config
from pipelines.data.survey import describe, remarks, survey
from stage1_autoencoder.videos.source import SkippedVideo, VideoInfo, VideoSource, VideoTable


class Source(VideoSource):
    """Videos that are said to be there."""

    def __init__(self, config: RiverConfig, lengths, *, size=(160, 120), fps=25.0, name="v", step_frames=None) -> None:
        self.dataset = config.dataset
        self.videos = VideoTable(
            VideoInfo(f"{name}{i}", frames, fps, f"digest {name}{i}", size) for i, frames in enumerate(lengths)
        )
        self.skipped = []
        self._native = step_frames

    @property
    def native_frames(self) -> int | None:
        return self._native

    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        raise NotImplementedError


@pytest.fixture
def config() -> RiverConfig:
    values = {
        "dataset": {"name": "mine", "source": "videos", "image_size": 64, "frame_step": 2},
        "evaluation": {"context": 4, "horizon": 6},
    }
    return parse_config(values, "a test")


def test_everything_in_a_few_lines(config):
    train, test = (
        Source(config, [10, 30, 20], step_frames=119),
        Source(config, [50], size=(320, 240), fps=12.5, name="w"),
    )
    test._native = 100
    train.skipped = [SkippedVideo("broken", "is cut off")]
    train.passed_over = {".txt": 2, ".mpg": 3}
    assert survey(config, {"train": train, "test": test}) == [
        "found: 5 videos, 4 usable, 1 skipped; other files, passed over: 3 .mpg, 2 .txt",
        "  used     110 of 219 frames (dataset.frame_step 2), 6 s",
        "  lengths  10 to 50, median 25 frames",
        "  sizes    160x120 (3), 320x240 (1) -> centred square, resized to 64x64",
        "  fps      25 (3), 12.5 (1), after frame_step",
        "train: 3 videos, 60 frames (10 to 30, median 20), 25 fps, 160x120 -> 64x64, skipped 1",
        "  skipped broken: is cut off",
        "test: 1 videos, 50 frames (50 to 50, median 50), 12.5 fps, 320x240 -> 64x64, skipped 0",
        "note: there is no val split",
    ]


def test_nothing_to_remark_on(config):
    sources = {split: Source(config, [12], name=split) for split in ("train", "val", "test")}
    assert remarks(config, sources) == []


def test_what_is_not_known_is_not_said(config):
    source = Source(config, [7], size=None)
    assert survey(config, {"train": source})[1].startswith("  used     7 frames (")
    assert survey(config, {"train": source})[3].startswith("  sizes    drawn ->")


def test_videos_too_short_to_learn_from_or_to_sample(config):
    sources = {"train": Source(config, [1, 2, 3, 2, 1, 90]), "val": Source(config, [9], name="w")}
    sources["test"] = Source(config, [9, 10, 11], name="x")
    assert remarks(config, sources) == [
        "note: 4 of the 6 train videos have fewer than 3 frames (the flow learns nothing from them): v0, v1, v3 and 1 "
        "more",
        "note: 1 of the 3 test videos have fewer than 10 frames (evaluation.context 4 + horizon 6: not sampled or "
        "measured): x0",
    ]


def test_a_few_videos_too_short_are_all_named(config):
    sources = {"train": Source(config, [2, 9, 1, 2])}
    (remark,) = [line for line in remarks(config, sources) if "train videos" in line]
    assert remark.endswith("(the flow learns nothing from them): v0, v2, v3")


def test_videos_smaller_than_the_frames(config):
    sources = {split: Source(config, [12], name=split) for split in ("train", "val", "test")}
    sources["train"] = Source(config, [12, 12], size=(200, 63))
    assert remarks(config, sources) == ["note: 2 videos smaller than 64x64, enlarged"]


def test_videos_that_are_in_two_splits(config):
    sources = {
        "train": Source(config, [12] * 5),
        "val": Source(config, [12], name="w"),
        "test": Source(config, [12] * 2),
    }
    assert remarks(config, sources) == [
        "warning: 2 of the 2 test videos are training videos too, to the byte: v0 is v0, v1 is v1"
    ]


def test_very_many_skipped_videos_are_counted(config):
    source = Source(config, [12])
    source.skipped = [SkippedVideo(f"b{i}", "is cut off") for i in range(60)]
    lines = describe({"train": source})
    assert len(lines) == 52
    assert lines[-1] == "  skipped 10 more"
