"""Unpacking, by zip archives: what is refused, what is damaged, and that nothing half unpacked is left."""

import os
import random
import shutil
import stat
import types
import zipfile

import pytest

from pipelines.data import archives
from pipelines.data.archives import MARKER_NAME, ArchiveError, NoRoomError, digest_of, read_marker


def make_zip(path, entries, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name) if isinstance(name, str) else name
            entry.compress_type = compression
            archive.writestr(entry, content)
    return path


def unpack(archive, folder, **settings):
    return archives.unpack(archive, folder, checksum={"sha1": digest_of(archive, "sha1")}, **settings)


def test_unpacks_and_marks(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x.avi": b"x" * 9, "sub/y.avi": b"y", "empty/": b""})
    assert unpack(archive, tmp_path / "a") == archives.Unpacked(2, [])
    assert (tmp_path / "a/sub/y.avi").read_bytes() == b"y"
    assert os.stat(tmp_path / "a/x.avi").st_mtime == 315532800, "1980-01-01, what the zip says, in any time zone"
    marker = read_marker(tmp_path / "a")
    assert marker == {
        "archive": "a.zip",
        "bytes": archive.stat().st_size,
        "sha1": digest_of(archive, "sha1"),
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


def test_folders_that_somebody_removed_come_back(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x": b"x", "sub/deep/y": b"y"})
    unpack(archive, tmp_path / "a")
    shutil.rmtree(tmp_path / "a/sub")
    unpack(archive, tmp_path / "a")
    assert (tmp_path / "a/sub/deep/y").read_bytes() == b"y"
    assert read_marker(tmp_path / "a") is not None


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
    with pytest.raises(ArchiveError, match=r"refused, it would unpack to 100\.0 kB or more, more than 50\.0 kB"):
        unpack(archive, tmp_path / "a", max_bytes=50_000)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=9))
    with pytest.raises(
        NoRoomError, match=r"a\.zip: needs 100\.0 kB to unpack, but only 9 bytes are free in .*make room"
    ):
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

    def stop(archive, reader, entry, target, advance):
        if entry.name == "y":
            raise KeyboardInterrupt
        extract(archive, reader, entry, target, advance)

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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/x.avi", "a/X.avi"], "its entries 'a/x.avi' and 'a/X.avi' differ only by upper and lower case"),
        (["n\u0303.avi", "\u00f1.avi"], "differ only by upper and lower case"),
        (["x", "x/y"], "its entry 'x' is a file, but 'x/y' needs a folder there"),
        (["x/y/z", "X/Y"], "its entry 'X/Y' is a file, but 'x/y/z' needs a folder there"),
        (["a\nb.avi"], r"its entry 'a\\nb.avi' has control characters in its name"),
        (["x.avi", MARKER_NAME], "its entry '.unpacked.json' has the name of the mark that unpacking leaves"),
    ],
)
def test_names_that_are_in_the_way_of_others(tmp_path, names, message):
    archive = make_zip(tmp_path / "a.zip", dict.fromkeys(names, b"1"))
    with pytest.raises(ArchiveError, match=rf"a\.zip: refused, .*{message}"):
        unpack(archive, tmp_path / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_litter_of_file_managers_is_passed_over(tmp_path):
    names = ["x.avi", "__MACOSX/._x.avi", "sub/._y.avi", "sub/.DS_Store", "sub/y.avi"]
    archive = make_zip(tmp_path / "a.zip", dict.fromkeys(names, b"1"))
    assert unpack(archive, tmp_path / "a") == archives.Unpacked(2, names[1:4])
    assert set(read_marker(tmp_path / "a")["files"]) == {"x.avi", "sub/y.avi"}
    with pytest.raises(ArchiveError, match="would land outside"):
        unpack(make_zip(tmp_path / "b.zip", {"x": b"", "__MACOSX/../../x": b""}), tmp_path / "b")


def test_a_top_folder_is_taken_off(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"top/x.avi": b"1", "top/": b"", "other/top/y.avi": b"1"})
    unpack(archive, tmp_path / "a", top="top")
    assert set(read_marker(tmp_path / "a")["files"]) == {"x.avi", "other/top/y.avi"}


def test_another_archive_than_expected(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x.txt": b"1", "y.txt": b"1"})
    with pytest.raises(
        ArchiveError, match=r"a\.zip: it has no \.mp4 files, but 2 others, such as 'x\.txt', 'y\.txt'; is"
    ):
        unpack(archive, tmp_path / "a", expected=".mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    unpack(make_zip(tmp_path / "b.zip", {"x.MP4": b"1"}), tmp_path / "b", expected=".mp4")


def test_too_many_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILES", 3)
    archive = make_zip(tmp_path / "a.zip", dict.fromkeys(["1", "2", "3", "4/"], b""))
    with pytest.raises(ArchiveError, match=r"a\.zip: refused, it has more than 3 entries"):
        unpack(archive, tmp_path / "a")


def test_a_folder_that_is_a_link_to_another_place(tmp_path, monkeypatch):
    """It is unpacked over there, which may be another disk: a file cannot be renamed from one to another."""
    moves = []
    replace = os.replace
    monkeypatch.setattr(archives.os, "replace", lambda *paths: (moves.append(paths), replace(*paths)))
    archive = make_zip(tmp_path / "a.zip", {"x": b"x"})
    (tmp_path / "big/a").mkdir(parents=True)
    (tmp_path / "a").symlink_to(tmp_path / "big/a")
    unpack(archive, tmp_path / "a")
    assert (tmp_path / "a").is_symlink()
    assert read_marker(tmp_path / "big/a") is not None
    assert [path.name for path in (tmp_path / "big").iterdir()] == ["a"]
    assert len(moves) == 2
    assert all(path.is_relative_to(tmp_path / "big") for move in moves for path in move)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_any_damage_ends_in_a_message(tmp_path, compression):
    """Bytes flipped anywhere: unpacked in full, or refused as an archive, and nothing lies about."""
    archive = make_zip(tmp_path / "a.zip", {"one.avi": b"one" * 40, "sub/two.avi": b"two" * 30}, compression)
    good, dice = archive.read_bytes(), random.Random(7)
    refused = 0
    for _ in range(70):
        bad = bytearray(good)
        for _ in range(dice.choice([1, 3])):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        archive.write_bytes(bad)
        try:
            unpack(archive, tmp_path / "out/a", max_bytes=1 << 20)
        except ArchiveError as error:
            assert "a.zip: " in str(error)  # noqa: PT017 - either way is right
            assert list((tmp_path / "out").iterdir()) == []
            refused += 1
        else:
            shutil.rmtree(tmp_path / "out/a")
    assert refused > 25
