"""Tar archives: every format of them, what is refused, what is damaged, and that nothing half unpacked is left."""

import io
import random
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from pipelines.data import archives
from pipelines.data import archives as archives_tar
from pipelines.data.archives import ArchiveError, Unpacked, check_beginning, read_marker, unpack

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
FILES = {"softmotion30_44k/train/a.tfrecords": b"a" * 700, "softmotion30_44k/test/b.tfrecords": b"b" * 1024}


def entry(name: str, content: bytes = b"", **settings: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), 1_000_000_000
    for key, value in settings.items():
        setattr(info, key, value)
    return info, content


def make_tar(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return path


def unpack_tar(archive: Path, folder: Path, **settings: object) -> Unpacked:
    return unpack(archive, folder, checksum={"sha256": "0"}, kind="tar", **settings)


def refused(archive: Path, message: str, **settings: object) -> None:
    """It is refused by a message that names the archive, and nothing is left."""
    out = archive.parent / "out"
    with pytest.raises(ArchiveError, match=rf"a\.tar: {message}"):
        unpack_tar(archive, out / "a", **settings)
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(tmp_path, form):
    long = "softmotion30_44k/" + "/".join(["deep" * 5] * 6) + "/c.tfrecords"
    files = FILES | {long: b"c", "softmotion30_44k/test/empty.tfrecords": b""}
    folder = entry("softmotion30_44k/train", type=tarfile.DIRTYPE)
    archive = make_tar(tmp_path / "a.tar", [folder, *(entry(*file) for file in files.items())], FORMATS[form])
    unpacked = unpack_tar(archive, tmp_path / "out/a", top="softmotion30_44k", expected=".tfrecords")
    assert unpacked == Unpacked(4, [])
    for name, content in files.items():
        path = tmp_path / "out/a" / name.removeprefix("softmotion30_44k/")
        assert path.read_bytes() == content
        assert path.stat().st_mtime == 1_000_000_000
        assert path.stat().st_mode & 0o111 == 0
    marker = read_marker(tmp_path / "out/a")
    assert marker["sha256"] == "0"
    assert len(marker["files"]) == 4
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_names_as_tar_gives_them_for_a_dot(tmp_path):
    archive = make_tar(tmp_path / "a.tar", [entry("./", type=tarfile.DIRTYPE), entry("./top/x.tfrecords", b"1")])
    unpack_tar(archive, tmp_path / "a", top="top")
    assert set(read_marker(tmp_path / "a")["files"]) == {"x.tfrecords"}


def test_litter_is_passed_over(tmp_path):
    archive = make_tar(tmp_path / "a.tar", [entry("x/._y", b"1"), entry("x/y", b"1"), entry("__MACOSX/z", b"1")])
    assert unpack_tar(archive, tmp_path / "out") == Unpacked(1, ["x/._y", "__MACOSX/z"])


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "..\\x", "C:/x"])
@pytest.mark.parametrize("form", FORMATS)
def test_entries_that_would_land_elsewhere(tmp_path, name, form):
    archive = make_tar(tmp_path / "a.tar", [entry("good", b"1"), entry(name, b"bad")], FORMATS[form])
    refused(archive, "refused, its entry .* would land outside the folder")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "a symbolic link to '/etc/passwd'"),
        (tarfile.LNKTYPE, "a hard link to '/etc/passwd'"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (b"V", "of the unknown kind b'V'"),
    ],
)
def test_what_is_no_plain_file(tmp_path, kind, message):
    link = "/etc/passwd" if "link" in message else ""
    archive = make_tar(tmp_path / "a.tar", [entry("good", b"1"), entry("bad", type=kind, linkname=link)])
    refused(archive, rf"refused, its entry 'bad' is {message}")


def test_files_with_holes(tmp_path):
    sparse = entry("bad", b"1" * 512, type=tarfile.GNUTYPE_SPARSE)
    refused(make_tar(tmp_path / "a.tar", [sparse]), "refused, its entry 'bad' is a file with holes")
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "bad", "GNU.sparse.realsize": "1000000"}
    sparse = entry("x", b"1\n0\n512\n".ljust(512, b"\0") + b"1" * 512, pax_headers=pax)
    refused(make_tar(tmp_path / "a.tar", [sparse], tarfile.PAX_FORMAT), "refused, its entry 'bad' is a file with holes")


def test_double_names(tmp_path):
    refused(make_tar(tmp_path / "a.tar", [entry("x", b"1"), entry("x", b"2")]), "refused, it has two entries 'x'")
    refused(make_tar(tmp_path / "a.tar", [entry("x"), entry("X")]), "refused, its entries 'x' and 'X' differ only by")


def test_too_large(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "a.tar", [entry(*file) for file in FILES.items()])
    refused(archive, r"refused, it would unpack to 1\.7 kB or more, more than 1\.0 kB", max_bytes=1000)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 99))
    refused(archive, r"needs 1\.7 kB to unpack, but only 99 bytes are free in .*out; make room there")


def claim(path: Path, size: int, at: int = 0) -> Path:
    """Let an entry claim a size, of which there is little."""
    content = bytearray(path.read_bytes())
    info = tarfile.TarInfo.frombuf(bytes(content[at : at + 512]), "utf-8", "surrogateescape")
    info.size = size
    content[at : at + 512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(content)
    return path


def test_bombs(tmp_path):
    archive = make_tar(tmp_path / "a.tar", [entry("x", b"1")])
    refused(claim(archive, 1 << 50), r"refused, it would unpack to 1125899\.9 GB or more, more than 34\.4 GB")
    refused(claim(archive, 10**6), "not a whole tar archive: .*unexpected end of data")
    refused(claim(archive, -512), "not a whole tar archive: its entry 'x' claims -512 bytes")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [1 << 40, 1 << 20, -512])
