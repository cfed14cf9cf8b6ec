"""From an archive on a server that breaks off to predicted videos, in the layouts that BAIR and CLEVRER have."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import latent_cache
from pipelines.data import fetch
from tests import small_data_sets
from tests.file_server import FileServer, serving

BAIR = ("dataset.source=bair", "dataset.splits={val: 0.25}")
CLEVRER = ("dataset.source=clevrer", "dataset.splits={}", "dataset.frame_step=5")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Breaks off its first answer."""
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    with serving(tmp_path / "site") as running:
        running.break_offs = 1
        yield running


def ids(place) -> dict[str, list[str]]:
    return {split: list(latent_cache.open(place.store, split).video_ids) for split in latent_cache.splits(place.store)}


@pytest.mark.slow
def test_bair_from_a_site_to_predictions(place, site: FileServer, story: ModuleType) -> None:
    small_data_sets.write_bair_archive(site.folder, train=8, test=4, per_file=4, frames=12)
    place = place.with_sets(*BAIR)
    outcome = place.run("data", "--mirror", site.url).ok()
    assert ["bytes=" in asked for asked in site.asked] == [False, True]  # interrupted and resumed
    assert "train: 6 videos, 72 frames" in outcome.out
    assert "test: 4 videos, 48 frames" in outcome.out
    asked = len(site.asked)
    place.run("data", "--mirror", site.url).ok()
    assert len(site.asked) == asked

    place.run("sample", "--videos", "2").ok()
    found = ids(place)
    assert {split: len(videos) for split, videos in found.items()} == {"train": 6, "val": 2, "test": 4}
    assert found["test"] == [f"traj_0_to_3/{number}" for number in range(4)]
    assert len(list((place.runs / "samples").glob("*.mp4"))) == 2
    lines = (place.runs / "videos.tsv").read_text().splitlines()
    assert len(lines) == 13


@pytest.mark.long
def test_clevrer_from_a_site_to_predictions(place, site: FileServer, story: ModuleType) -> None:
    small_data_sets.write_clevrer_archives(site.folder, train=4, validation=2, test=2, frames=60)
    place = place.with_sets(*CLEVRER)
    outcome = place.run("data", "--mirror", site.url).ok()
    assert "train: 4 videos, 48 frames" in outcome.out
    assert "480x320 -> center square (67 % of the picture), resized to 32x32" in outcome.out
    place.run("sample", "--videos", "2", sets=["cache.views=[identity, jitter-1]"]).ok()
    assert ids(place) == {
        "train": [f"video_{number:05d}" for number in range(4) for _ in range(2)],
        "val": ["video_10000", "video_10001"],
        "test": ["video_15000", "video_15001"],
    }
    assert sorted(path.stem for path in (place.runs / "samples").glob("*.mp4")) == ["video_15000", "video_15001"]


def test_official_shards_to_predictions(place, fixtures: Path) -> None:
    """The shards of the official code's own converter, as its users have them."""
    place = place.with_sets("dataset.source=hdf5", "dataset.splits={val: 0.3, test: 0.3}")
    shutil.copytree(fixtures / "h5", place.data)
    place.run("sample", sets=["evaluation.horizon=2", "flow.training.batch_size=2"]).ok()
    found = ids(place)
    assert {split: len(videos) for split, videos in found.items()} == {"train": 1, "val": 1, "test": 1}
    (shown,) = (path.stem for path in (place.runs / "samples").glob("*.mp4"))
    assert shown == found["test"][0].replace("/", "_")
