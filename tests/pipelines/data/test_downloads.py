"""The archives of BAIR and CLEVRER, from folders and sites: what is downloaded, recorded, refused and planned."""

import dataclasses
import io
import json
import os
import re
import resource
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from pipelines.data.archives import read_marker
from pipelines.data.downloads import LOCK_NAME, PUBLISHED, Download
from pipelines.errors import UserError
from pipelines.runtime.files import file_sha256, locked
from stage1_autoencoder.videos import VideoError
from stage1_autoencoder.videos.config import DatasetConfig
from tests.file_server import FileServer, serving

BAIR = DatasetConfig(name="bair_64", source="bair", image_size=16)
CLEVRER = DatasetConfig(name="clevrer", source="clevrer", image_size=16)
TAR = "bair_robot_pushing_dataset_v0.tar"
ZIPS = {"train": "video_train.zip", "validation": "video_validation.zip", "test": "video_test.zip"}


def write_tar(path: Path, content: bytes = b"1") -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("train/a.tfrecords", "train/b.tfrecords", "test/c.tfrecords"):
            info = tarfile.TarInfo(f"softmotion30_44k/{name}")
            info.size = 5000
            archive.addfile(info, io.BytesIO(content * 5000))


def write_zips(folder: Path) -> None:
    for number, name in enumerate(ZIPS.values()):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(f"video_0-1/video_0000{number}.mp4", bytes(2000))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """The publishers' site of both data sets."""
    with serving(tmp_path / "site") as running:
        write_tar(running.folder / TAR)
        write_zips(running.folder)
        for folder, name in ZIPS.items():
            (running.folder / folder).mkdir()
            (running.folder / name).rename(running.folder / folder / name)
        for source, published in list(PUBLISHED.items()):
            monkeypatch.setitem(PUBLISHED, source, dataclasses.replace(published, url=running.url))
        yield running


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Download into `tmp_path / "data" / name`; the printed lines."""

    def run(dataset: DatasetConfig, mirror: str | Path | None = None) -> list[str]:
        capsys.readouterr()
        download(dataset, tmp_path, mirror).run()
        return capsys.readouterr().out.splitlines()

    return run


def download(dataset: DatasetConfig, tmp_path: Path, mirror: str | Path | None = None) -> Download:
    return Download(dataset, tmp_path / "data" / dataset.name, None if mirror is None else str(mirror))


def refused(run, dataset: DatasetConfig, *carried: str, mirror: str | Path | None = None) -> None:
    with pytest.raises((VideoError, UserError), match=re.escape(carried[0])) as caught:
        run(dataset, mirror)
    for text in carried:
        assert text in str(caught.value)


def tree(folder: Path) -> list[str]:
    """Files below a folder, but for the lock."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in files if LOCK_NAME not in name]


BAIR_TREE = [
    ".archives.json",
    "softmotion30_44k/.unpacked.json",
    "softmotion30_44k/test/c.tfrecords",
    "softmotion30_44k/train/a.tfrecords",
    "softmotion30_44k/train/b.tfrecords",
]


def test_bair_from_its_own_site(site, run, tmp_path):
    lines = run(BAIR)
    assert [line.split(":")[0] for line in lines] == ["softmotion30_44k"] * 3
    assert f"{site.url}/{TAR}" in lines[0]
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE
    (line,) = run(BAIR)
    assert "already unpacked, 3 files" in line
    assert site.asked == [f"/{TAR}"]


def test_clevrer_from_its_own_site(site, run, tmp_path):
    run(CLEVRER)
    assert site.asked == [f"/{folder}/{name}" for folder, name in ZIPS.items()]
    assert [name for name in tree(tmp_path / "data/clevrer") if name.endswith(".mp4")] == [
        "test/video_0-1/video_00002.mp4",
        "train/video_0-1/video_00000.mp4",
        "validation/video_0-1/video_00001.mp4",
    ]


