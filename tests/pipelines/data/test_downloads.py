"""`make data` for BAIR and CLEVRER: from folders and sites, what is remembered, refused and planned."""

import dataclasses
import errno
import fcntl
import functools
import http.server
import io
import json
import os
import re
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.data import datasets, downloads
from pipelines.data.archives import MARKER_NAME, read_marker
from pipelines.data.datasets import plan, prepare
from pipelines.data.downloads import RECIPES, Recipe
from stage1_autoencoder.videos import VideoError
from stage1_autoencoder.videos.config import DatasetConfig

BAIR = DatasetConfig(name="bair_64", source="bair", image_size=16, splits={"val": 0.25})
CLEVRER = DatasetConfig(name="clevrer", source="clevrer", image_size=16)
TAR = "bair_robot_pushing_dataset_v0.tar"
ZIPS = ("video_train.zip", "video_validation.zip", "video_test.zip")
PAGE = b"<!DOCTYPE html><title>Gone</title>"


def write_tar(path: Path, content: bytes = b"1") -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("train/a.tfrecords", "train/b.tfrecords", "test/c.tfrecords"):
            info = tarfile.TarInfo(f"softmotion30_44k/{name}")
            info.size = 5000
            archive.addfile(info, io.BytesIO(content * 5000))


def write_zips(folder: Path) -> None:
    for number, name in enumerate(ZIPS):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(f"video_0-1/video_0000{number}.mp4", bytes(2000))


class Site(http.server.ThreadingHTTPServer):
    """A folder behind http; the attributes say how badly."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        self.heads = True
        self.page = False
        self.keep: int | None = None  # bytes after which answers break off
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Site

    def do_HEAD(self) -> None:
        if self.server.heads:
            super().do_HEAD()
        else:
            self.send_error(405)

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.path} {self.headers.get('Range', '')}".strip())
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = PAGE if self.server.page else path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : None if self.server.keep is None else start + self.server.keep])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("pipelines.data.fetch.time.sleep", lambda _: None)
    (tmp_path / "site").mkdir()
    with Site(tmp_path / "site") as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def unindexed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unpacked is not looked into: its files need be no videos."""
    monkeypatch.setattr(datasets, "open_splits", lambda *_: {})


