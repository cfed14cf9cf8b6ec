"""Downloads from a server on this machine that breaks off, knows no ranges, lies, or refuses."""

import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.data import fetch as fetch_module
from pipelines.data.fetch import FetchError, announced_size, arrived_bytes, fetch
from tests.file_server import FileServer, serving

CONTENT = bytes(range(256)) * 400
WAY_OUT = "use MIRROR"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serves CONTENT as `/file`; `put` replaces it."""
    monkeypatch.setattr(fetch_module, "RETRY_SECONDS", 0.001)
    with serving(tmp_path / "site") as running:
        put(running, CONTENT)
        yield running


def put(server: FileServer, content: bytes) -> None:
    (server.folder / "file").write_bytes(content)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "file"


def get(server: FileServer, target: Path, **options: object) -> None:
    fetch(f"{server.url}/file", target, **({"most": 10**8, "way_out": WAY_OUT} | options))


def refused(server: FileServer, target: Path, *carried: str, **options: object) -> None:
    """Not downloaded, by a message that carries the URL and more."""
    with pytest.raises(FetchError, match=re.escape(f"{server.url}/file")) as caught:
        get(server, target, **options)
    for text in carried:
        assert text in str(caught.value)
    assert not target.exists()


def left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_a_complete_file(server, target, capfd, flushed):
    get(server, target)
    assert {target.stat().st_ino, target.parent.stat().st_ino} <= flushed
    assert target.read_bytes() == CONTENT
    assert left(target) == ["file"]
    assert capfd.readouterr() == ("", "")


def test_resumes_where_it_broke_off(server, target):
    """Also more often than it would retry without progress."""
    server.break_offs, server.keep = fetch_module.RETRIES + 2, 10_000
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert server.asked == ["/file", *(f"/file bytes={start}0000-" for start in range(1, 6))]


def test_a_server_without_ranges_sends_it_all_again(server, target):
    server.break_offs, server.ranges = 1, False
    get(server, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_resumes_from_the_part_of_an_earlier_run(server, target, share):
    have = int(len(CONTENT) * share)
    target.with_name("file.part").write_bytes(CONTENT[:have])
    assert arrived_bytes(target) == have
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert arrived_bytes(target) == len(CONTENT)
    assert server.asked == [f"/file bytes={have}-"]


def test_a_part_longer_than_the_file_is_thrown_away(server, target):
    target.with_name("file.part").write_bytes(b"x" * (len(CONTENT) + 9))
    get(server, target)
    assert target.read_bytes() == CONTENT


def test_parts_of_two_versions_do_not_mix(server, target):
    server.etag, server.break_offs = '"first"', 100
    refused(server, target, f"of {len(CONTENT)} bytes")
    assert left(target) == ["file.part", "file.part.tag"]
    server.etag, server.break_offs = '"second"', 0
    put(server, bytes(reversed(CONTENT)))
    get(server, target)
    assert target.read_bytes() == bytes(reversed(CONTENT))
    assert left(target) == ["file"]


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, 1 + fetch_module.RETRIES)])
def test_answers_that_end_a_download(server, target, status, requests):
    server.status = status
    refused(server, target, str(status), WAY_OUT)
    assert len(server.asked) == requests
    assert left(target) == []


@pytest.mark.parametrize("announced", [None, 10**18])
@pytest.mark.parametrize("free", [10**9, 10**10])
def test_a_file_without_an_end_is_not_kept(server, target, monkeypatch, announced, free):
    def endless(handler) -> None:
        handler.send_response(200)
        if announced:
            handler.send_header("Content-Length", str(announced))
        handler.end_headers()
        while True:
            handler.wfile.write(CONTENT)

    server.faults["file"] = endless
    monkeypatch.setattr(fetch_module, "free_bytes", lambda path: free)
    most = "0 bytes" if free < fetch_module.SPARED_BYTES and not announced else "1.0 MB"
    refused(server, target, most, WAY_OUT, most=10**6)
    assert left(target) == []


def test_nobody_answers(server, target):
    server.server_close()
    refused(server, target, "refused", WAY_OUT)


def test_a_server_that_falls_silent(monkeypatch, server, target):
    monkeypatch.setattr(fetch_module, "TIMEOUT_SECONDS", 0.05)
    with FileServer(target.parent) as deaf:  # takes connections and never answers
        refused(deaf, target, "timed out", WAY_OUT)


def test_a_folder_that_cannot_be_written(server, target):
    refused(server, target.parent / "nowhere" / "file", "nowhere/file.part")


PAGE = b"<!DOCTYPE html><title>Gone</title>"


def no_page(head: bytes) -> str | None:
    return "it is a page" if head.startswith(b"<") else None


def test_a_page_is_noticed_by_its_first_bytes(server, target):
    server.page, server.slowly = PAGE + bytes(10**6), True
    refused(server, target, "it is a page", WAY_OUT, check_head=no_page)
    assert server.sent < 10**6, "before the rest has come"
    server.page = PAGE  # smaller than what is looked at
    refused(server, target, "it is a page", WAY_OUT, check_head=no_page)
    assert left(target) == []


def test_a_page_does_not_cost_what_has_arrived(server, target):
    target.with_name("file.part").write_bytes(CONTENT[:1000])
    server.page, server.ranges = PAGE, False
    refused(server, target, "it is a page", check_head=no_page)
    server.page, server.ranges = None, True
    get(server, target, check_head=no_page)
    assert target.read_bytes() == CONTENT
    assert server.asked == ["/file bytes=1000-", "/file bytes=1000-"]


def test_breaking_off_before_the_first_block(server, target):
    server.break_offs, server.keep = 1, 100
    heads = []
    get(server, target, check_head=heads.append)
    assert heads == [CONTENT[: fetch_module.HEAD_BYTES]]
    assert target.read_bytes() == CONTENT


def test_too_little_space_is_noticed_before_anything_is_written(server, target, monkeypatch):
    def disk(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))

    disk(len(CONTENT) - 1)
    refused(server, target, "102.4 kB", str(target.parent))
    assert left(target) == []
    target.with_name("file.part").write_bytes(CONTENT[:1000])  # what is here needs no space
    disk(len(CONTENT) - 1001)
    refused(server, target, "101.4 kB")
    disk(len(CONTENT) - 1000)
    get(server, target)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_promises_too_much(server, target, ranges):
    server.ranges, server.promised = ranges, 50
    if ranges:  # asked for the rest, it knows better
        get(server, target)
        assert target.read_bytes() == CONTENT
        return
    refused(server, target, f"{len(CONTENT)} of {len(CONTENT) + 50} bytes")
    assert left(target) == ["file.part"]


def test_a_write_that_fails_keeps_what_has_arrived(server, target):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        refused(server, target, f"{target}.part", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(server.asked) == 1, "a retry is of no use"
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert server.asked[1] == "/file bytes=50000-"


def test_the_announced_size(server):
    url = f"{server.url}/file"
    assert announced_size(url) == len(CONTENT)
    assert server.asked == []
    server.status = 404
    assert announced_size(url) is None
    server.server_close()
    assert announced_size(url) is None
