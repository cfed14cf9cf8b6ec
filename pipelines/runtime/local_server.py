"""Pages for the browser of this machine: who may use them, and serving them until a signal."""

import asyncio
import os
import sys
import webbrowser
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from pipelines.errors import StoppedBySignal, UserError
from pipelines.runtime.progress import say, warn
from pipelines.runtime.signals import CallOnSignal

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# No other site's script, frame or request, and no address but this one, whatever a file's name may contain.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
# Bytes of a message from the page, and of a request that is no upload.
MOST_WORDS = 4096

# Called with the page's address when it can be used; set when it should end.
Serve = Callable[[Callable[[str], object], asyncio.Event], Awaitable[None]]


class Guarded(RequestHandler):
    """A handler for this server's own pages: other sites cannot use it, under whatever name they reach it."""

    def prepare(self) -> None:
        hosts = self.settings["hosts"]
        # Another site's name may lead to this address (DNS rebinding).
        if hosts and urlsplit(f"//{self.request.host}").hostname not in hosts:
            raise HTTPError(403, reason="Unknown host name")

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def write_error(self, status_code: int, **details: Any) -> None:
        self.finish({"error": self._reason})


class Texts(Guarded):
    """Files of a page: name -> content type and text."""

    def initialize(self, texts: Mapping[str, tuple[str, str]]) -> None:
        self.texts = texts

    def get(self, name: str) -> None:
        kind, text = self.texts[name]
        self.set_header("Content-Type", f"{kind}; charset=utf-8")
        self.finish(text)


async def serve_pages(
    handlers: Sequence[tuple[str, type[RequestHandler], Mapping[str, Any]]],
    host: str,
    port: int,
    ready: Callable[[str], object],
    stop: asyncio.Event,
    close: Callable[[], Awaitable[None]] | None = None,
    **settings: Any,
) -> None:
    """Serve pages until `stop` is set.

    Args:
        handlers: pattern of the path, class and arguments of each.
        host: address to listen on. On other addresses than those of this machine alone, any name of it is accepted.
        port: to listen on; 0: any free one.
        ready: called with the page's address.
        close: called at the end, while answers can still be sent.
        settings: of tornado's application.
    Raises:
        UserError: the address or port is not to be had.
    """
    try:
        sockets = bind_sockets(port, host)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; without --port any free one is used") from None
    application = Application([*handlers], hosts=LOOPBACK if host in LOOPBACK else (), **settings)
    server = HTTPServer(application, max_body_size=MOST_WORDS)
    server.add_sockets(sockets)
    address, own_port = sockets[0].getsockname()[:2]
    try:
        ready(f"http://{f'[{address}]' if ':' in address else address}:{own_port}/")
        await stop.wait()
    finally:
        server.stop()
        if close is not None:
            await close()
        await server.close_all_connections()


def serve_until_signal(serve: Serve, what: str, host: str, opens_browser: bool) -> NoReturn:
    """Serve a page, say where it is, and end with a signal.

    Args:
        what: begins the sentence that has the page's address.
        host: that it listens on.
        opens_browser: open the page in this machine's browser, if there is a display.
    Raises:
        UserError: see `serve_pages`.
        StoppedBySignal: the way it ends.
    """
    if host not in LOOPBACK:
        warn(f"--host {host}: everybody who reaches this address can use the page")

    def ready(url: str) -> None:
        say(f"{what} at {url}; Ctrl-C ends it")
        if opens_browser and _has_display():
            webbrowser.open(url)

    async def main() -> NoReturn:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        with CallOnSignal(lambda: loop.call_soon_threadsafe(stop.set)) as signals:
            await serve(ready, stop)
        raise StoppedBySignal(signals.signal_number, "the page is closed")

    asyncio.run(main())


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