@pytest.fixture
def own_site(site: Site, unindexed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The makers' own site for both data sets."""
    for source, recipe in list(RECIPES.items()):
        monkeypatch.setitem(RECIPES, source, dataclasses.replace(recipe, url=site.url))
    write_tar(tmp_path / "site" / TAR)
    write_zips(tmp_path / "site")
    for folder, name in zip(("train", "validation", "test"), ZIPS, strict=True):
        (tmp_path / "site" / folder).mkdir()
        (tmp_path / "site" / name).rename(tmp_path / "site" / folder / name)
    return site


def run(dataset: DatasetConfig, tmp_path: Path, mirror: str | None = None) -> list[str]:
    lines: list[str] = []
    prepare(dataset, tmp_path / "data", mirror, lines.append)
    return lines


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


BAIR_TREE = [
    ".archives.json",
    "softmotion30_44k/.unpacked.json",
    "softmotion30_44k/test/c.tfrecords",
    "softmotion30_44k/train/a.tfrecords",
    "softmotion30_44k/train/b.tfrecords",
]


@pytest.mark.parametrize("remote", [True, False])
def test_true_data_sets_from_a_mirror(site, tmp_path, remote):
    small_data_sets = pytest.importorskip("tests.small_data_sets")
    folder = tmp_path / "site"
    small_data_sets.write_bair_archive(folder, train=4, test=2, a_file=4, frames=3)
    small_data_sets.write_clevrer_archives(folder, train=2, validation=1, test=1, frames=4)
    mirror = site.url if remote else str(folder)
    before = tree(folder)
    lines: list[str] = []
    sources = prepare(BAIR, tmp_path / "data", mirror, lines.append)
    assert {split: len(source.videos) for split, source in sources.items()} == {"train": 3, "val": 1, "test": 2}
    assert "softmotion30_44k: unpacked 2 files" in lines
    sources = prepare(CLEVRER, tmp_path / "data", mirror, lines.append)
    assert {split: len(source.videos) for split, source in sources.items()} == {"train": 2, "val": 1, "test": 1}
    assert tree(folder) == before
    assert not [name for name in tree(tmp_path / "data") if name.endswith((".zip", ".tar", ".part"))]
    asked = len(site.asked)
    again: list[str] = []
    prepare(CLEVRER, tmp_path / "data", mirror, again.append)
    assert again[:3] == [f"{name}: already unpacked, {count} files" for name, count in
                         (("train", 2), ("validation", 1), ("test", 1))]  # fmt: skip
    assert len(site.asked) == asked


def test_bair_from_its_own_site(own_site, tmp_path):
    lines = run(BAIR, tmp_path)
    size = (tmp_path / "site" / TAR).stat().st_size
    assert lines == [
        f"softmotion30_44k: fetching {own_site.url}/{TAR} ({size / 1000:.1f} kB)",
        f"softmotion30_44k: checking and unpacking {own_site.url}/{TAR} ({size / 1000:.1f} kB)",
        "softmotion30_44k: unpacked 3 files",
    ]
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE
    assert run(BAIR, tmp_path) == ["softmotion30_44k: already unpacked, 3 files"]
    assert own_site.asked == [f"/{TAR}"]


def test_clevrer_from_its_own_site(own_site, tmp_path):
    run(CLEVRER, tmp_path)
    assert own_site.asked == [
        "/train/video_train.zip",
        "/validation/video_validation.zip",
        "/test/video_test.zip",
    ]
    assert [name for name in tree(tmp_path / "data/clevrer") if name.endswith(".mp4")] == [
        "test/video_0-1/video_00002.mp4",
        "train/video_0-1/video_00000.mp4",
        "validation/video_0-1/video_00001.mp4",
    ]


def test_the_published_places():
    """What the code asks for is what the data sets' makers publish."""
    urls = {source: [f"{recipe.url}/{a.path}" for a in recipe.archives] for source, recipe in RECIPES.items()}
    assert urls["bair"] == ["http://rail.eecs.berkeley.edu/datasets/bair_robot_pushing_dataset_v0.tar"]
    assert urls["clevrer"] == [
        "http://data.csail.mit.edu/clevrer/videos/train/video_train.zip",
        "http://data.csail.mit.edu/clevrer/videos/validation/video_validation.zip",
        "http://data.csail.mit.edu/clevrer/videos/test/video_test.zip",
    ]
    assert urls["kth"][0] == "http://www.csc.kth.se/cvap/actions/boxing.zip"
    assert [archive.kind for recipe in RECIPES.values() for archive in recipe.archives] == ["zip"] * 6 + [
        "tar", "zip", "zip", "zip",
    ]  # fmt: skip


def test_a_download_that_breaks_off_is_gone_on_from_by_the_next_command(own_site, tmp_path):
    own_site.keep = 0
    part = tmp_path / "data/bair_64" / f".{TAR}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes((tmp_path / "site" / TAR).read_bytes()[:6000])
    with pytest.raises(VideoError, match=rf"{TAR}: broke off after 6000 of .* 4 times in a row; get the archives by"):
        run(BAIR, tmp_path)
    assert part.stat().st_size == 6000
    own_site.keep = None
    lines = run(BAIR, tmp_path)
    assert re.search(r"fetching http.* \([\d.]+ kB, 6\.0 kB of them are here already\)", lines[0])
    assert own_site.asked[-1] == f"/{TAR} bytes=6000-"
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE


def test_what_was_stopped_while_unpacking_is_not_fetched_again(own_site, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.data.archives.os.utime", stop)
    with pytest.raises(KeyboardInterrupt):
        run(BAIR, tmp_path)
    assert tree(tmp_path / "data/bair_64") == [f".{TAR}"]
    monkeypatch.setattr("pipelines.data.archives.os.utime", os.utime)
    monkeypatch.undo()
    monkeypatch.setattr(datasets, "open_splits", lambda *_: {})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    run(BAIR, tmp_path, own_site.url)
    assert own_site.asked == [f"/{TAR}"]
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE


@pytest.mark.parametrize("heads", [True, False])
def test_a_page_in_place_of_the_archive(own_site, tmp_path, heads):
    own_site.page, own_site.heads = True, heads
    with pytest.raises(
        VideoError,
        match=rf"{own_site.url}/{TAR}: not a whole tar archive .*: it is an HTML or XML page, maybe the error page of "
        rf"a server; get the archives by other means .* make data DATASET=bair_64 MIRROR=<folder with {TAR}>",
    ):
        run(BAIR, tmp_path)
    assert tree(tmp_path / "data/bair_64") == []


def test_not_found(own_site, tmp_path):
    (tmp_path / "site/validation/video_validation.zip").unlink()
    with pytest.raises(
        VideoError, match=r"/video_validation\.zip: the server answers 404 .*MIRROR=<folder with video_t"
    ):
        run(CLEVRER, tmp_path)
    found = tree(tmp_path / "data/clevrer")
    assert "train/.unpacked.json" in found, "what came before it stays"
    assert not [name for name in found if "validation" in name or name.endswith((".zip", ".part"))]


def test_a_truncated_archive_is_removed_and_fetched_again(own_site, tmp_path):
    whole = (tmp_path / "site" / TAR).read_bytes()
    (tmp_path / "site" / TAR).write_bytes(whole[:9000])
    with pytest.raises(VideoError, match=rf"{TAR}: not a whole tar archive: .*fetch it again"):
        run(BAIR, tmp_path)
    assert tree(tmp_path / "data/bair_64") == []
    (tmp_path / "site" / TAR).write_bytes(whole)
    run(BAIR, tmp_path)
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE


def test_the_first_archive_is_remembered_and_held_to(own_site, tmp_path):
    root = tmp_path / "data/bair_64"
    run(BAIR, tmp_path)
    record = json.loads((root / ".archives.json").read_text())
    assert list(record) == [TAR]
    assert record[TAR]["sha256"] == read_marker(root / "softmotion30_44k")["sha256"]
    assert record[TAR]["from"] == f"{own_site.url}/{TAR}"
    shutil.rmtree(root / "softmotion30_44k")
    run(BAIR, tmp_path)  # the same again

    shutil.rmtree(root / "softmotion30_44k")
    write_tar(tmp_path / "site" / TAR, b"2")
    with pytest.raises(
        VideoError,
        match=rf"{own_site.url}/{TAR}: sha256 [0-9a-f]{{64}} is not {record[TAR]['sha256']}, .*\.archives\.json\): .*"
        rf"remove .*/\.{TAR} to fetch it again, or .*\.archives\.json to take it as it is",
    ):
        run(BAIR, tmp_path)
    assert tree(root) == [".archives.json", f".{TAR}"]
    asked = len(own_site.asked)
    (root / ".archives.json").unlink()
    run(BAIR, tmp_path)
    assert len(own_site.asked) == asked, "it need not come again"
    assert tree(root) == BAIR_TREE


def test_a_mirror_may_differ_from_the_first_archive(own_site, tmp_path):
    root = tmp_path / "data/bair_64"
    run(BAIR, tmp_path)
    record = (root / ".archives.json").read_text()
    shutil.rmtree(root / "softmotion30_44k")
    write_tar(tmp_path / TAR, b"2")
    lines = run(BAIR, tmp_path, str(tmp_path))
    assert any(
        re.match(rf"warning: {tmp_path}/{TAR}: sha256 .* is not .*that of the archive that", line) for line in lines
    )
    assert (root / "softmotion30_44k/test/c.tfrecords").read_bytes() == b"2" * 5000
    assert (root / ".archives.json").read_text() == record, "the first stays the first"


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}', f'{{"{TAR}": {{}}}}'])
def test_a_damaged_record(own_site, tmp_path, content):
    root = tmp_path / "data/bair_64"
    root.mkdir(parents=True)
    (root / ".archives.json").write_text(content)
    with pytest.raises(VideoError, match=r"\.archives\.json: not the record of checksums .*; remove it, and checksums"):
        run(BAIR, tmp_path)
    assert not (root / "softmotion30_44k").exists()


def small_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))


