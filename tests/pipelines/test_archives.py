"""Zip archives: what is refused, what is damaged, and that nothing half unpacked is left."""

import os
import stat
import types
import zipfile

import pytest

from pipelines import archives
from pipelines.archives import MARKER_NAME, ArchiveError, read_marker, sha1_of, unpack_zip


def make_zip(path, entries, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name) if isinstance(name, str) else name
            entry.compress_type = compression
            archive.writestr(entry, content)
    return path


def unpack(archive, folder, **settings):
    return unpack_zip(archive, folder, sha1=sha1_of(archive), **settings)


def test_unpacks_and_marks(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x.avi": b"x" * 9, "sub/y.avi": b"y", "empty/": b""})
    assert unpack(archive, tmp_path / "a") == 2
    assert (tmp_path / "a/sub/y.avi").read_bytes() == b"y"
    assert os.stat(tmp_path / "a/x.avi").st_mtime == 315532800, "1980-01-01, what the zip says, in any time zone"
    marker = read_marker(tmp_path / "a")
    assert marker == {
        "archive": "a.zip",
        "bytes": archive.stat().st_size,
        "sha1": sha1_of(archive),
        "files": {"x.avi": 9, "sub/y.avi": 1},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.zip"]


def test_a_mark_does_not_hold_when_files_are_missing_or_short(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x": b"xxx", "y": b"y"})
    assert read_marker(tmp_path / "a") is None
    unpack(archive, tmp_path / "a")
    (tmp_path / "a/x").write_bytes(b"x")
    assert read_marker(tmp_path / "a") is None
    (tmp_path / "a/own").write_bytes(b"mine")
    unpack(archive, tmp_path / "a")
    assert read_marker(tmp_path / "a") is not None
    assert (tmp_path / "a/x").read_bytes() == b"xxx"
    assert (tmp_path / "a/own").read_bytes() == b"mine"
    (tmp_path / "a/y").unlink()
    assert read_marker(tmp_path / "a") is None
    (tmp_path / "a" / MARKER_NAME).write_text("{")
    assert read_marker(tmp_path / "a") is None


@pytest.mark.parametrize(
    ("content", "meaning"),
    [
        (b"<!DOCTYPE html><html>404</html>", "an HTML or XML page, maybe the error page of a server"),
        (b"  \n<html>", "an HTML or XML page"),
        (b"", "it is empty"),
        (b"Rar!\x1a\x07", "a RAR archive"),
        (b"\x1f\x8b\x08", "it is gzip"),
        (b"rubbish" * 9, "it begins with b'rubbish"),
    ],
)
def test_what_is_no_zip_is_named(tmp_path, content, meaning):
    archive = tmp_path / "a.zip"
    archive.write_bytes(content)
    with pytest.raises(ArchiveError, match=rf"a\.zip: not a whole zip archive \(.*\): .*{meaning}.*; fetch it again"):
        unpack(archive, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_zip_that_was_cut_off(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x": bytes(5000)}, zipfile.ZIP_STORED)
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(ArchiveError, match="begins like a zip, but its end is missing: it was cut off"):
        unpack(archive, tmp_path / "a")


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "..\\x", "C:/x", "c:\\x"])
def test_entries_that_would_land_elsewhere(tmp_path, name):
    archive = make_zip(tmp_path / "a.zip", {"good": b"", name: b"bad"})
    with pytest.raises(ArchiveError, match=r"refused, its entry .* would land outside the folder"):
        unpack(archive, tmp_path / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive = make_zip(tmp_path / "a.zip", {link: b"/etc/passwd"})
    with pytest.raises(ArchiveError, match="'link' is a link or a device"):
        unpack(archive, tmp_path / "a")


def test_bombs_are_refused(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", {"x": bytes(100_000)})
    assert archive.stat().st_size < 1000
    with pytest.raises(ArchiveError, match="refused, it would unpack to 100000 bytes, more than 50000"):
        unpack(archive, tmp_path / "a", max_bytes=50_000)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=9))
    with pytest.raises(ArchiveError, match="needs 100000 bytes to unpack, but only 9 are free"):
        unpack(archive, tmp_path / "a")


def test_an_entry_longer_than_it_claims_is_damaged(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x": bytes(100_000)})
    content = archive.read_bytes()
    archive.write_bytes(content.replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(ArchiveError, match="its entry 'x' is damaged"):
        unpack(archive, tmp_path / "a")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_byte_is_named_and_nothing_stays(tmp_path, compression):
    archive = make_zip(tmp_path / "a.zip", {"good.avi": b"good", "bad.avi": bytes(range(256)) * 20}, compression)
    content = bytearray(archive.read_bytes())
    content[content.index(b"bad.avi") + 100] ^= 0x55
    archive.write_bytes(content)
    with pytest.raises(ArchiveError, match=r"a\.zip: its entry 'bad\.avi' is damaged \(.*\); fetch it again"):
        unpack(archive, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_encrypted_double_and_empty(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x": b"x"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(ArchiveError, match="'x' is encrypted; unpack it by hand"):
        unpack(archive, tmp_path / "a")
    with pytest.raises(ArchiveError, match="there are no files in it"):
        unpack(make_zip(tmp_path / "b.zip", {"sub/": b""}), tmp_path / "b")
    with pytest.raises(ArchiveError, match=r"refused, it has two entries './x'|two entries 'x'"):
        unpack(make_zip(tmp_path / "c.zip", {"x": b"1", "./x": b"2"}), tmp_path / "c")


def test_stopped_in_the_middle(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", {"x": b"x", "y": b"y"})

    def stop(archive, opened, entry, target):
        if entry.filename == "y":
            raise KeyboardInterrupt
        extract(archive, opened, entry, target)

    extract = archives._extract
    monkeypatch.setattr(archives, "_extract", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    monkeypatch.undo()
    (tmp_path / ".a.unpacking").mkdir()  # what a killed run leaves
    (tmp_path / ".a.unpacking/z").write_bytes(b"old")
    unpack(archive, tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [MARKER_NAME, "x", "y"]