def test_headers_that_would_fill_the_memory(tmp_path, kind, size):
    archive = claim(make_tar(tmp_path / "a.tar", [entry("x", b"1" * 512, type=kind), entry("y", b"1")]), size)
    with archive.open("ab") as file:
        file.truncate(1 << 26)
    tracemalloc.start()
    refused(archive, r"refused, an entry's header is longer than 65536 bytes, or says so")
    assert tracemalloc.get_traced_memory()[1] < 1 << 21
    tracemalloc.stop()


def test_headers_of_headers_without_end(tmp_path):
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    (tmp_path / "a.tar").write_bytes(header.tobuf() * 2000)
    refused(tmp_path / "a.tar", "(refused, an entry's header is longer|not a whole tar archive: an entry's header)")


def test_many_entries(tmp_path):
    archive = make_tar(tmp_path / "a.tar", [entry(f"{number}.tfrecords", b"1") for number in range(200)])
    assert unpack_tar(archive, tmp_path / "out").files == 200, "more headers than any one entry may have"


def test_too_many_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILES", 20)
    refused(make_tar(tmp_path / "a.tar", [entry(str(n)) for n in range(21)]), "refused, it has more than 20 entries")


def test_cut_off_anywhere(tmp_path):
    archive = make_tar(tmp_path / "a.tar", [entry(*file) for file in FILES.items()])
    whole = archive.read_bytes()
    for length in [*range(1, 3584, 97), 512, 1024, 1536, 3072]:
        archive.write_bytes(whole[:length])
        refused(archive, "not a whole tar archive")
    archive.write_bytes(whole[:2048])  # between two entries
    refused(archive, "not a whole tar archive: .*(cut off|unexpected end)")
    archive.write_bytes(whole[:3584])  # and one block of zeros
    assert unpack_tar(archive, tmp_path / "fine").files == 2


def test_a_damaged_header_is_no_end(tmp_path):
    archive = make_tar(tmp_path / "a.tar", [entry("x", b"1"), entry("y", b"2"), entry("z", b"3")])
    content = bytearray(archive.read_bytes())
    content[1024 + 5] ^= 0x55
    archive.write_bytes(content)
    refused(archive, "not a whole tar archive: at byte 1024 there should be an entry or the end, and there is neither")


@pytest.mark.parametrize(
    ("content", "meaning"),
    [
        (b"", "it is empty"),
        (b"\xef\xbb\xbf <!doctype html>", "it is an HTML or XML page, maybe the error page of a server"),
        (b"\x1f\x8b\x08" * 400, "it is gzip"),
        (b"PK\x03\x04" * 400, "it begins like a zip"),
        (b'{"error": 1}', "it is JSON, maybe the error message of a server"),
        (bytes(10240), r"it begins with b'.x00"),
    ],
)
def test_what_is_no_tar_is_named(tmp_path, content, meaning):
    (tmp_path / "a.tar").write_bytes(content)
    refused(tmp_path / "a.tar", rf"not a whole tar archive \(wrong beginning\): {meaning}.*; fetch it again")
    assert "not a whole tar archive (wrong beginning): it " in check_beginning("tar", content[:512])


def test_beginnings_that_may_be_right(tmp_path):
    archive = make_tar(tmp_path / "a.tar", [entry("x", b"1")])
    assert check_beginning("tar", archive.read_bytes()[:512]) is None
    assert check_beginning("zip", b"PK\x03\x04rest") is None
    assert "not a whole zip archive" in check_beginning("zip", archive.read_bytes()[:512])


def test_any_damage_ends_in_a_message(tmp_path):
    """Bytes flipped anywhere in the headers: unpacked in full, or refused, and nothing lies about."""
    entries = [entry("one", b"1" * 600), entry("l" * 150, b"2"), entry("ü" * 60, b"3", uname="ä")]
    dice = random.Random(3)
    for form in FORMATS.values():
        good = make_tar(tmp_path / "a.tar", entries[: 1 if form == tarfile.USTAR_FORMAT else 3], form).read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            start = 512 * dice.randrange(len(good.rstrip(b"\0")) // 512 + 1)
            for _ in range(dice.choice([1, 4])):
                bad[start + dice.randrange(512)] = dice.randrange(256)
            if dice.random() < 0.7:  # with the right sum, so that it is believed
                block = bad[start : start + 512]
                block[148:156] = b" " * 8
                bad[start + 148 : start + 156] = b"%06o\0 " % sum(block)
            (tmp_path / "a.tar").write_bytes(bad)
            try:
                unpack_tar(tmp_path / "a.tar", tmp_path / "out/a", max_bytes=1 << 20)
            except ArchiveError as error:
                assert "a.tar: " in str(error)  # noqa: PT017 - either way is right
                assert list((tmp_path / "out").iterdir()) == []
            else:
                shutil.rmtree(tmp_path / "out/a")


def test_a_large_file_goes_by_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(archives_tar, "_TAR_BLOCK", 1000)
    archive = make_tar(tmp_path / "a.tar", [entry("x", bytes(range(250)) * 10 + b"end")])
    blocks = []
    with archives_tar.TarReader(archive) as reader:
        (found,) = reader.entries()
        blocks = list(reader.blocks(found))
    assert [len(block) for block in blocks] == [1000, 1000, 503]
    unpack_tar(archive, tmp_path / "out")
    assert (tmp_path / "out/x").read_bytes() == bytes(range(250)) * 10 + b"end"


def test_stopped_in_the_middle(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "a.tar", [entry("x", b"1"), entry("y", b"2")])
    (tmp_path / "out").mkdir()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(archives.os, "utime", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack_tar(archive, tmp_path / "out/a")
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    assert unpack_tar(archive, tmp_path / "out/a").files == 2
