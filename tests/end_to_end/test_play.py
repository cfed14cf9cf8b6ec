"""The page to play with, of a trained run, in a real browser."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import queue
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from pipelines.config import load_config
from pipelines.play.playing import MOST_BYTES, Clips
from pipelines.play.web_server import Player, serve
from pipelines.predictor import VideoPredictor
from pipelines.runtime.context import RunContext
from stage1_autoencoder.config import DecoderModelConfig
from stage1_autoencoder.fast_decoder import FastDecoder

# Counts the different pictures of the first future until this many frames were shown.
WATCH = """async (wanted) => {
  const pictures = new Set(), number = () => Number((find("where").textContent.match(/[0-9]+/) || [0])[0]);
  while (number() < wanted) {
    await new Promise(requestAnimationFrame);
    const canvas = document.querySelector("#futures canvas");
    if (canvas) pictures.add(canvas.toDataURL());
  }
  return pictures.size;
}"""
CANVASES = "[...document.querySelectorAll('#futures canvas')].map((canvas) => canvas.toDataURL())"


def player_of(folder: Path, config_file: Path, *sets: str) -> Player:
    config, device = load_config(config_file, sets), torch.device("cpu")
    return Player(folder.name, VideoPredictor.from_run(folder, "cpu"), Clips(config, RunContext(device)))


@contextlib.contextmanager
def served(player: Player) -> Iterator[str]:
    """The address of a player's page, served in a thread of its own."""
    ready: queue.SimpleQueue[tuple[str, Callable[[], object]]] = queue.SimpleQueue()

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        await serve(
            player, "127.0.0.1", 0, lambda url: ready.put((url, lambda: loop.call_soon_threadsafe(stop.set))), stop
        )

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    url, stop = ready.get(timeout=20)
    yield url
    stop()
    thread.join(20)
    assert not thread.is_alive()


def answer(url: str, data: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a request; underscores of header names are hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    place = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(place.netloc, timeout=20)) as connection:
        connection.request("GET" if data is None else "POST", f"{place.path or '/'}?{place.query}", data, named)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()