@pytest.mark.parametrize("remote", [True, False])
def test_clevrer_from_a_mirror(site, run, tmp_path, remote):
    """Where all archives are in one folder, and stay."""
    folder = tmp_path / "site/mirror"
    folder.mkdir()
    write_zips(folder)
    mirror = f"{site.url}/mirror/" if remote else folder
    run(CLEVRER, mirror)
    assert tree(folder) == sorted(ZIPS.values())
    assert not [name for name in tree(tmp_path / "data") if name.endswith((".zip", ".part"))]
    assert len(site.asked) == (3 if remote else 0)
    assert all("already unpacked, 1 files" in line for line in run(CLEVRER, mirror))
    assert len(site.asked) == (3 if remote else 0)


def test_the_published_places():
    """What the publishers' pages say, and folders that do not overlap."""
    urls = {
        source: [f"{published.url}/{a.path}" for a in published.archives] for source, published in PUBLISHED.items()
    }
    assert urls["bair"] == ["http://rail.eecs.berkeley.edu/datasets/bair_robot_pushing_dataset_v0.tar"]
    assert urls["clevrer"] == [
        "http://data.csail.mit.edu/clevrer/videos/train/video_train.zip",
        "http://data.csail.mit.edu/clevrer/videos/validation/video_validation.zip",
        "http://data.csail.mit.edu/clevrer/videos/test/video_test.zip",
    ]
    assert urls["kth"][0] == "http://www.csc.kth.se/cvap/actions/boxing.zip"
    assert len(urls["kth"]) == 6
    for published in PUBLISHED.values():
        assert len({a.folder for a in published.archives}) == len({a.name for a in published.archives})
        assert {archive.name[-4:] for archive in published.archives} <= {".zip", ".tar"}


def test_an_interrupted_download_is_resumed(site, run, tmp_path):
    part = tmp_path / "data/bair_64" / f".{TAR}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes((tmp_path / "site" / TAR).read_bytes()[:6000])
    run(BAIR)
    assert site.asked == [f"/{TAR} bytes=6000-"]
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE


def test_what_was_stopped_while_unpacking_is_not_downloaded_again(site, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.data.archives.write_json", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(BAIR)
    assert tree(tmp_path / "data/bair_64") == [f".{TAR}"]
    run(BAIR)
    assert site.asked == [f"/{TAR}"]
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE


def test_a_page_instead_of_the_archive(site, run, tmp_path):
    site.page = b"<!DOCTYPE html><title>Gone</title>"
    refused(
        run, BAIR, f"{site.url}/{TAR}", "HTML or XML page", f"river data --config bair_64 --mirror <folder with {TAR}>"
    )
    assert tree(tmp_path / "data/bair_64") == []


def test_not_found(site, run, tmp_path):
    (tmp_path / "site/validation/video_validation.zip").unlink()
    refused(run, CLEVRER, "/video_validation.zip", "404", "--mirror <folder with video_train.zip")
    found = tree(tmp_path / "data/clevrer")
    assert "train/.unpacked.json" in found, "what came before it stays"
    assert not [name for name in found if "validation" in name or name.endswith((".zip", ".part"))]


def test_a_truncated_archive_is_removed_and_downloaded_again(site, run, tmp_path):
    whole = (tmp_path / "site" / TAR).read_bytes()
    (tmp_path / "site" / TAR).write_bytes(whole[:9000])
    refused(run, BAIR, TAR, "not a whole tar archive")
    assert tree(tmp_path / "data/bair_64") == []
    (tmp_path / "site" / TAR).write_bytes(whole)
    run(BAIR)
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE


def test_the_first_archive_is_recorded_and_later_ones_must_equal_it(site, run, tmp_path):
    root = tmp_path / "data/bair_64"
    run(BAIR)
    record = json.loads((root / ".archives.json").read_text())
    assert record[TAR] == {
        "sha256": file_sha256(tmp_path / "site" / TAR),
        "bytes": (tmp_path / "site" / TAR).stat().st_size,
        "from": f"{site.url}/{TAR}",
    }
    shutil.rmtree(root / "softmotion30_44k")
    run(BAIR)  # the same again

    shutil.rmtree(root / "softmotion30_44k")
    write_tar(tmp_path / "site" / TAR, b"2")
    refused(run, BAIR, f"{site.url}/{TAR}", record[TAR]["sha256"], str(root / ".archives.json"), str(root / f".{TAR}"))
    assert tree(root) == [".archives.json", f".{TAR}"]
    asked = len(site.asked)
    (root / ".archives.json").unlink()
    run(BAIR)
    assert len(site.asked) == asked, "it is not downloaded again"
    assert tree(root) == BAIR_TREE


def test_a_mirror_may_differ_from_the_first_archive(site, run, tmp_path):
    root = tmp_path / "data/bair_64"
    run(BAIR)
    record = (root / ".archives.json").read_text()
    shutil.rmtree(root / "softmotion30_44k")
    write_tar(tmp_path / TAR, b"2")
    assert any(line.startswith(f"warning: {tmp_path}/{TAR}") for line in run(BAIR, tmp_path))
    assert (root / "softmotion30_44k/test/c.tfrecords").read_bytes() == b"2" * 5000
    assert (root / ".archives.json").read_text() == record, "the first stays the first"


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}', f'{{"{TAR}": {{}}}}'])
def test_a_damaged_record(site, run, tmp_path, content):
    root = tmp_path / "data/bair_64"
    root.mkdir(parents=True)
    (root / ".archives.json").write_text(content)
    refused(run, BAIR, str(root / ".archives.json"), "remove it")
    assert not (root / "softmotion30_44k").exists()