@pytest.mark.parametrize("heads", [True, False])
def test_a_disk_that_is_too_small(own_site, tmp_path, monkeypatch, heads):
    own_site.heads = heads
    size = (tmp_path / "site" / TAR).stat().st_size
    small_disk(monkeypatch, 2 * size - 1)
    words = f"{size / 1000:.1f} kB"
    with pytest.raises(
        VideoError,
        match=rf"{words} to fetch and about {words} to unpack need {2 * size / 1000:.1f} kB, but only .* kB are free "
        rf"in .*bair_64; make room there, or set dataset.root",
    ):
        run(BAIR, tmp_path)
    assert own_site.asked == ([] if heads else [f"/{TAR}"])
    assert tree(tmp_path / "data") == []
    small_disk(monkeypatch, 2 * size)
    run(BAIR, tmp_path)


def test_what_has_arrived_needs_no_room(own_site, tmp_path, monkeypatch):
    content = (tmp_path / "site" / TAR).read_bytes()
    part = tmp_path / "data/bair_64" / f".{TAR}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:-1000])
    small_disk(monkeypatch, len(content) + 1000)
    run(BAIR, tmp_path)


def test_room_for_all_archives_is_asked_before_the_first(own_site, tmp_path, monkeypatch):
    sizes = [path.stat().st_size for path in (tmp_path / "site").glob("*/*.zip")]
    # Each is removed once it is unpacked: three unpacked, and the last one beside them.
    small_disk(monkeypatch, 4 * sizes[0] - 1)
    with pytest.raises(VideoError, match=r"6\.\d kB to fetch and about 6\.\d kB to unpack need 8\.\d kB, but only"):
        run(CLEVRER, tmp_path)
    assert own_site.asked == []
    small_disk(monkeypatch, 4 * sizes[0])
    run(CLEVRER, tmp_path)


