"""A folder behind HTTP on this machine, which breaks off, knows no ranges, lies, or refuses, as a test asks for."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock


class FileServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        asked: path and range of each download: `/file`, `/file bytes=100-`. Requests of sizes (HEAD) are not in it.
        page: sent instead of any file.
        status: of all answers.
        ranges: whether it knows ranges.
        etag: the version of all files.
        break_offs: number of answers that break off, each after `keep` bytes, or in the middle.
        promised: bytes that it announces beyond those it has.
        faults: what to do instead for paths that contain a text.
        slowly: send 100 kB at a time, with pauses; `sent` has the bytes sent so far.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        self.page: bytes | None = None
        self.status = 200
        self.ranges = True
        self.etag = ""
        self.break_offs = self.promised = self.sent = 0
        self.keep: int | None = None
        self.faults: dict[str, Callable[[Handler], None]] = {}
        self.slowly = False


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.path} {self.headers.get('Range', '')}".strip())
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        server, file = self.server, self.server.folder / self.path[1:]
        for text, fault in server.faults.items():
            if text in self.path:
                with suppress(ConnectionError):  # the client has gone
                    fault(self)
                return
        status = server.status if file.is_file() else 404
        if status != 200:
            self.send_error(status)
            return
        content = file.read_bytes() if server.page is None else server.page
        wanted = self.headers.get("Range") if server.ranges else None
        if self.headers.get("If-Range", server.etag) != server.etag:
            wanted = None
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        start = int(first) if first else max(len(content) - int(last), 0)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start + server.promised))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if body:
            self._send(content[start:stop])

    def _send(self, content: bytes) -> None:
        server = self.server
        if server.break_offs:
            server.break_offs -= 1
            content = content[: len(content) // 2 if server.keep is None else server.keep]
        try:
            for first in range(0, len(content), 100_000):
                server.sent += self.wfile.write(content[first : first + 100_000])
                time.sleep(0.05 if server.slowly else 0)
        except ConnectionError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """Serve a folder, created if it is missing, for the length of a block."""
    folder.mkdir(parents=True, exist_ok=True)
    with mock.patch.dict(os.environ, {"no_proxy": "127.0.0.1"}), FileServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