def small_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))


def test_what_has_arrived_needs_no_space(site, run, tmp_path, monkeypatch):
    content = (tmp_path / "site" / TAR).read_bytes()
    part = tmp_path / "data/bair_64" / f".{TAR}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:-1000])
    small_disk(monkeypatch, len(content) + 999)
    refused(run, BAIR, str(tmp_path / "data/bair_64"))
    small_disk(monkeypatch, len(content) + 1000)
    run(BAIR)


def test_space_for_all_archives_is_needed_before_the_first(site, run, tmp_path, monkeypatch):
    (size,) = {path.stat().st_size for path in (tmp_path / "site").glob("*/*.zip")}
    # Each is removed once it is unpacked: three unpacked, and the last one beside them.
    small_disk(monkeypatch, 4 * size - 1)
    refused(run, CLEVRER, f"{3 * size / 1000:.1f} kB", f"{4 * size / 1000:.1f} kB", "data/clevrer", "dataset.root")
    assert site.asked == []
    small_disk(monkeypatch, 4 * size)
    run(CLEVRER)

    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data/clevrer").mkdir(parents=True)  # the space of one that is downloaded gets free
    shutil.copyfile(tmp_path / "site/train/video_train.zip", tmp_path / "data/clevrer/.video_train.zip")
    small_disk(monkeypatch, 3 * size)
    run(CLEVRER)


def test_too_little_space_to_unpack_keeps_what_was_downloaded(site, run, tmp_path, monkeypatch):
    """Archives may unpack to more than their own size."""
    with zipfile.ZipFile(tmp_path / "site/train/video_train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.mp4", bytes(10**6))
    small_disk(monkeypatch, 10**5)
    refused(run, CLEVRER, "video_train.zip", "1.0 MB", "100.0 kB")
    assert tree(tmp_path / "data/clevrer") == [".video_train.zip"]


def test_a_mirror_on_a_small_disk(run, tmp_path, monkeypatch):
    write_zips(tmp_path)
    size = (tmp_path / ZIPS["train"]).stat().st_size
    small_disk(monkeypatch, 3 * size - 1)
    refused(run, CLEVRER, f"{3 * size / 1000:.1f} kB", mirror=tmp_path)
    assert tree(tmp_path / "data") == []


def test_an_archive_is_removed_that_a_killed_run_had_unpacked(site, run, tmp_path):
    run(BAIR)
    shutil.copyfile(tmp_path / "site" / TAR, tmp_path / "data/bair_64" / f".{TAR}")
    run(BAIR)
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE


def test_what_a_killed_run_left_takes_no_space(site, run, tmp_path, monkeypatch):
    size = (tmp_path / "site" / TAR).stat().st_size
    left = tmp_path / "data/bair_64/.softmotion30_44k.unpacking/train/a.tfrecords"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"1")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0 if left.exists() else 2 * size)
    )
    run(BAIR)
    assert tree(tmp_path / "data/bair_64") == BAIR_TREE