def test_no_room_to_unpack_keeps_what_was_fetched(own_site, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "check_room", lambda *_: None)
    small_disk(monkeypatch, 100)
    with pytest.raises(VideoError, match=rf"{TAR}: needs 15\.0 kB to unpack, but only 100 bytes are free"):
        run(BAIR, tmp_path)
    assert tree(tmp_path / "data/bair_64") == [f".{TAR}"]


def test_a_mirror_folder_on_a_small_disk(unindexed, tmp_path, monkeypatch):
    write_zips(tmp_path)
    size = (tmp_path / ZIPS[0]).stat().st_size
    small_disk(monkeypatch, 3 * size - 1)
    with pytest.raises(VideoError, match=r"0 bytes to fetch and about 6\.\d kB to unpack need 6\.\d kB, but only"):
        run(CLEVRER, tmp_path, str(tmp_path))
    assert tree(tmp_path / "data") == []


def test_what_a_killed_run_left_takes_no_room(own_site, tmp_path, monkeypatch):
    size = (tmp_path / "site" / TAR).stat().st_size
    left = tmp_path / "data/bair_64/.softmotion30_44k.unpacking/train/a.tfrecords"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"1")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0 if left.exists() else 2 * size)
    )
    run(BAIR, tmp_path)
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE


def test_mirrors_that_lack(unindexed, tmp_path):
    with pytest.raises(VideoError, match=f"MIRROR=/no/where: no such folder, and no http.*it must hold {TAR}"):
        run(BAIR, tmp_path, "/no/where")
    write_zips(tmp_path)
    (tmp_path / "video_test.zip").unlink()
    with pytest.raises(VideoError, match=r"MIRROR=.*: lacks video_test\.zip; put them there, or name another folder"):
        run(CLEVRER, tmp_path, str(tmp_path))
    assert not (tmp_path / "data").exists()