def test_the_command_serves_the_page_to_itself_alone_until_a_signal(copied, story):
    """It needs a run, no store and no raw videos."""
    shutil.rmtree(copied.folder / "latents")
    clip = copied.folder / "clip.mp4"
    story.write_video(clip, story.moving_square(12, 0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, found = f"http://127.0.0.1:{port}", dict[str, Any]()

    def visit() -> None:
        try:
            end = time.monotonic() + 30
            while not found and time.monotonic() < end:
                with contextlib.suppress(ConnectionError):
                    found["page"] = answer(url)
                time.sleep(0.02)
            found["other name"] = answer(url, Host="example.org")
            found["other site"] = answer(f"{url}/clips?name=clip.mp4", clip.read_bytes(), Origin="https://example.org")
            found["no site"] = answer(f"{url}/clips?name=clip.mp4", clip.read_bytes())
            found["upload"] = answer(f"{url}/clips?name=clip.mp4", clip.read_bytes(), Origin=url)
            found["too large"] = answer(f"{url}/clips", b"", Origin=url, Content_Length=str(MOST_BYTES + 1))
            socket_headers = {
                "Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13",
                "Sec_WebSocket_Key": "x3JJHMbDL1EzLkh9GBhXDw==",
            }  # fmt: skip
            found["other site's socket"] = answer(f"{url}/play", **socket_headers, Origin="https://example.org")
        finally:
            if "page" in found:
                os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=visit)
    thread.start()
    gone = ("dataset.source=videos", "dataset.splits={val: 0.2, test: 0.2}", f"dataset.root={copied.folder / 'gone'}")
    copied.run("play", "--no-browser", "--port", str(port), sets=gone).refused(130, "play")
    thread.join()
    status, headers, body = found["page"]
    assert (status, b"<title>" in body) == (200, True)
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    statuses = {name: status for name, (status, _, _) in found.items()}
    assert statuses == {
        "page": 200, "other name": 403, "other site": 403, "no site": 403, "upload": 200, "too large": 413,
        "other site's socket": 403,
    }  # fmt: skip
    assert json.loads(found["upload"][2])["clip"]["name"] == "clip.mp4"


def test_a_port_in_use_is_refused(copied):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = str(used.getsockname()[1])
        copied.run("play", "--no-browser", "--port", port).refused(2, port)


@pytest.fixture(scope="module")
def player(trained) -> Player:
    """Its run has a fast decoder, which was not trained."""
    player = player_of(trained.runs, trained.folder / "tiny.yaml")
    decoder = FastDecoder(DecoderModelConfig(), player.predictor.autoencoder.config).eval()
    player.predictor = dataclasses.replace(player.predictor, fast_decoder=decoder)
    return player


@pytest.fixture(scope="module")
def url(player: Player) -> Iterator[str]:
    with served(player) as url:
        yield url


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Any]:
    """The open page; the console has no errors in the end."""
    page, errors = browser.new_page(viewport={"width": 1120, "height": 800}), list[str]()
    refused = "status of 422"  # the console has each refused upload
    page.on(
        "console", lambda told: errors.append(told.text) if told.type == "error" and refused not in told.text else 0
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    page.close()
    assert not errors


def test_a_chosen_clip_goes_on_live(tab, player):
    tab.locator("#clips button").nth(1).click()
    tab.select_option("#speed", "fast")
    assert tab.evaluate(WATCH, 40) > 3
    assert "predicted frame" in tab.inner_text("#where")
    tab.wait_for_selector("#rate:text('frames/s')")
    assert player.is_predicting
    tab.close()
    wait_until(lambda: not player.is_predicting)


def test_several_futures_begin_at_the_shown_frame_of_one(tab):
    tab.select_option("#speed", "fast")
    tab.evaluate(WATCH, 10)
    tab.click("#pause")
    where, (before,) = tab.inner_text("#where"), tab.evaluate(CANVASES)
    tab.click("#branch")
    tab.wait_for_selector("#futures button:nth-child(3)")
    assert tab.evaluate(CANVASES) == [before] * 3  # paused: nothing has moved
    assert tab.inner_text("#where") == where
    tab.click("#step")
    tab.wait_for_selector(f"#where:text('frame {int(where.split()[2].rstrip(',')) + 1}')")
    after = tab.evaluate(CANVASES)
    assert len({before, *after}) == 4
    tab.select_option("#nfe", "1")
    tab.select_option("#decoder", "fast")
    tab.click("#pause")
    tab.evaluate(WATCH, 40)


def test_a_wrong_file_and_one_that_is_too_large_are_refused_in_a_sentence(tab, tmp_path, story, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    notes, large, clip = tmp_path / "notes.mp4", tmp_path / "large.mp4", tmp_path / "clip.mp4"
    notes.write_text("no video")
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    story.write_video(clip, story.moving_square(12, 0))
    for path in (notes, large):
        tab.set_input_files("#file", path)
        tab.wait_for_selector(f"#note:has-text('{path.name}'):not(:has-text('Reading'))")
        assert str(temporary) not in tab.inner_text("#note")
    before = tab.locator("#clips button").count()
    tab.set_input_files("#file", clip)
    tab.wait_for_selector(f"#clips button:nth-child({before + 1})[aria-pressed=true]")
    assert tab.is_hidden("#note")
    wait_until(lambda: not list(temporary.iterdir()))
    tab.select_option("#speed", "fast")
    tab.evaluate(WATCH, 10)


def test_one_tab_plays_at_a_time_and_memory_does_not_grow(tab, browser, url):
    tab.select_option("#speed", "fast")
    tab.evaluate(WATCH, 50)
    with contextlib.closing(browser.new_page()) as other:
        other.goto(url)
        other.wait_for_selector("#where:text('frame')")
        tab.wait_for_selector("#note:has-text('tab')")
        tab.click("#pause")
        other.wait_for_selector("#note:has-text('tab')")
    before = resident()
    tab.evaluate(WATCH, 250)
    assert resident() - before < 8 * 2**20


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif("PLAY_PICTURE" not in os.environ, reason="PLAY_PICTURE=<run folder> renews docs/play.png")
def test_the_picture_of_the_docs(browser, repository):
    run = Path(os.environ["PLAY_PICTURE"])
    with (
        served(player_of(run, run / "config.yaml")) as url,
        contextlib.closing(browser.new_page(viewport={"width": 1060, "height": 740})) as page,
    ):
        page.goto(url)
        page.locator("#clips button").nth(3).click()
        page.select_option("#speed", "fast")
        page.evaluate(WATCH, 10)
        page.click("#branch")
        page.evaluate(WATCH, 30)
        page.wait_for_selector("#rate:text('frames/s')")
        page.screenshot(path=repository / "docs" / "play.png")
