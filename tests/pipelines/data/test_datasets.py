"""The raw videos of a run: KTH from mirrors of every kind, the user's own, what is recognized, reported and planned."""

import dataclasses
import functools
import io
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pipelines.config import RiverConfig, parse_config
from pipelines.data.datasets import open_videos, prepare_data, preview_data, videos_status
from pipelines.data.downloads import KTH_SHA1, PUBLISHED
from pipelines.errors import UserError
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import file_digest
from stage1_autoencoder.videos import VideoError
from tests import small_data_sets
from tests.file_server import FileServer, serving


@functools.cache
def tiny_video() -> bytes:
    content = io.BytesIO()
    with av.open(content, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((24, 32, 3), 30 * number, np.uint8), "rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return content.getvalue()


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    folder = tmp_path / "mirror"
    folder.mkdir()
    for action in KTH_SHA1:
        with zipfile.ZipFile(folder / f"{action}.zip", "w") as archive:
            for person in (1, 20, 21):
                archive.writestr(f"person{person:02d}_{action}_d1_uncomp.avi", tiny_video())
    ranges = "".join(f"person01_{action}_d1\t\tframes\t1-2, 3-6\n" for action in KTH_SHA1)
    (folder / "00sequences.txt").write_text(ranges)
    return folder


@pytest.fixture
def site(mirror: Path) -> Iterator[FileServer]:
    """The mirror behind http."""
    with serving(mirror) as running:
        yield running


class Story:
    """Commands on one data set below `tmp_path`; `lines` has what the last one printed."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.lines: list[str] = []

    def config(self, **dataset: object) -> RiverConfig:
        paths = {name: str(self.folder / name) for name in ("data", "latents", "runs")}
        return parse_config(
            {"paths": paths, "dataset": {"name": "kth", "source": "kth", "image_size": 16} | dataset}, ""
        )

    def call(self, function, mirror: object = None, **dataset: object):
        context = RunContext(torch.device("cpu"), mirror=None if mirror is None else str(mirror))
        self.capsys.readouterr()
        result = function(self.config(**dataset), context)
        self.lines = self.capsys.readouterr().out.splitlines()
        return result

    def counts(self, mirror: object = None, **dataset: object) -> dict[str, int]:
        """Videos by split, after `prepare_data`."""
        sources = self.call(prepare_data, mirror, **dataset)
        return {split: len(source.videos) for split, source in sources.items()}

    def refused(self, mirror: object, *carried: str, **dataset: object) -> None:
        with pytest.raises((VideoError, UserError), match=re.escape(carried[0])) as caught:
            self.call(prepare_data, mirror, **dataset)
        for text in carried:
            assert text in str(caught.value)


@pytest.fixture
def story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Story:
    return Story(tmp_path, capsys)


def test_kth_from_a_folder(story, mirror, tmp_path):
    assert videos_status(story.config()).state == "missing"
    story.call(preview_data, mirror)
    assert sum(f"{mirror}/{action}.zip" in line for line in story.lines for action in KTH_SHA1) == 6
    assert not (tmp_path / "data").exists()

    sources = story.call(prepare_data, mirror)
    assert {split: len(source.videos) for split, source in sources.items()} == {"train": 6, "val": 6, "test": 6}
    assert sources["train"].read(0).shape == (6, 16, 16, 3)
    assert sum(line.startswith("warning: ") and "sha1" in line for line in story.lines) == 6, "of a mirror: a warning"
    assert "boxing: unpacked 3 files" in story.lines
    assert "train: 6 videos, 36 frames (6 to 6, median 6), 0 skipped" in story.lines
    assert len((tmp_path / "runs/kth/videos.tsv").read_text().splitlines()) == 19
    assert (mirror / "boxing.zip").is_file()
    assert not list((tmp_path / "data/kth").glob("**/*.zip")), "unpacked from where they are, not copied"
    assert videos_status(story.config()).is_done

    story.call(preview_data)
    assert sum("already unpacked, 3 files" in line for line in story.lines) == 6
    assert story.counts(mirror) == {"train": 6, "val": 6, "test": 6}
    assert sum("already unpacked, 3 files" in line for line in story.lines) == 6
    story.counts()  # and asks no network for what is there


def test_kth_from_a_site(story, mirror, site, tmp_path):
    assert len(story.call(open_videos, site.url + "/")["test"].videos) == 6
    assert site.asked == [f"/{action}.zip" for action in KTH_SHA1]
    left = {path.name for path in (tmp_path / "data/kth").iterdir()}
    assert {name for name in left if name[0] != "."} == KTH_SHA1.keys()
    assert not [name for name in left if name.endswith((".zip", ".part"))]


def test_the_publishers_site_must_have_the_known_archives(story, mirror, site, tmp_path, monkeypatch):
    published = dataclasses.replace(PUBLISHED["kth"], url=site.url)
    monkeypatch.setitem(PUBLISHED, "kth", published)
    story.refused(None, f"{site.url}/boxing.zip", KTH_SHA1["boxing"], "--mirror <folder")
    assert not list((tmp_path / "data/kth").glob("*boxing*"))
    known = [dataclasses.replace(a, sha1=file_digest(mirror / a.name, "sha1")) for a in published.archives]
    monkeypatch.setitem(PUBLISHED, "kth", dataclasses.replace(published, archives=tuple(known)))
    assert story.counts()["train"] == 6
    assert site.asked.count("/boxing.zip") == 2


def test_no_network(story, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "kth", dataclasses.replace(PUBLISHED["kth"], url="http://127.0.0.1:9"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("pipelines.data.fetch.RETRIES", 0)
    story.refused(None, "http://127.0.0.1:9/boxing.zip", "river data --config kth --mirror ")


def test_sequences_are_taken_when_asked_for(story, mirror, tmp_path):
    cut = {"sequences": True, "splits": {"train": "1"}}
    story.counts(mirror)
    assert not (tmp_path / "data/kth/00sequences.txt").exists()
    assert videos_status(story.config(**cut)).state == "partial"
    story.call(preview_data, mirror, **cut)
    assert any(f"{mirror}/00sequences.txt" in line for line in story.lines)
    ranges = (mirror / "00sequences.txt").read_text()
    (mirror / "00sequences.txt").write_text("<html>")
    story.refused(mirror, "00sequences.txt", **cut)
    (mirror / "00sequences.txt").unlink()
    story.refused(mirror, str(mirror / "00sequences.txt"), "No such file", **cut)
    (mirror / "00sequences.txt").write_text(ranges)
    assert story.counts(mirror, **cut) == {"train": 12}
    assert story.counts(**cut) == {"train": 12}


def test_half_a_folder_is_completed(story, mirror, tmp_path):
    half = tmp_path / "data/kth/boxing"
    half.mkdir(parents=True)
    (half / "person01_boxing_d1_uncomp.avi").write_bytes(tiny_video()[:500])
    sources = story.call(prepare_data, mirror)
    assert len(sources["train"].videos) == 6
    assert not sources["train"].skipped


def test_bair_and_clevrer_in_their_true_formats(story, tmp_path):
    mirror = tmp_path / "mirror"
    small_data_sets.write_bair_archive(mirror, train=4, test=2, per_file=4, frames=3)
    small_data_sets.write_clevrer_archives(mirror, train=2, validation=1, test=1, frames=4)
    bair = {"name": "bair_64", "source": "bair", "splits": {"val": 0.25}}
    assert story.counts(mirror, **bair) == {"train": 3, "val": 1, "test": 2}
    assert story.counts(mirror, name="clevrer", source="clevrer") == {"train": 2, "val": 1, "test": 1}


def test_other_sources_are_indexed_and_reported(story, tmp_path):
    mine = {"name": "mine", "source": "videos", "image_size": 8}
    root = tmp_path / "data/mine"
    assert videos_status(story.config(**mine)).state == "missing"
    with pytest.raises(VideoError, match=re.escape(str(root))):
        story.call(preview_data, **mine)
    root.mkdir(parents=True)
    for number in range(3):
        (root / f"v{number}.avi").write_bytes(tiny_video())
    (root / "notes.mp4").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    story.call(preview_data, **mine)
    assert sorted(tmp_path.rglob("*")) == before
    assert sum("skipped video notes: " in line for line in story.lines) == 1
    story.counts("/somewhere", **mine)
    assert "--mirror" in story.lines[0]
    assert "train: 1 video, 6 frames (6 to 6, median 6), 1 skipped" in story.lines
    assert sum("notes" in line for line in story.lines) == 1
    assert videos_status(story.config(**mine)).is_done


def test_bair_at_256(story, tmp_path):
    bair = {"name": "bair_256", "source": "videos"}
    root = tmp_path / "data/bair_256"
    story.refused(None, str(root), f"{root}/{{train,val,test}}/<video>/<frame>.png", "dataset.root", **bair)
    root.mkdir(parents=True)
    (root / ".hidden").write_bytes(b"")
    story.refused(None, str(root), "dataset.root", **bair)


def test_shapes_need_nothing(story):
    shapes = {"name": "shapes", "source": "shapes", "splits": {"train": 3, "val": 1, "test": 1}}
    assert videos_status(story.config(**shapes)).is_done
    assert story.counts(**shapes) == {"train": 3, "val": 1, "test": 1}
    assert any("drawn -> center" in line for line in story.lines)
    story.call(preview_data, **shapes)
    assert any("drawn -> center" in line for line in story.lines)


SHARED = Path(os.environ.get("RIVER_SHARED", Path(__file__).parents[4] / "shared")) / "data" / "kth_mocap"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the KTH stand-in is not here (RIVER_SHARED)")
def test_the_stand_in(story):
    sources = story.call(prepare_data, SHARED)
    assert {split: len(source.videos) for split, source in sources.items()} == {"train": 228, "val": 12, "test": 60}
    assert sum(video.frames for source in sources.values() for video in source.videos) == 39080
    assert not any(source.skipped for source in sources.values())
