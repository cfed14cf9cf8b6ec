"""Download one file over HTTP: resumed where it broke off, checked for length, never incomplete under its name."""

import http.client
import io
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from pipelines.runtime.files import flush, free_bytes, size_text, write_bytes
from pipelines.runtime.progress import progress
from stage1_autoencoder.videos import VideoError

RETRIES = 3
RETRY_SECONDS = 2.0  # before the first retry; doubles each time
TIMEOUT_SECONDS = 30.0
HEAD_BYTES = 512  # enough to tell the kind of a file
SPARED_BYTES = 2**30  # that a file of unknown size leaves free on the disk
_BLOCK = 1 << 18
_AGENT = {"User-Agent": "river-two-stage"}


class FetchError(VideoError):
    """A file cannot be downloaded; the message has its URL and the way out."""


def announced_size(url: str) -> int | None:
    """The size of a file in bytes as its server announces it; None if it does not. `fetch` reports what is wrong."""
    request = urllib.request.Request(url, method="HEAD", headers=_AGENT)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            return max(int(response.headers["Content-Length"]), 0)
    except (http.client.HTTPException, OSError, ValueError, TypeError):
        return None


def arrived_bytes(target: Path) -> int:
    """How much of a file is here: all of it, or what an earlier `fetch` downloaded of it."""
    return _size(target) or _size(_part(target))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def fetch(
    url: str, target: Path, *, most: int, way_out: str, check_head: Callable[[bytes], str | None] = lambda head: None
) -> None:
    """Download a file. Data goes to `<target>.part`, from which this call and the next one resume.

    Args:
        url: http or https.
        target: path of the complete file; its folder must exist.
        most: bytes that such a file may have. A server that sends more is not believed, and nothing of it is kept.
        way_out: ends error messages.
        check_head: is given the first bytes of the file (`HEAD_BYTES`, or all of a smaller one) before any are written;
            returns why this is not the file, or None.
    Raises:
        FetchError: refused, not found, timed out, or interrupted more than `RETRIES` times without progress; another
            file than expected; larger than `most`; not enough disk space.
    """
    part = _part(target)
    failures = 0
    while True:
        before = _size(part)
        try:
            reason = _fetch_once(url, part, before, most, way_out, check_head)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answers {error.code} {' '.join(error.reason.split())}"
            if error.code < 500 and error.code not in (408, 429):  # a retry gets the same answer
                raise FetchError(f"{url}: {reason}; {way_out}") from error
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.filename is not None:  # of a file, not of the connection
                raise FetchError(f"{url}: cannot write {error.filename} ({error.strerror})") from error
            reason = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
        if reason is None:
            flush(part)
            part.replace(target)
            flush(target.parent)
            _tag(part).unlink(missing_ok=True)
            return
        failures = 1 if _size(part) > before else failures + 1
        if failures > RETRIES:
            raise FetchError(f"{url}: {reason}, {failures} times in a row; {way_out}")
        time.sleep(RETRY_SECONDS * 2 ** (failures - 1))


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _tag(part: Path) -> Path:
    """The file that holds the server's name for this version of the file (ETag): parts of two versions never mix."""
    return part.with_name(part.name + ".tag")


def _fetch_once(
    url: str, part: Path, start: int, most: int, way_out: str, check_head: Callable[[bytes], str | None]
) -> str | None:
    """Append to `part` what the server has from byte `start` on. Returns None if the file is complete, or why not."""
    request = urllib.request.Request(url, headers=_AGENT)
    if start:
        request.add_header("Range", f"bytes={start}-")
        if _tag(part).is_file():  # the server sends a changed file from its beginning
            request.add_header("If-Range", _tag(part).read_text(encoding="latin-1"))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # The file has no bytes after `start`: it is complete, or it has changed and the part is of no use.
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        error.close()
        if total == str(start):
            return None
        part.unlink()
        return f"the {start} bytes downloaded before are no part of the file"
    with response:
        if response.status == 206:
            unit, _, total = response.headers.get("Content-Range", "").rpartition("/")
            if not unit.replace("=", " ").startswith(f"bytes {start}-"):
                part.unlink()
                return f"asked for bytes from {start} on, got {unit!r}"
        else:  # a server without ranges sends the file from its beginning
            start, total = 0, response.headers.get("Content-Length", "")
        expected = int(total) if total.isdecimal() else None
        if expected is not None and expected > most:
            raise FetchError(f"{url}: has {size_text(expected)}, expected at most {size_text(most)}; {way_out}")
        head = b""
        if start == 0:
            head = response.read(HEAD_BYTES)
            if expected is not None and len(head) < min(expected, HEAD_BYTES):
                return f"broke off after {len(head)} of {expected} bytes"
            if wrong := check_head(head):
                raise FetchError(f"{url}: {wrong}; {way_out}")
        if expected is not None and expected - start > (free := free_bytes(part.parent)):
            raise FetchError(
                f"{url}: {size_text(expected - start)} to download, but only {size_text(free)} are free in "
                f"{part.parent}; free some space there"
            )
        if expected is None:  # which may have no end
            most = min(most, start + max(0, free_bytes(part.parent) - SPARED_BYTES))
        received = start
        # Unbuffered: an error comes where it happens, and everything before it is in the file.
        with part.open("ab" if start else "wb", buffering=0) as file:
            if start == 0:
                _note_version(part, response.headers.get("ETag", ""))
            with progress(total=expected, initial=start, description=url.rpartition("/")[2], unit="B") as bar:
                while block := head or response.read(_BLOCK):
                    head = b""
                    if received + len(block) > most:
                        part.unlink()
                        _tag(part).unlink(missing_ok=True)
                        raise FetchError(f"{url}: does not end after {size_text(most)}; {way_out}")
                    _write(file, block, url, part)
                    received += len(block)
                    bar.update(len(block))
    return None if expected in (None, received) else f"broke off after {received} of {expected} bytes"


def _note_version(part: Path, etag: str) -> None:
    if etag.startswith('"'):  # a weak one does not promise the same bytes
        write_bytes(_tag(part), etag.encode("latin-1"))
    else:
        _tag(part).unlink(missing_ok=True)


def _write(file: io.RawIOBase, block: bytes, url: str, part: Path) -> None:
    view = memoryview(block)
    try:
        while view:
            view = view[file.write(view) or 0 :]
    except OSError as error:
        raise FetchError(
            f"{url}: cannot write {part} ({error.strerror or error}); the downloaded part is kept, the same "
            "command resumes"
        ) from error
