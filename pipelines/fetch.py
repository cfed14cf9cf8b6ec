"""Getting one file from the network: resumed where it broke off, checked for length, never half under its name."""

import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from stage1_autoencoder.videos import VideoError

RETRIES = 3
TIMEOUT_SECONDS = 30.0
_BLOCK = 1 << 18


class FetchError(VideoError):
    """A file cannot be fetched; the message has its URL and the way out."""


def is_url(place: str) -> bool:
    """Tell an http(s) URL from the path of a folder."""
    return place.lower().startswith(("http://", "https://"))


def fetch(url: str, target: Path, *, way_out: str, retry_seconds: float = 2.0) -> None:
    """Download a file. What has arrived is kept as `<target>.part` and is gone on from, within a call and by the next.

    Args:
        url: http or https.
        target: where the whole file goes; its folder must exist.
        way_out: ends every error message.
        retry_seconds: waiting time before the first retry; it doubles each time.
    Raises:
        FetchError: refused, not found, timed out, or broken off more than `RETRIES` times without getting on.
    """
    part = target.with_name(target.name + ".part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            reason = _fetch_once(url, part, before)
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
            return
        got_on = part.exists() and part.stat().st_size > before
        failures = 1 if got_on else failures + 1
        if failures > RETRIES:
            raise FetchError(f"{url}: {reason}, {failures} times in a row; {way_out}")
        time.sleep(retry_seconds * 2 ** (failures - 1))


def _fetch_once(url: str, part: Path, start: int) -> str | None:
    """Append to `part` what the server has from byte `start` on. Returns None if the file is whole, or else why not."""
    request = urllib.request.Request(url, headers={"User-Agent": "river-two-stage"})
    if start:
        request.add_header("Range", f"bytes={start}-")
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
        received = start
        with (
            part.open("ab" if start else "wb") as file,
            # disable=None: no bar where nobody looks at a terminal
            tqdm(
                desc=url.rpartition("/")[2], total=expected, initial=start, unit="B", unit_scale=True, disable=None
            ) as bar,
        ):
            while block := response.read(_BLOCK):
                file.write(block)
                received += len(block)
                bar.update(len(block))
    if expected is not None and received > expected:
        part.unlink()
        return f"got {received} bytes of a file of {expected}"
    return None if expected in (None, received) else f"broke off after {received} of {expected} bytes"
