"""Downloads from a server on this machine that breaks off, knows no ranges, lies, or refuses."""

import errno
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.data import fetch as fetch_module
from pipelines.data.fetch import FetchError, announced_size, arrived_bytes, fetch, is_url
from pipelines.runtime.files import size_text

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


def get(url, target):
    fetch(url, target, way_out=WAY_OUT, retry_seconds=0.01)


def test_a_whole_file(server, tmp_path, capfd):
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert capfd.readouterr() == ("", "")


def test_goes_on_where_it_broke_off(server, tmp_path):
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
def test_goes_on_from_the_part_of_an_earlier_run(server, tmp_path, share):
    have = int(len(CONTENT) * share)
    (tmp_path / "file.part").write_bytes(CONTENT[:have])
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [f"bytes={have}-"]


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * (len(CONTENT) + 9))
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_not_found_is_said_at_once(server, tmp_path):
    server.status = 404
    with pytest.raises(FetchError, match=rf"{server.url}: the server answers 404 Not Found; {WAY_OUT}"):
        get(server.url, tmp_path / "file")
    assert len(server.asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_gives_up_after_some_retries(server, tmp_path):
    server.status = 503
    with pytest.raises(FetchError, match=rf"{server.url}: the server answers 503 .*, 4 times in a row; {WAY_OUT}"):
        get(server.url, tmp_path / "file")
    assert len(server.asked) == 4


def test_nobody_answers(server, tmp_path):
    url = server.url
    server.server_close()
    with pytest.raises(FetchError, match=rf"{url}: .*refused.*; {WAY_OUT}"):
        get(url, tmp_path / "file")


def test_a_server_that_falls_silent(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetch_module, "TIMEOUT_SECONDS", 0.05)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as deaf:  # takes connections and never answers
        url = f"http://127.0.0.1:{deaf.server_address[1]}/file"
        with pytest.raises(FetchError, match=rf"{url}: timed out, 4 times in a row; {WAY_OUT}"):
            get(url, tmp_path / "file")


def test_a_folder_that_cannot_be_written(server, tmp_path):
    with pytest.raises(FetchError, match=r"cannot write .*nowhere/file\.part \(No such file"):
        get(server.url, tmp_path / "nowhere" / "file")


def test_is_url():
    assert is_url("http://host/x")
    assert is_url("HTTPS://host")
    assert not is_url("/data/http")
    assert not is_url("ftp://host")


PAGE = b"<!DOCTYPE html><title>Gone</title>"


def get_archive(url, target, **checks):
    fetch(
        url,
        target,
        way_out=WAY_OUT,
        retry_seconds=0.01,
        check_head=lambda head: "it is a page" if head.startswith(b"<") else None,
        **checks,
    )


def test_a_page_is_noticed_by_its_first_bytes(server, tmp_path):
    server.content = PAGE + bytes(10**6)
    server.slowly = True
    with pytest.raises(FetchError, match=rf"{server.url}: it is a page; {WAY_OUT}"):
        get_archive(server.url, tmp_path / "file")
    assert server.sent < 10**6, "before the rest has come"
    server.content = PAGE  # smaller than what is looked at
    with pytest.raises(FetchError, match=rf"{server.url}: it is a page; {WAY_OUT}"):
        get_archive(server.url, tmp_path / "file")
    server.status = 404
    with pytest.raises(FetchError, match=rf"{server.url}: the server answers 404 Not Found; {WAY_OUT}"):
        get_archive(server.url, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_page_does_not_cost_what_has_arrived(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    server.content, server.ranges = PAGE, False
    with pytest.raises(FetchError, match="it is a page"):
        get_archive(server.url, tmp_path / "file")
    server.content, server.ranges = CONTENT, True
    get_archive(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-", "bytes=1000-"]


def test_breaking_off_before_the_first_block(server, tmp_path):
    server.break_offs, server.keep = 1, 100
    heads = []
    fetch(server.url, tmp_path / "file", way_out="", retry_seconds=0.01, check_head=heads.append)
    assert heads == [CONTENT[: fetch_module.HEAD_BYTES]]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_the_size_is_known_before_anything_is_written(server, tmp_path):
    def no_room(size, have):
        assert not (tmp_path / "file").exists()
        raise FetchError(f"{size} {have}")

    with pytest.raises(FetchError, match=f"^{len(CONTENT)} 0$"):
        get_archive(server.url, tmp_path / "file", check_size=no_room)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    with pytest.raises(FetchError, match=f"^{len(CONTENT)} 1000$"):
        get_archive(server.url, tmp_path / "file", check_size=no_room)
    assert (tmp_path / "file.part").stat().st_size == 1000


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_promises_too_much(server, tmp_path, ranges):
    server.ranges, server.promised = ranges, 50
    if ranges:  # asked for what lacks, it knows better
        get(server.url, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == CONTENT
        return
    size = len(CONTENT)
    with pytest.raises(
        FetchError, match=rf"{server.url}: broke off after {size} of {size + 50} bytes, 4 times in a row"
    ):
        get(server.url, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file.part"]


def test_parts_of_two_versions_do_not_mix(server, tmp_path):
    server.etag, server.break_offs = '"first"', 100
    with pytest.raises(FetchError, match="broke off after"):
        fetch(server.url, tmp_path / "file", way_out=WAY_OUT, retry_seconds=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.part", "file.part.tag"]
    server.etag, server.break_offs, server.content = '"second"', 0, bytes(reversed(CONTENT))
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_disk_is_full(server, tmp_path, monkeypatch):
    def full(file, block):
        if arrived_bytes(tmp_path / "file") > 50_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, block)

    write = fetch_module._write_some
    monkeypatch.setattr(fetch_module, "_write_some", full)
    monkeypatch.setattr(fetch_module, "_BLOCK", 10_000)
    message = rf"{server.url}: cannot write .*file\.part \(No space left on device\); what has arrived is kept"
    with pytest.raises(FetchError, match=message):
        get(server.url, tmp_path / "file")
    assert len(server.asked) == 1, "asking again is of no use"
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    get(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked[1] not in (None, "bytes=0-")


def test_the_announced_size(server):
    assert announced_size(server.url) == len(CONTENT)
    server.heads = False
    assert announced_size(server.url) is None
    server.server_close()
    assert announced_size(server.url) is None
    assert server.asked == []


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (5_709_051, "5.7 MB"), (30_060_000_000, "30.1 GB")]
)
def test_sizes_in_words(size, text):
    assert size_text(size) == text
