"""Unpacking zip and tar: what is refused, what is damaged, and that an archive is unpacked completely or not at all."""

import io
import os
import random
import re
import shutil
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from pipelines.data import archives
from pipelines.data.archives import MARKER_NAME, ArchiveError, NoRoomError, Unpacked, check_beginning, read_marker

TAR_FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


MODES = {"set uid": 0o4755, "closed": 0, "open": 0o777}


def tar_entry(name: str, content: bytes = b"", **settings: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in settings.items():
        setattr(info, key, value)
    return info, content


def make_tar(folder: Path, entries: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(folder / "a.tar", "w", format=form) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return folder / "a.tar"


def make_zip(folder: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w", compression) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = compression
            archive.writestr(entry, content)
    return folder / "a.zip"


def make(kind: str, folder: Path, entries: dict[str, bytes]) -> Path:
    """An archive of files, and of folders where a name ends in a slash."""
    if kind == "zip":
        return make_zip(folder, entries)
    infos = [tar_entry(name, content, type=tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE)
             for name, content in entries.items()]  # fmt: skip
    return make_tar(folder, infos)


def unpack(archive: Path, folder: Path | None = None, **settings: str) -> Unpacked:
    return archives.unpack(archive, folder or archive.parent / "out" / "a", **settings)


def refused(archive: Path, *carried: str, **settings: str) -> None:
    """Refused with a message that carries the archive's path and more, and nothing is left."""
    with pytest.raises(ArchiveError, match=re.escape(str(archive))) as caught:
        unpack(archive, **settings)
    for text in carried:
        assert text in str(caught.value)
    out = archive.parent / "out"
    assert not out.exists() or list(out.iterdir()) == []


@pytest.fixture(params=["zip", "tar"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_unpacks_and_marks(tmp_path, kind, flushed):
    archive = make(kind, tmp_path, {"empty/": b"", "x.avi": b"x" * 9, "sub/y.avi": b"y"})
    marker = unpack(archive)
    out = tmp_path / "out/a"
    assert (out / "sub/y.avi").read_bytes() == b"y"
    assert marker == read_marker(out)
    assert marker == Unpacked(files={"x.avi": 9, "sub/y.avi": 1})
    assert (out / "x.avi").stat().st_mode & 0o111 == 0
    assert os.listdir(tmp_path / "out") == ["a"]
    assert {path.stat().st_ino for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))} <= flushed


@pytest.mark.parametrize("form", TAR_FORMATS)
def test_every_format_of_tar(tmp_path, form):
    names = ["top/" + "/".join(["deep" * 5] * 6) + "/c.tfrecords", "top/x.tfrecords", "top/empty", "./top/dot"]
    folder = tar_entry("top/", type=tarfile.DIRTYPE)
    archive = make_tar(tmp_path, [folder, *(tar_entry(name, name.encode()) for name in names)], TAR_FORMATS[form])
    assert len(unpack(archive, top="top", expected=".tfrecords").files) == 4
    for name in names:
        assert (tmp_path / "out/a" / name.removeprefix("./").removeprefix("top/")).read_bytes() == name.encode()


def test_a_marker_does_not_hold_when_files_are_missing_or_short(tmp_path):
    archive, out = make("zip", tmp_path, {"x": b"xxx", "sub/deep/y": b"y"}), tmp_path / "out/a"
    assert read_marker(out) is None
    unpack(archive)
    (out / "x").write_bytes(b"x")
    assert read_marker(out) is None
    (out / "own").write_bytes(b"mine")
    shutil.rmtree(out / "sub")
    unpack(archive)
    assert read_marker(out) is not None
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != MARKER_NAME} == {
        "x": b"xxx", "own": b"mine",
    }  # fmt: skip
    (out / "sub/deep/y").unlink()
    assert read_marker(out) is None
    unpack(archive)
    for damaged in ("{", "[]", '{"files": {"x": "y"}}'):
        (out / MARKER_NAME).write_text(damaged)
        assert read_marker(out) is None


@pytest.mark.parametrize(
    ("content", "meaning"),
    [
        (b"<!DOCTYPE html><html>404</html>", "HTML or XML page"),
        (b"\xef\xbb\xbf \n<html>", "HTML or XML page"),
        (b"", "empty"),
        (b"Rar!\x1a\x07", "Rar!"),
        (b"rubbish" * 90, "rubbish"),
        (bytes(10240), r"\x00"),
    ],
)
def test_what_is_no_archive_is_named(tmp_path, kind, content, meaning):
    (tmp_path / f"a.{kind}").write_bytes(content)
    refused(tmp_path / f"a.{kind}", f"not a whole {kind} archive", meaning)
    assert meaning in check_beginning(kind, content[:512])


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "..\\x", "C:/x", "__MACOSX/../../x"])
def test_entries_that_would_be_written_elsewhere(tmp_path, kind, name):
    refused(make(kind, tmp_path, {"good": b"1", name: b"bad"}), repr(name), "outside the folder")


