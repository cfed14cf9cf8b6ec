"""What a user reads about the videos before any work is done, and the table of all of them."""

import csv
from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.config import RiverConfig, parse_config
from pipelines.data.video_summary import COLUMNS, summarize, write_video_list
from stage1_autoencoder.videos.source import SkippedVideo, VideoInfo, VideoSource, VideoTable


class Source(VideoSource):
    """Videos that are said to be there."""

    def __init__(self, config: RiverConfig, lengths, *, size=(160, 120), fps=25.0, name="v", native=None) -> None:
        self.dataset = config.dataset
        self.videos = VideoTable(
            VideoInfo(f"{name}{i}", frames, fps, f"digest {name}{i}", size) for i, frames in enumerate(lengths)
        )
        self.skipped = []
        self._native = native

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


@pytest.fixture
def three(config) -> dict[str, Source]:
    """A long enough video in each split."""
    return {split: Source(config, [12], name=split) for split in ("train", "val", "test")}


def warnings(config, sources) -> list[str]:
    return [line for line in summarize(config, sources) if line.startswith(("note: ", "warning: "))]


def test_everything_in_a_few_lines(config):
    train = Source(config, [10, 30, 20], native=119)
    test = Source(config, [50], size=(320, 240), fps=12.5, name="w", native=100)
    train.skipped = [SkippedVideo("broken", "is cut off")]
    train.passed_over = {".txt": 2, ".mpg": 3}
    assert summarize(config, {"train": train, "test": test}) == [
        "found: 5 videos, 4 usable, 1 skipped; other files, ignored: 3 .mpg, 2 .txt",
        "  used     110 of 219 frames (dataset.frame_step 2), 6 s",
        "  lengths  10 to 50, median 25 frames",
        "  sizes    160x120 (3), 320x240 (1) -> center square (75 % of the picture), resized to 64x64",
        "  fps      25 (3), 12.5 (1), after frame_step",
        "  store    110 latents of 4x8x8 float16, 56.3 kB",
        "train: 3 videos, 60 frames (10 to 30, median 20), 1 skipped",
        "test: 1 video, 50 frames (50 to 50, median 50), 0 skipped",
        "note: there is no val split",
    ]


@pytest.mark.parametrize(
    ("image_size", "fit", "expected"),
    [
        (64, "crop", "160x90 -> center square (56 % of the picture), resized to 64x64"),
        ([72, 128], "crop", "160x90 -> center part, resized to 128x72"),
        ([128, 72], "crop", "160x90 -> center part (32 % of the picture), resized to 72x128"),
        (64, "pad", "160x90 -> between black bars in 64x64"),
        ([64, 96], "stretch", "160x90 -> stretched to 96x64"),
    ],
)
def test_how_pictures_fit_and_how_much_of_them_is_used(config, image_size, fit, expected):
    dataset = config.dataset.model_copy(update={"image_size": image_size, "fit": fit})
    config = config.model_copy(update={"dataset": dataset})
    lines = summarize(config, {"train": Source(config, [12], size=(160, 90))})
    assert lines[3].endswith(f"  {expected}")
    enlarged = [line for line in lines if "enlarged" in line]
    assert enlarged == (["note: 1 video smaller than 72x128, enlarged"] if image_size == [128, 72] else [])


def test_nothing_unusual(config, three):
    assert warnings(config, three) == []


def test_what_is_not_known_is_not_said(config):
    lines = summarize(config, {"train": Source(config, [7], size=None)})
    assert lines[1].startswith("  used     7 frames (")
    assert lines[3].startswith("  sizes    drawn ->")


def test_videos_too_short_to_train_on_or_to_sample(config, three):
    three["train"] = Source(config, [1, 2, 3, 2, 1, 90])
    three["test"] = Source(config, [9, 10, 11], name="x")
    train, test = warnings(config, three)
    assert train.startswith("note: 4 of 6 train videos have fewer than 3 frames")
    assert train.endswith(": v0, v1, v3 and 1 more")
    assert test.startswith("note: 1 of 3 test videos have fewer than 10 frames (evaluation.context 4 + horizon 6")
    assert test.endswith(": x0")
    drawn = config.model_copy(update={"dataset": config.dataset.model_copy(update={"source": "shapes"})})
    assert warnings(drawn, three) == [train]  # shapes are simulated for as long as a clip needs


def test_videos_smaller_than_the_frames(config, three):
    three["train"] = Source(config, [12, 12], size=(200, 63))
    (line,) = warnings(config, three)
    assert "2 videos smaller than 64x64" in line


def test_videos_that_are_in_two_splits(config, three):
    three["train"], three["test"] = Source(config, [12] * 5), Source(config, [12] * 2)
    (line,) = warnings(config, three)
    assert line.startswith("warning: 2 of 2 test videos are also training videos")
    assert line.endswith(": v0 is v0, v1 is v1")


class Videos(list):
    """A source, as far as the list looks at it; ends in an error if it has one."""

    @property
    def videos(self):
        for video in self:
            if isinstance(video, Exception):
                raise video
            yield video


VIDEOS = [
    VideoInfo("a/b", 12, 25.0, "f" * 64, (160, 120)),
    VideoInfo('tab\there, "quoted"\nü', 3, 29.97003, "e 3:9", None),
]


def test_the_table_of_all_videos(tmp_path):
    path = tmp_path / "runs" / "mine" / "videos.tsv"
    assert write_video_list(path, {"train": Videos(VIDEOS), "test": Videos(VIDEOS[:1])}) == 3
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, dialect="excel-tab"))
    assert rows == [
        list(COLUMNS),
        ["train", "a/b", "12", "25", "160", "120", "f" * 64],
        ["train", 'tab\there, "quoted"\nü', "3", "29.97", "", "", "e 3:9"],
        ["test", "a/b", "12", "25", "160", "120", "f" * 64],
    ]
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_video_list(path, {"train": Videos([VIDEOS[1], OSError(28, "No space left on device")])})
    assert path.read_bytes() == before, "the old list stays"
    assert [file.name for file in path.parent.iterdir()] == ["videos.tsv"]
