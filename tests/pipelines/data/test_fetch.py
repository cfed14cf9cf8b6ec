"""Downloads from a server on this machine that breaks off, knows no ranges, lies, or refuses."""

import re
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.data import fetch as fetch_module
from pipelines.data.fetch import FetchError, announced_size, arrived_bytes, fetch, is_url

CONTENT = bytes(range(256)) * 400
WAY_OUT = "use MIRROR"


class Server(ThreadingHTTPServer):
    """Serves its content under every path; the attributes say how badly."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.break_offs = 0  # so many answers
        self.keep: int | None = None  # how much comes of an answer that breaks off; None: half of it
        self.promised = 0  # more than there is
        self.etag = ""
        self.heads = True
        self.slowly = False
        self.sent = 0
        self.ranges = True
        self.status = 200
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        if not self.server.heads:
            self.send_error(405)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        content = server.content
        server.asked.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        if self.headers.get("If-Range", server.etag) != server.etag:
            wanted = None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start + server.promised))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        body = content[start:]
        if server.break_offs:
            server.break_offs -= 1
            body = body[: len(body) // 2 if server.keep is None else server.keep]
        if not server.slowly:
            self.wfile.write(body)
            return
        try:
            for first in range(0, len(body), 100_000):
                server.sent += self.wfile.write(body[first : first + 100_000])
                time.sleep(0.05)
        except ConnectionError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(url, target, **options):
    fetch(url, target, way_out=WAY_OUT, retry_seconds=0.01, **options)


def refused(url, target, *carried, **options):
    """Not downloaded, by a message that carries the URL and more."""
    with pytest.raises(FetchError, match=re.escape(url)) as caught:
        get(url, target, **options)
    for text in carried:
        assert text in str(caught.value)
    assert not target.exists()


def test_a_complete_file(server, tmp_path, capfd):
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert capfd.readouterr() == ("", "")


def test_resumes_where_it_broke_off(server, tmp_path):
    server.break_offs = 2
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert server.asked == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    server.break_offs, server.ranges = 1, False
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_resumes_from_the_part_of_an_earlier_run(server, tmp_path, share):
    have = int(len(CONTENT) * share)
    (tmp_path / "file.part").write_bytes(CONTENT[:have])
    assert arrived_bytes(tmp_path / "file") == have
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert arrived_bytes(tmp_path / "file") == len(CONTENT)
    assert server.asked == [f"bytes={have}-"]


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * (len(CONTENT) + 9))
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_parts_of_two_versions_do_not_mix(server, tmp_path):
    server.etag, server.break_offs = '"first"', 100
    refused(server.url, tmp_path / "file", f"of {len(CONTENT)} bytes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.part", "file.part.tag"]
    server.etag, server.break_offs, server.content = '"second"', 0, bytes(reversed(CONTENT))
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (503, 1 + fetch_module.RETRIES)])
def test_answers_that_end_a_download(server, tmp_path, status, requests):
    server.status = status
    refused(server.url, tmp_path / "file", str(status), WAY_OUT)
    assert len(server.asked) == requests
    assert list(tmp_path.iterdir()) == []


def test_nobody_answers(server, tmp_path):
    url = server.url
    server.server_close()
    refused(url, tmp_path / "file", "refused", WAY_OUT)


def test_a_server_that_falls_silent(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch_module, "TIMEOUT_SECONDS", 0.05)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as deaf:  # takes connections and never answers
        refused(f"http://127.0.0.1:{deaf.server_address[1]}/file", tmp_path / "file", "timed out", WAY_OUT)


def test_a_folder_that_cannot_be_written(server, tmp_path):
    refused(server.url, tmp_path / "nowhere" / "file", str(tmp_path / "nowhere/file.part"))


def test_is_url():
    assert is_url("http://host/x")
    assert is_url("HTTPS://host")
    assert not is_url("/data/http")
    assert not is_url("ftp://host")


PAGE = b"<!DOCTYPE html><title>Gone</title>"


def no_page(head):
    return "it is a page" if head.startswith(b"<") else None


def test_a_page_is_noticed_by_its_first_bytes(server, tmp_path):
    server.content = PAGE + bytes(10**6)
    server.slowly = True
    refused(server.url, tmp_path / "file", "it is a page", WAY_OUT, check_head=no_page)
    assert server.sent < 10**6, "before the rest has come"
    server.content = PAGE  # smaller than what is looked at
    refused(server.url, tmp_path / "file", "it is a page", WAY_OUT, check_head=no_page)
    assert list(tmp_path.iterdir()) == []


def test_a_page_does_not_cost_what_has_arrived(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    server.content, server.ranges = PAGE, False
    refused(server.url, tmp_path / "file", "it is a page", check_head=no_page)
    server.content, server.ranges = CONTENT, True
    get(server.url, tmp_path / "file", check_head=no_page)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-", "bytes=1000-"]


def test_breaking_off_before_the_first_block(server, tmp_path):
    server.break_offs, server.keep = 1, 100
    heads = []
    get(server.url, tmp_path / "file", check_head=heads.append)
    assert heads == [CONTENT[: fetch_module.HEAD_BYTES]]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_too_little_space_is_noticed_before_anything_is_written(server, tmp_path, monkeypatch):
    def disk(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))

    disk(len(CONTENT) - 1)
    refused(server.url, tmp_path / "file", "102.4 kB", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])  # what is here needs no space
    disk(len(CONTENT) - 1001)
    refused(server.url, tmp_path / "file", "101.4 kB")
    disk(len(CONTENT) - 1000)
    get(server.url, tmp_path / "file")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_promises_too_much(server, tmp_path, ranges):
    server.ranges, server.promised = ranges, 50
    if ranges:  # asked for the rest, it knows better
        get(server.url, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == CONTENT
        return
    size = len(CONTENT)
    refused(server.url, tmp_path / "file", f"{size} of {size + 50} bytes")
    assert [path.name for path in tmp_path.iterdir()] == ["file.part"]


def test_a_write_that_fails_keeps_what_has_arrived(server, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        refused(server.url, tmp_path / "file", str(tmp_path / "file.part"), "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(server.asked) == 1, "a retry is of no use"
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked[1] == "bytes=50000-"


def test_the_announced_size(server):
    assert announced_size(server.url) == len(CONTENT)
    assert server.asked == []
    server.heads = False
    assert announced_size(server.url) == len(CONTENT)
    server.status = 404
    assert announced_size(server.url) is None
    server.server_close()
    assert announced_size(server.url) is None