@pytest.mark.parametrize(
    "names",
    [
        ["x", "./x"],
        ["a/x.avi", "a/X.avi"],
        ["n\u0303.avi", "\u00f1.avi"],
        ["x", "x/y"],
        ["x/y/z", "X/Y"],
    ],
)
def test_names_that_clash(tmp_path, kind, names):
    refused(make(kind, tmp_path, dict.fromkeys(names, b"1")), *map(repr, names))


def test_names_that_file_systems_refuse(tmp_path, kind):
    refused(make(kind, tmp_path, {"a\nb.avi": b""}), r"'a\nb.avi'")
    refused(make(kind, tmp_path, {"a/" * 10_000 + "b": b""}), "'a/a/")
    if kind == "tar":  # zipfile decodes any bytes
        refused(make_tar(tmp_path, [tar_entry("a\udcff.avi")]), r"'a\udcff.avi'")


@pytest.mark.parametrize(
    "member_type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"V"]
)
def test_tar_entries_that_are_no_plain_files(tmp_path, member_type):
    bad = tar_entry("bad", type=member_type, linkname="/etc/passwd" if member_type in b"12" else "")
    refused(make_tar(tmp_path, [tar_entry("good", b"1"), bad]), "'bad'", "no plain file")


def test_files_with_holes(tmp_path):
    refused(make_tar(tmp_path, [tar_entry("bad", b"1" * 512, type=tarfile.GNUTYPE_SPARSE)]), "'bad'", "sparse")
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "bad", "GNU.sparse.realsize": "1000000"}
    sparse = tar_entry("x", b"1\n0\n512\n".ljust(512, b"\0") + b"1" * 512, pax_headers=pax)
    refused(make_tar(tmp_path, [sparse], tarfile.PAX_FORMAT), "'bad'", "sparse")


def test_links_and_encrypted_entries_of_zips(tmp_path):
    archive = make_zip(tmp_path, {"x": b"x"})
    content = bytearray(archive.read_bytes())
    central = content.index(b"PK\x01\x02")
    linked, encrypted = content.copy(), content.copy()
    linked[central + 38 : central + 42] = ((stat.S_IFLNK | 0o777) << 16).to_bytes(4, "little")
    encrypted[central + 8] |= 1
    archive.write_bytes(linked)
    refused(archive, "'x'", "link")
    archive.write_bytes(encrypted)
    refused(archive, "'x'", "encrypted")


def test_modes_of_an_archive_are_ignored(tmp_path, kind):
    """No file of another's right, and none that cannot be read."""
    if kind == "tar":
        archive = make_tar(tmp_path, [tar_entry(name, b"x", mode=mode) for name, mode in MODES.items()])
    else:
        archive = tmp_path / "a.zip"
        with zipfile.ZipFile(archive, "w") as written:
            for name, mode in MODES.items():
                entry = zipfile.ZipInfo(name)
                entry.external_attr = (stat.S_IFREG | mode) << 16
                written.writestr(entry, b"x")
    before = os.umask(0o027)
    try:
        unpack(archive)
    finally:
        os.umask(before)
    for name in MODES:
        assert stat.S_IMODE((tmp_path / "out" / "a" / name).stat().st_mode) == 0o640


