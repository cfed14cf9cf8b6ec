"""`make data`: KTH from mirrors of every kind, what is recognised, what is refused, and the report."""

import dataclasses
import functools
import http.server
import io
import os
import threading
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.data.archives import digest_of
from pipelines.data.datasets import describe, plan, prepare
from pipelines.data.downloads import KTH_SHA1, RECIPES
from stage1_autoencoder.videos import VideoError
from stage1_autoencoder.videos.config import DatasetConfig

KTH = DatasetConfig(name="kth", source="kth", image_size=16)


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
def mirror(tmp_path) -> Path:
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
def site(mirror, monkeypatch):
    """The mirror behind http, which notes what is asked for, beside sizes (HEAD)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_: object) -> None:
            if self.command == "GET":
                asked.append(self.path)

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=mirror)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def test_from_a_folder(mirror, tmp_path):
    planned = plan(KTH, tmp_path / "data", str(mirror))
    assert planned[1] == f"00sequences.txt: would come from {mirror}/00sequences.txt"
    assert all("would be unpacked from" in line for line in planned[2:])
    lines: list[str] = []
    sources = prepare(KTH, tmp_path / "data", str(mirror), lines.append)
    assert {split: len(source.videos) for split, source in sources.items()} == {"train": 6, "val": 6, "test": 6}
    assert sources["train"].read(0).shape == (6, 16, 16, 3)
    text = "\n".join(lines)
    assert text.count("is not that of the KTH archive") == 6, "a mirror's sha1 is a warning"
    assert "boxing: unpacked 3 files" in lines
    assert "train: 6 videos, 36 frames (6 to 6, median 6), 25 fps, 32x24 -> 16x16, skipped 0" in lines
    assert (mirror / "boxing.zip").is_file()
    assert not list((tmp_path / "data/kth").glob("**/*.zip")), "unpacked from where they lie, not copied"

    assert plan(KTH, tmp_path / "data", None)[1:] == [f"{action}: already unpacked, 3 files" for action in KTH_SHA1]
    again: list[str] = []
    prepare(KTH, tmp_path / "data", str(mirror), again.append)
    assert [line for line in again if "already unpacked, 3 files" in line] == again[:6]
    assert len(again) == 9
    prepare(KTH, tmp_path / "data", None, again.append)  # and asks no network for what is there
    with_sequences = KTH.model_copy(update={"sequences": True, "splits": {"train": "1"}})
    assert len(prepare(with_sequences, tmp_path / "data", None, again.append)["train"].videos) == 12


def test_from_a_site(mirror, site, tmp_path):
    url, asked = site
    lines: list[str] = []
    sources = prepare(KTH, tmp_path / "data", url + "/", lines.append)
    assert len(sources["test"].videos) == 6
    assert asked == ["/00sequences.txt", *(f"/{action}.zip" for action in KTH_SHA1)]
    left = {path.name for path in (tmp_path / "data/kth").iterdir()}
    assert {name for name in left if not name.startswith(".river_index")} == {*KTH_SHA1, "00sequences.txt"}


def test_the_projects_own_site_must_have_the_known_archives(mirror, site, tmp_path, monkeypatch):
    url, asked = site
    recipe = dataclasses.replace(RECIPES["kth"], url=url)
    monkeypatch.setitem(RECIPES, "kth", recipe)
    with pytest.raises(VideoError, match=r"/boxing\.zip: sha1 [0-9a-f]{40} is not the known adb36.*MIRROR=<folder"):
        prepare(KTH, tmp_path / "data", None, print)
    assert not list((tmp_path / "data/kth").glob("*boxing*"))
    known = [dataclasses.replace(archive, sha1=digest_of(mirror / archive.name, "sha1")) for archive in recipe.archives]
    monkeypatch.setitem(RECIPES, "kth", dataclasses.replace(recipe, archives=tuple(known)))
    assert len(prepare(KTH, tmp_path / "data", None, print)["train"].videos) == 6
    assert asked.count("/boxing.zip") == 2
    assert asked.count("/00sequences.txt") == 1


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "kth", dataclasses.replace(RECIPES["kth"], url="http://127.0.0.1:9"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("pipelines.data.fetch.time.sleep", lambda _: None)
    with pytest.raises(
        VideoError, match=r"http://127\.0\.0\.1:9/00sequences\.txt: .*refused.*make data DATASET=kth MIRROR="
    ):
        prepare(KTH, tmp_path / "data", None, print)


def test_mirrors_that_lack(mirror, tmp_path):
    with pytest.raises(VideoError, match="MIRROR=/no/where: no such folder, and no http"):
        prepare(KTH, tmp_path / "data", "/no/where", print)
    (mirror / "boxing.zip").unlink()
    (mirror / "walking.zip").unlink()
    with pytest.raises(VideoError, match=r"MIRROR=.*mirror: lacks boxing\.zip, walking\.zip; put them there"):
        prepare(KTH, tmp_path / "data", str(mirror), print)
    assert not (tmp_path / "data").exists()


def test_sequences_are_needed_only_when_asked_for(mirror, tmp_path):
    (mirror / "00sequences.txt").unlink()
    lines: list[str] = []
    prepare(KTH, tmp_path / "data", str(mirror), lines.append)
    assert any("warning: no 00sequences.txt" in line for line in lines)
    with pytest.raises(VideoError, match=r"00sequences\.txt: No such file"):
        prepare(KTH.model_copy(update={"sequences": True}), tmp_path / "data", str(mirror), print)
    (mirror / "00sequences.txt").write_text("<html>")
    with pytest.raises(VideoError, match="has no frame ranges"):
        prepare(KTH.model_copy(update={"sequences": True}), tmp_path / "data", str(mirror), print)


def test_a_page_in_place_of_an_archive(mirror, site, tmp_path):
    url, _ = site
    (mirror / "jogging.zip").write_text("<!DOCTYPE html><title>Gone</title>")
    for place in (str(mirror), url):
        with pytest.raises(VideoError, match=r"jogging\.zip: not a whole zip archive .* an HTML or XML page"):
            prepare(KTH, tmp_path / "data", place, print)
        assert not list((tmp_path / "data/kth").glob("*jogging*"))


def test_half_a_folder_is_completed(mirror, tmp_path):
    half = tmp_path / "data/kth/boxing"
    half.mkdir(parents=True)
    (half / "person01_boxing_d1_uncomp.avi").write_bytes(tiny_video()[:500])
    sources = prepare(KTH, tmp_path / "data", str(mirror), print)
    assert len(sources["train"].videos) == 6
    assert not sources["train"].skipped


def test_folders_that_the_user_unpacked_are_taken_as_they_are(mirror, tmp_path):
    for action in KTH_SHA1:
        with zipfile.ZipFile(mirror / f"{action}.zip") as archive:
            archive.extractall(tmp_path / "data/kth" / action)
    (tmp_path / "data/kth/00sequences.txt").write_text((mirror / "00sequences.txt").read_text())
    lines: list[str] = []
    prepare(KTH, tmp_path / "data", None, lines.append)
    assert sum("3 videos that were not unpacked by us, taken as they are" in line for line in lines) == 6


def test_another_archive_is_noticed(mirror, tmp_path):
    prepare(KTH, tmp_path / "data", str(mirror), lambda _: None)
    with zipfile.ZipFile(mirror / "boxing.zip", "a") as archive:
        archive.writestr("more.txt", "more")
    lines: list[str] = []
    prepare(KTH, tmp_path / "data", str(mirror), lines.append)
    assert any(line.startswith("boxing: already unpacked, 3 files, from another archive than") for line in lines)


def test_other_sources_are_indexed_and_reported(tmp_path):
    (tmp_path / "mine").mkdir()
    for number in range(3):
        (tmp_path / f"mine/v{number}.avi").write_bytes(tiny_video())
    (tmp_path / "mine/notes.mp4").write_text("text")
    lines: list[str] = []
    prepare(DatasetConfig(name="mine", source="videos", image_size=8), tmp_path, "/somewhere", lines.append)
    assert lines[0] == "MIRROR is not used: source 'videos' has nothing to fetch"
    assert lines[1].startswith("train: 1 videos, 6 frames (6 to 6, median 6), 25 fps, 32x24 -> 8x8, skipped 1")
    assert lines[2].startswith("  skipped notes: cannot be opened as a video")
    assert [line.split(":")[0] for line in lines[3:]] == ["val", "test"]


def test_shapes_need_nothing(tmp_path):
    shapes = DatasetConfig(name="shapes", source="shapes", image_size=16, splits={"train": 3, "val": 1, "test": 1})
    lines: list[str] = []
    sources = prepare(shapes, tmp_path, None, lines.append)
    assert list(sources) == ["train", "val", "test"]
    assert "drawn -> 16x16" in lines[0]
    assert lines == describe(sources)


SHARED = Path(os.environ.get("RIVER_SHARED", Path(__file__).parents[4] / "shared")) / "data" / "kth_mocap"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the KTH stand-in is not here (RIVER_SHARED)")
def test_the_stand_in(tmp_path):
    lines: list[str] = []
    sources = prepare(KTH, tmp_path, str(SHARED), lines.append)
    assert {split: len(source.videos) for split, source in sources.items()} == {"train": 228, "val": 12, "test": 60}
    assert sum(video.frames for source in sources.values() for video in source.videos) == 39080
    assert not any(source.skipped for source in sources.values())