def test_another_archive_under_the_name(unindexed, tmp_path):
    (tmp_path / "mirror").mkdir()
    write_zips(tmp_path / "mirror")
    with zipfile.ZipFile(tmp_path / "mirror/video_train.zip", "w") as archive:
        archive.writestr("proposals/1.json", "{}")
    with pytest.raises(
        VideoError, match=r"video_train\.zip: it has no \.mp4 files, but 1 others, such as 'proposals/1"
    ):
        run(CLEVRER, tmp_path, str(tmp_path / "mirror"))
    assert tree(tmp_path / "data") == []


def test_permissions(unindexed, tmp_path, monkeypatch):
    write_tar(tmp_path / TAR)

    def denied(self: Path, *arguments: object, **settings: object) -> object:
        if self.name == TAR:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *arguments, **settings)

    opened = Path.open
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(
        VideoError, match=rf"/{TAR}: Permission denied; it must be readable, and what is written to must"
    ):
        run(BAIR, tmp_path, str(tmp_path))
    monkeypatch.undo()

    def read_only(path: object, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(VideoError, match=r"/bair_64: Read-only file system; set dataset\.root to a folder that can be"):
        run(BAIR, tmp_path, str(tmp_path))


def test_a_folder_that_may_not_be_written_to(unindexed, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may")
    write_tar(tmp_path / TAR)
    (tmp_path / "data").mkdir(mode=0o500)
    with pytest.raises(VideoError, match="Permission denied; it must be readable"):
        run(BAIR, tmp_path, str(tmp_path))


def test_the_disk_fills_up_while_unpacking(unindexed, tmp_path, monkeypatch):
    write_tar(tmp_path / TAR)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipelines.data.archives.os.utime", full)
    with pytest.raises(VideoError, match="bair_64: No space left on device; make room there; what is done is kept"):
        run(BAIR, tmp_path, str(tmp_path))
    assert tree(tmp_path / "data") == []


def test_all_there_writes_nothing(own_site, tmp_path, monkeypatch):
    run(BAIR, tmp_path)
    monkeypatch.setattr(Path, "mkdir", None)
    monkeypatch.setattr(downloads, "only_one_here", None)
    assert run(BAIR, tmp_path) == ["softmotion30_44k: already unpacked, 3 files"]


def test_one_at_a_time(unindexed, tmp_path):
    write_tar(tmp_path / TAR)
    root = tmp_path / "data/bair_64"
    root.mkdir(parents=True)
    descriptor = os.open(root, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(VideoError, match=r"bair_64: another process fetches or unpacks here; wait for it, or stop it"):
        run(BAIR, tmp_path, str(tmp_path))
    os.close(descriptor)
    run(BAIR, tmp_path, str(tmp_path))


@pytest.mark.parametrize(
    ("dataset", "files", "line"),
    [
        (
            BAIR,
            ["softmotion30_44k/train/a.tfrecords"],
            "softmotion30_44k: 1 .tfrecords files that were not unpacked by us",
        ),
        (
            BAIR,
            ["train/a.tfrecords", "test/b.tfrecords"],
            "softmotion30_44k: 1 .tfrecords files that were not unpacked",
        ),
        (
            CLEVRER,
            ["train/a.mp4", "val/b.mp4", "test/c.mp4"],
            "validation: 1 videos that were not unpacked by us, taken",
        ),
    ],
)
def test_what_users_put_there_is_taken_as_it_is(unindexed, tmp_path, dataset, files, line):
    for name in files:
        path = tmp_path / "data" / dataset.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    lines = run(dataset, tmp_path)
    assert any(found.startswith(line) for found in lines), lines
    assert len(lines) == len(RECIPES[dataset.source].archives)


def test_what_is_not_all_that_was_unpacked_is_said(own_site, tmp_path):
    run(BAIR, tmp_path)
    folder = tmp_path / "data/bair_64/softmotion30_44k"
    (folder / "train/a.tfrecords").unlink()
    (line,) = run(BAIR, tmp_path)
    assert "2 .tfrecords files that are not all that was unpacked, or not the same, taken as they are" in line
    run(BAIR, tmp_path, own_site.url)
    assert read_marker(folder) is not None


def test_bair_at_256(tmp_path, unindexed):
    dataset = DatasetConfig(name="bair_256", source="videos", image_size=16)
    lines: list[str] = []
    root = tmp_path / "bair_256"
    message = (
        r"bair_256 cannot be fetched: put the frames there, as .*bair_256/\{train,val,test\}/<video>/<frame>\.png, or"
    )
    with pytest.raises(VideoError, match=f"there is no such folder, and {message}"):
        prepare(dataset, tmp_path, "/mirror", lines.append)
    assert lines[0] == "MIRROR is not used: source 'videos' has nothing to fetch"
    assert "exists only as folders of frames that other projects made" in lines[1]
    root.mkdir()
    (root / ".hidden").write_bytes(b"")
    with pytest.raises(VideoError, match=f"it is empty, and {message}"):
        prepare(dataset, tmp_path, None, lines.append)
    (root / "train/v").mkdir(parents=True)
    prepare(dataset, tmp_path, None, lines.append)
    assert any("exists only as folders of frames" in line for line in plan(dataset, tmp_path, None))


def test_the_plan(own_site, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 55 * 10**9))
    data, root = tmp_path / "data", tmp_path / "data/clevrer"
    assert plan(CLEVRER, data, None) == [
        f"raw videos   {root}, 55.0 GB free",
        f"train: would be fetched from {own_site.url}/train/video_train.zip",
        f"validation: would be fetched from {own_site.url}/validation/video_validation.zip",
        f"test: would be fetched from {own_site.url}/test/video_test.zip",
    ]
    assert not data.exists()
    mirror = tmp_path / "site/train"
    lines = plan(CLEVRER, data, str(mirror))
    assert lines[1].startswith(f"train: would be unpacked from {mirror}/video_train.zip (2.")
    assert lines[2] == f"validation: would be unpacked from {mirror}/video_validation.zip, but that is missing"
    root.mkdir(parents=True)
    (root / ".video_train.zip.part").write_bytes(bytes(1500))
    (root / ".video_test.zip").write_bytes(bytes(2500))
    lines = plan(CLEVRER, data, None)
    assert lines[1].endswith("/video_train.zip, going on from the 1.5 kB that are here")
    assert lines[3] == f"test: would be unpacked from {root}/.video_test.zip (2.5 kB), which is fetched already"
    assert own_site.asked == []
    run(BAIR, tmp_path)
    assert plan(BAIR, data, None)[1:] == ["softmotion30_44k: already unpacked, 3 files"]
    with pytest.raises(VideoError, match="MIRROR=/no/where: no such folder"):
        plan(BAIR, data, "/no/where")


def test_the_plan_where_nothing_is_fetched(tmp_path):
    shapes = DatasetConfig(name="shapes", source="shapes", image_size=16)
    assert plan(shapes, tmp_path, None) == ["raw videos   drawn, nothing to fetch"]
    mine = DatasetConfig(name="mine", source="videos", image_size=16)
    (line,) = plan(mine, tmp_path, None)
    assert line == f"raw videos   {tmp_path}/mine, there is no such folder yet; source 'videos' has nothing to fetch"
    (tmp_path / "mine").mkdir()
    assert "mine, is there; source" in plan(mine, tmp_path, None)[0]


def test_recipes_name_folders_that_are_apart():
    for recipe in RECIPES.values():
        assert isinstance(recipe, Recipe)
        folders = [archive.folder for archive in recipe.archives]
        assert len(set(folders)) == len({archive.name for archive in recipe.archives}) == len(folders)
        assert MARKER_NAME not in folders