def claim(path: Path, size: int) -> Path:
    """Let the first entry of a tar claim a size, of which there is little."""
    content = bytearray(path.read_bytes())
    info = tarfile.TarInfo.frombuf(bytes(content[:512]), "utf-8", "surrogateescape")
    info.size = size
    content[:512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(content)
    return path


def test_archives_that_are_too_large(tmp_path, kind, monkeypatch):
    archive = make(kind, tmp_path, {"x": bytes(100_000)})
    with monkeypatch.context() as patched:
        patched.setattr(archives, "MAX_UNPACKED_BYTES", 50_000)
        refused(archive, "100.0 kB", "50.0 kB")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 9))
    refused(archive, "100.0 kB", "9 bytes", str(tmp_path / "out"), "dataset.root")
    with pytest.raises(NoRoomError):
        unpack(archive)


def test_sizes_that_are_claimed(tmp_path):
    archive = make("tar", tmp_path, {"x": b"1"})
    refused(claim(archive, 1 << 50), "1125899.9 GB", "68.7 GB")
    refused(claim(archive, 10**6), "not a whole tar archive")
    refused(claim(archive, -512), "not a whole tar archive", "-512")
    archive = make("zip", tmp_path, {"x": bytes(100_000)})
    content = archive.read_bytes()
    archive.write_bytes(content.replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    refused(archive, "'x' is damaged")


@pytest.mark.parametrize("header", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [1 << 40, 1 << 20, -512])
def test_headers_that_would_fill_the_memory(tmp_path, header, size):
    archive = claim(make_tar(tmp_path, [tar_entry("x", b"1" * 512, type=header), tar_entry("y", b"1")]), size)
    with archive.open("ab") as file:
        file.truncate(1 << 26)
    with pytest.raises(ArchiveError):  # what is imported and kept on first use
        unpack(make("tar", tmp_path, {}))
    tracemalloc.start()
    refused(archive)
    assert tracemalloc.get_traced_memory()[1] < 1 << 21
    tracemalloc.stop()


def test_headers_of_headers_without_end(tmp_path):
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    (tmp_path / "a.tar").write_bytes(header.tobuf() * 2000)
    refused(tmp_path / "a.tar")
    header.size = 30_000  # each is short enough, together they are not
    (tmp_path / "a.tar").write_bytes((header.tobuf() + bytes(30_208)) * 3)
    refused(tmp_path / "a.tar", f"{64 << 10} bytes")


def test_many_entries(tmp_path, kind, monkeypatch):
    """More headers of a tar than any one entry may have; and the limit of entries."""
    archive = make(kind, tmp_path, {f"{number}.avi": b"1" for number in range(200)})
    assert len(unpack(archive).files) == 200
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(archives, "MAX_ENTRIES", 199)
    refused(archive, "199 entries")


def test_hidden_files_are_ignored(tmp_path, kind):
    names = ["x.avi", "__MACOSX/x.avi", "sub/._y.avi", "sub/.DS_Store", "sub/y.avi", MARKER_NAME, ".git/z.avi"]
    assert set(unpack(make(kind, tmp_path, dict.fromkeys(names, b"1"))).files) == {"x.avi", "sub/y.avi"}


def test_another_archive_than_expected(tmp_path, kind):
    refused(make(kind, tmp_path, {"x.txt": b"1", "y.txt": b"1"}), ".mp4", "'x.txt', 'y.txt'", expected=".mp4")
    refused(make(kind, tmp_path, {"sub/": b""}), "no")
    unpack(make(kind, tmp_path, {"x.MP4": b"1"}), expected=".mp4")


def test_cut_off_anywhere(tmp_path, kind):
    archive = make(kind, tmp_path, {"a.avi": b"a" * 700, "b.avi": os.urandom(1024)})
    whole = archive.read_bytes()
    end = 3584 if kind == "tar" else len(whole)  # of tar: the first block of zeros
    for length in [*range(1, end, 97), end - 512, end - 1]:
        archive.write_bytes(whole[:length])
        refused(archive, f"not a whole {kind} archive")
    archive.write_bytes(whole[:end])
    assert len(unpack(archive).files) == 2


def test_a_damaged_header_is_no_end(tmp_path):
    archive = make("tar", tmp_path, {"x": b"1", "y": b"2", "z": b"3"})
    content = bytearray(archive.read_bytes())
    content[1024 + 5] ^= 0x55
    archive.write_bytes(content)
    refused(archive, "not a whole tar archive", "byte 1024")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_byte_is_named(tmp_path, compression):
    archive = make_zip(tmp_path, {"good.avi": b"good", "bad.avi": bytes(range(256)) * 20}, compression)
    content = bytearray(archive.read_bytes())
    content[content.index(b"bad.avi") + 100] ^= 0x55
    archive.write_bytes(content)
    refused(archive, "'bad.avi' is damaged")


def either_way(archive: Path) -> bool:
    """Unpacked completely, or refused with nothing left; whether it was refused."""
    try:
        unpack(archive)
    except ArchiveError as error:
        assert str(archive) in str(error)  # noqa: PT017 - either way is right
        assert list((archive.parent / "out").iterdir()) == []
        return True
    shutil.rmtree(archive.parent / "out/a")
    return False


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
def test_any_damage_of_a_zip_ends_in_a_message(tmp_path, compression):
    archive = make_zip(tmp_path, {"one.avi": b"one" * 40, "sub/two.avi": b"two" * 30}, compression)
    good, dice = archive.read_bytes(), random.Random(7)
    refusals = 0
    for _ in range(70):
        bad = bytearray(good)
        for _ in range(dice.choice([1, 3])):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        archive.write_bytes(bad)
        refusals += either_way(archive)
    assert refusals > 25


@pytest.mark.parametrize("form", TAR_FORMATS)
def test_any_damage_of_a_tar_ends_in_a_message(tmp_path, form):
    entries = [tar_entry("one", b"1" * 600), tar_entry("l" * 150, b"2"), tar_entry("ü" * 60, b"3", uname="ä")]
    archive = make_tar(tmp_path, entries[: 1 if form == "ustar" else 3], TAR_FORMATS[form])
    good, dice = archive.read_bytes(), random.Random(3)
    for _ in range(60):
        bad = bytearray(good)
        start = 512 * dice.randrange(len(good.rstrip(b"\0")) // 512 + 1)
        for _ in range(dice.choice([1, 4])):
            bad[start + dice.randrange(512)] = dice.randrange(256)
        if dice.random() < 0.7:  # with the right sum, so that it is believed
            block = bad[start : start + 512]
            block[148:156] = b" " * 8
            bad[start + 148 : start + 156] = b"%06o\0 " % sum(block)
        archive.write_bytes(bad)
        either_way(archive)


def test_a_large_file_in_blocks(tmp_path, kind):
    content = bytes(range(250)) * 13_000 + b"end"
    unpack(make(kind, tmp_path, {"x": content}))
    assert (tmp_path / "out/a/x").read_bytes() == content


def test_stopped_in_the_middle(tmp_path, kind, monkeypatch):
    archive = make(kind, tmp_path, {"x": b"x", "y": b"y"})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(archives, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            unpack(archive)
    assert os.listdir(tmp_path / "out") == []
    left = tmp_path / "out/.a.unpacking"  # by a run that was killed
    left.mkdir()
    (left / "z").write_bytes(b"old")
    unpack(archive)
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == [MARKER_NAME, "a", "x", "y"]


def test_stopped_while_older_files_are_replaced(tmp_path, monkeypatch):
    """Files of two archives with the same names and sizes are not taken for one of them."""
    unpack(make("zip", tmp_path, {"x": b"1", "y": b"1"}))
    replace, moved = Path.replace, []

    def stop(path: Path, target: Path) -> Path:
        if target.parent == tmp_path / "out/a":
            moved.append(target.name)
            if len(moved) == 2:
                raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            unpack(make("zip", tmp_path, {"x": b"2", "y": b"2"}))
    assert moved == ["x", "y"]
    assert read_marker(tmp_path / "out/a") is None


def test_a_folder_that_is_a_link_to_another_place(tmp_path, monkeypatch):
    """Everything happens there: it may be another disk, and a file cannot be renamed from one to another."""
    moves, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: (moves.append((path, target)), replace(path, target))[1])
    archive = make("zip", tmp_path, {"x": b"x"})
    (tmp_path / "big/a").mkdir(parents=True)
    (tmp_path / "a").symlink_to(tmp_path / "big/a")
    unpack(archive, tmp_path / "a")
    assert (tmp_path / "a").is_symlink()
    assert read_marker(tmp_path / "big/a") is not None
    assert os.listdir(tmp_path / "big") == ["a"]
    assert moves
    assert all(Path(path).is_relative_to(tmp_path / "big") for move in moves for path in move)
