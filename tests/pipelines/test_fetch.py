"""Downloads from a server on this machine that breaks off, knows no ranges, or refuses."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines import fetch as fetch_module
from pipelines.fetch import FetchError, fetch, is_url

CONTENT = bytes(range(256)) * 400
WAY_OUT = "use MIRROR"


class Server(ThreadingHTTPServer):
    """Serves CONTENT under every path; the attributes say how badly."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.break_offs = 0
        self.ranges = True
        self.status = 200
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[start:]
        if server.break_offs:
            server.break_offs -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

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
