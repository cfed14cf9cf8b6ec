"""From an archive on a server that breaks off to predicted videos, in the layouts that BAIR and CLEVRER have."""

import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import latent_cache
from pipelines.data import fetch
from tests import small_data_sets

BAIR = ("dataset.source=bair", "dataset.splits={val: 0.25}")
CLEVRER = ("dataset.source=clevrer", "dataset.splits={}", "dataset.frame_step=5")


class Server(http.server.ThreadingHTTPServer):
    """A folder behind http: the first answer for each file breaks off in the middle."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, head: bool) -> None:
        file = self.server.folder / self.path.rpartition("/")[2]
        if not file.is_file():
            self.send_error(404)
            return
        content, wanted = file.read_bytes(), self.headers.get("Range")
        first = not head and not any(name == file.name for name, _ in self.server.asked)
        if not head:
            self.server.asked.append((file.name, wanted))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not head:
            self.wfile.write(content[start : len(content) // 2 if first else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    (tmp_path / "site").mkdir()
    with Server(tmp_path / "site") as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ids(place) -> dict[str, list[str]]:
    return {split: list(latent_cache.open(place.store, split).video_ids) for split in latent_cache.splits(place.store)}


@pytest.mark.slow
def test_bair_from_a_site_to_predictions(place, site: Server, story: ModuleType) -> None:
    small_data_sets.write_bair_archive(site.folder, train=8, test=4, a_file=4, frames=12)
    place = place.with_sets(*BAIR)
    outcome = place.run("data", "--mirror", site.url).ok()
    assert [wanted is None for name, wanted in site.asked] == [True, False]  # broken off, and gone on from
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


@pytest.mark.slow
def test_clevrer_from_a_site_to_predictions(place, site: Server, story: ModuleType) -> None:
    small_data_sets.write_clevrer_archives(site.folder, train=4, validation=2, test=2, frames=60)
    place = place.with_sets(*CLEVRER)
    outcome = place.run("data", "--mirror", site.url).ok()
    assert "train: 4 videos, 48 frames" in outcome.out
    assert "480x320 -> 32x32" in outcome.out
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
