"""The page of trainings that run, in a real browser, while another process trains."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LONG = (
    "flow.training.steps=100000", "flow.training.validate_every=100", "flow.training.checkpoint_every=100",
    "flow.training.validation_samples=2", "logging.every=20",
)  # fmt: skip
STEP = "Number(document.querySelector('#flow .value').firstChild.textContent.replaceAll(',', ''))"
PICTURE = "document.querySelector('#flow img').getAttribute('src')"


@contextlib.contextmanager
def running(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """A command that is stopped as by Ctrl-C."""
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err


@contextlib.contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """The page in a tab; the console has no errors in the end."""
    page, errors = browser.new_page(**options), list[str]()
    page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    page.close()
    assert not errors


@pytest.fixture
def begun(copied) -> Any:
    """A place with an autoencoder and a store."""
    shutil.rmtree(copied.runs / "flow")
    return copied.with_sets(*LONG)


@pytest.mark.long
def test_a_training_is_seen_while_it_runs(browser, begun):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    with running(begun.start("watch", "--no-browser", "--port", str(port))):
        wait_until(lambda: is_served(url))
        with opened(browser, url, viewport={"width": 1120, "height": 800}) as page:
            page.wait_for_selector("#autoencoder .chart")
            assert page.locator("section").count() == 1
            with running(begun.start("train-flow")):
                page.wait_for_selector("#flow img", timeout=60_000)  # without a reload
                assert page.locator("section").first.get_attribute("id") == "flow"
                assert page.evaluate("document.querySelector('#flow img').naturalWidth") > 100
                assert page.locator("#flow .name:text-is('Left')").is_visible()
                page.locator("#flow summary").first.click()
                shown, step = page.evaluate(PICTURE), page.evaluate(STEP)
                page.evaluate("document.querySelector('#flow img').mine = true")
                wait_until(lambda: page.evaluate(STEP) > step)
                # What did not change goes on: the open table, and the playing picture, unless there is a new one.
                assert page.locator("#flow details").first.get_attribute("open") is not None
                assert page.evaluate(f"document.querySelector('#flow img').mine || {PICTURE} !== '{shown}'")
                wait_until(lambda: page.evaluate(PICTURE) != shown)
                assert "%" in page.title()
            assert page.locator("#flow [data-written]").is_visible()  # stopped, not done
        with opened(browser, url, viewport={"width": 380, "height": 800}, color_scheme="dark") as page:
            page.wait_for_selector("#flow img")
            assert page.evaluate("document.documentElement.scrollWidth") <= 380
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"
        refused = urllib.request.Request(url, headers={"Host": "example.org"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(refused)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}pictures/../config.yaml")


def is_served(url: str) -> bool:
    try:
        urllib.request.urlopen(url).close()
    except urllib.error.URLError:
        return False
    return True


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.skipif(
    "WATCH_PICTURE" not in os.environ, reason="WATCH_PICTURE=<address of the page> renews docs/watch.png"
)
def test_the_picture_of_the_docs(browser, repository: Path):
    with opened(browser, os.environ["WATCH_PICTURE"], viewport={"width": 1060, "height": 900}) as page:
        page.wait_for_selector("#flow img")
        page.screenshot(path=repository / "docs" / "watch.png")
