"""Getting one file from the network: resumed where it broke off, checked for length, never half under its name."""

import http.client
import io
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from pipelines.runtime.progress import is_quiet
from stage1_autoencoder.videos import VideoError

RETRIES = 3
TIMEOUT_SECONDS = 30.0
HEAD_BYTES = 512  # so much of its beginning tells what a file is
_BLOCK = 1 << 18
_AGENT = {"User-Agent": "river-two-stage"}


class FetchError(VideoError):
    """A file cannot be fetched; the message has its URL and the way out."""


class _Unexpected(Exception):
    """What the server sends is not the file; says why."""


class _CannotWrite(Exception):
    """The disk does not take what has arrived."""


def is_url(place: str) -> bool:
    """Tell an http(s) URL from the path of a folder."""
    return place.lower().startswith(("http://", "https://"))


def announced_size(url: str) -> int | None:
    """Bytes of a file, where the server tells before it sends it (HEAD); None where it does not, for any reason."""
    request = urllib.request.Request(url, method="HEAD", headers=_AGENT)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length") or ""
    except urllib.error.HTTPError as error:
        error.close()
        return None
    except (http.client.HTTPException, OSError, ValueError):
        return None  # what is wrong, fetching it will say
    return int(length) if length.isdigit() else None


def arrived_bytes(target: Path) -> int:
    """How much of a file an earlier `fetch` has brought, or all of it; 0 if nothing is there."""
    for path in (target, _part(target)):
        if path.is_file():
            return path.stat().st_size
    return 0


def fetch(
    url: str,
    target: Path,
    *,
    way_out: str,
    retry_seconds: float = 2.0,
    check_size: Callable[[int, int], None] | None = None,
    check_head: Callable[[bytes], str | None] | None = None,
) -> None:
    """Download a file. What has arrived is kept as `<target>.part` and is gone on from, within a call and by the next.

    Args:
        url: http or https.
        target: where the whole file goes; its folder must exist.
        way_out: ends every error message.
        retry_seconds: waiting time before the first retry; it doubles each time.
        check_size: called with the bytes of the file and those that are here already, when the server tells, before any
            are written; may raise.
        check_head: called with the first bytes of the file (`HEAD_BYTES`, or all if it is smaller) before any are
            written; tells why this is not the file, or None.
    Raises:
        FetchError: refused, not found, timed out, or broken off more than `RETRIES` times without getting on; another
            file than expected; the disk is full.
    """
    part = _part(target)
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            reason = _fetch_once(url, part, before, check_size or _no_check, check_head or _no_check)
        except _Unexpected as error:
            raise FetchError(f"{url}: {error}; {way_out}") from None
        except _CannotWrite as error:
            raise FetchError(
                f"{url}: cannot write {part} ({error}); what has arrived is kept, the same command goes on from there"
            ) from error.__cause__
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 429):  # asking again will not change the answer
                raise FetchError(f"{url}: the server answers {error.code} {error.reason}; {way_out}") from error
            reason = f"the server answers {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise FetchError(f"{url}: cannot write {error.filename} ({error.strerror})") from error
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        if reason is None:
            os.replace(part, target)
            _tag(part).unlink(missing_ok=True)
            return
        got_on = part.exists() and part.stat().st_size > before
        failures = 1 if got_on else failures + 1
        if failures > RETRIES:
            raise FetchError(f"{url}: {reason}, {failures} times in a row; {way_out}")
        time.sleep(retry_seconds * 2 ** (failures - 1))


def _no_check(*_: object) -> None:
    """Anything will do."""


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _tag(part: Path) -> Path:
    """Where the server's name for the version of the file lies (ETag), so that parts of two versions never mix."""
    return part.with_name(part.name + ".tag")


def _fetch_once(
    url: str,
    part: Path,
    start: int,
    check_size: Callable[[int, int], None],
    check_head: Callable[[bytes], str | None],
) -> str | None:
    """Append to `part` what the server has from byte `start` on. Returns None if the file is whole, or else why not."""
    request = urllib.request.Request(url, headers=_AGENT)
    if start:
        request.add_header("Range", f"bytes={start}-")
        if _tag(part).is_file():  # a changed file is sent from its beginning
            request.add_header("If-Range", _tag(part).read_text(encoding="latin-1"))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing lies behind `start`: we have all, or the file has changed and what we have is of no use.
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        error.close()
        if total == str(start):
            return None
        part.unlink()
        return f"the part of {start} bytes that we had does not fit the file"
    with response:
        if response.status == 206:
            unit, _, total = response.headers.get("Content-Range", "").rpartition("/")
            if not unit.replace("=", " ").startswith(f"bytes {start}-"):
                part.unlink()
                return f"asked for bytes from {start} on, got {unit!r}"
        else:  # a server that knows no ranges sends the file from its beginning
            start, total = 0, response.headers.get("Content-Length", "")
        expected = int(total) if total.isdigit() else None
        block = b""
        if start == 0:
            block = response.read(HEAD_BYTES)
            if expected is not None and len(block) < min(expected, HEAD_BYTES):
                return f"broke off after {len(block)} of {expected} bytes"
            if wrong := check_head(block):
                raise _Unexpected(wrong)
        if expected is not None:
            check_size(expected, start)
        received = start
        with part.open("ab" if start else "wb", buffering=0) as file:
            if start == 0:
                _note_version(part, response.headers.get("ETag", ""))
            with tqdm(
                desc=url.rpartition("/")[2],
                total=expected,
                initial=start,
                unit="B",
                unit_scale=True,
                disable=True if is_quiet() else None,  # None: no bar where nobody looks at a terminal
            ) as bar:
                while block or (block := response.read(_BLOCK)):
                    _write(file, block)
                    received += len(block)
                    bar.update(len(block))
                    block = b""
    if expected is not None and received > expected:
        part.unlink()
        return f"got {received} bytes of a file of {expected}"
    return None if expected in (None, received) else f"broke off after {received} of {expected} bytes"


def _note_version(part: Path, etag: str) -> None:
    if etag.startswith('"'):  # a weak one does not promise the same bytes
        _tag(part).write_text(etag, encoding="latin-1")
    else:
        _tag(part).unlink(missing_ok=True)


def _write(file: io.RawIOBase, block: bytes) -> None:
    view = memoryview(block)
    try:
        while view:
            view = view[_write_some(file, view) :]
    except OSError as error:
        raise _CannotWrite(error.strerror or str(error)) from error


def _write_some(file: io.RawIOBase, block: memoryview) -> int:
    """Unbuffered: an error comes where it happens, and all before it is in the file. Returns how much was written."""
    return file.write(block) or 0