def test_incomplete_mirrors(run, tmp_path):
    refused(run, BAIR, "--mirror /no/where", TAR, mirror="/no/where")
    refused(run, BAIR, "--mirror http://", "passwords", mirror="http://me:secret@127.0.0.1/x")
    write_zips(tmp_path)
    (tmp_path / "video_test.zip").unlink()
    refused(run, CLEVRER, f"--mirror {tmp_path}", "video_test.zip", mirror=tmp_path)
    assert not (tmp_path / "data").exists()


def test_a_disk_that_cannot_be_written(run, tmp_path):
    """As when it fills up, or may not be written: the error names the file, and the way out."""
    write_tar(tmp_path / TAR)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        refused(run, BAIR, str(tmp_path / "data/bair_64"), "File too large", "dataset.root", mirror=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert tree(tmp_path / "data") == []
    run(BAIR, tmp_path)


def test_where_nothing_is_missing_nothing_is_written(site, run, tmp_path):
    run(BAIR)
    root = tmp_path / "data/bair_64"
    (root / LOCK_NAME).unlink()
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    assert len(run(BAIR)) == 1
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before


def test_one_at_a_time(run, tmp_path):
    write_tar(tmp_path / TAR)
    root = tmp_path / "data/bair_64"
    with locked(root / LOCK_NAME, "busy"):
        refused(run, BAIR, str(root), str(os.getpid()), mirror=tmp_path)
    run(BAIR, tmp_path)


@pytest.mark.parametrize(
    ("dataset", "files", "line"),
    [
        (BAIR, ["softmotion30_44k/train/a.tfrecords"], "softmotion30_44k: 1 .tfrecords files"),
        (BAIR, ["train/a.tfrecords", "test/b.tfrecords"], "softmotion30_44k: 1 .tfrecords files"),
        (CLEVRER, ["train/a.mp4", "val/b.mp4", "test/c.mp4"], "validation: 1 .mp4 files"),
    ],
)
def test_what_users_put_there_is_used_as_it_is(run, tmp_path, dataset, files, line):
    for name in files:
        path = tmp_path / "data" / dataset.name / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
    lines = run(dataset)
    assert any(found.startswith(line) for found in lines), lines
    assert len(lines) == len(PUBLISHED[dataset.source].archives)


def test_an_incomplete_folder_is_completed_from_a_mirror_alone(site, run, tmp_path):
    run(BAIR)
    folder = tmp_path / "data/bair_64/softmotion30_44k"
    (folder / "train/a.tfrecords").unlink()
    (line,) = run(BAIR)
    assert "2 .tfrecords files" in line
    assert "changed" in line
    run(BAIR, site.url)
    assert read_marker(folder) is not None


def test_the_plan(site, run, tmp_path):
    root = tmp_path / "data/clevrer"
    plan = download(CLEVRER, tmp_path).plan()
    assert [line.split(": ")[0] for line in plan] == list(ZIPS)
    assert all(f"{site.url}/{folder}/{name}" in line for line, (folder, name) in zip(plan, ZIPS.items(), strict=True))
    assert not (tmp_path / "data").exists()
    mirror = tmp_path / "site/train"
    plan = download(CLEVRER, tmp_path, mirror).plan()
    assert f"{mirror}/video_train.zip (2." in plan[0]
    assert "missing" not in plan[0]
    assert f"{mirror}/video_validation.zip" in plan[1]
    assert "missing" in plan[1]
    root.mkdir(parents=True)
    (root / ".video_train.zip.part").write_bytes(bytes(1500))
    (root / ".video_test.zip").write_bytes(bytes(2500))
    plan = download(CLEVRER, tmp_path).plan()
    assert "1.5 kB" in plan[0]
    assert f"{root}/.video_test.zip (2.5 kB)" in plan[2]
    assert site.asked == []
    run(BAIR)
    assert "already unpacked, 3 files" in download(BAIR, tmp_path).plan()[0]
