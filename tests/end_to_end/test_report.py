"""The report of a real run in a real browser: nothing is requested, nothing fails, and the sampled frames are shown."""

import base64
import io
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import latent_cache
from pipelines.encoding.store_summary import count_codes, perplexity
from pipelines.prediction.pictures import file_name
from pipelines.report.predictions import read_clip

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
PATIENCE = 60  # seconds
EVIL = "<img src=x onerror=alert(1)><script>alert(1)</script>"


class Browser:
    """A tab of a headless Chromium, driven over its DevTools pipe, which needs no package and no port."""

    def __init__(self, profile: Path) -> None:
        # Chromium reads commands from descriptor 3 and writes answers to 4; a zero byte ends each message.
        theirs, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--hide-scrollbars", "--disable-background-networking", f"--user-data-dir={profile}",
            "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{answers}', str(CHROMIUM), *options],
            pass_fds=(theirs, answers), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self._numbers, self._received, self._tab = itertools.count(1), b"", None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._tab = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result; events that arrive meanwhile go to `events`."""
        message = {"id": next(self._numbers), "method": method, "params": parameters}
        if self._tab is not None:
            message["sessionId"] = self._tab
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != message["id"]:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int = 1280, *, dark: bool = False, still: bool = True) -> None:
        """Load a page as a phone or a desktop does and wait for its pictures."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        preferences = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        self.call(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": preferences[name]} for name in preferences]
        )
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not self._events_of("Page.loadEventFired"):
            self.events.append(self._receive())
        self.value("Promise.allSettled([...document.images].map((image) => image.decode())).then(() => true)")

    def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Errors, warnings, console messages and dialogs."""
        names = (
            "Log.entryAdded",
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Page.javascriptDialogOpening",
        )
        return [event for name in names for event in self._events_of(name)]

    def requests(self) -> list[str]:
        """Addresses that were requested."""
        return [event["params"]["request"]["url"] for event in self._events_of("Network.requestWillBeSent")]

    def screenshot(self) -> np.ndarray:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._commands)
        os.close(self._answers)

    def _events_of(self, method: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("method") == method]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            part = os.read(self._answers, 2**20) if ready else b""
            assert part, "the browser does not answer"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the trained place with its report."""
    place = trained.copy(tmp_path_factory.mktemp("reported") / "place", "latents", "runs")
    place.run("report").ok()
    return place


@pytest.fixture(scope="module")
def page(reported) -> Path:
    return reported.runs / "report.html"


def test_the_report_of_a_demo(reported, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < 15_000_000
    evaluation = json.loads((reported.runs / "evaluation.json").read_text())
    assert f"{evaluation['metrics']['psnr']['prediction']:.2f}" in text
    train = latent_cache.open(reported.store)
    assert train.fingerprint in text
    assert train.metadata.autoencoder["sha256"] in text
    for split in ("train", "val", "test"):
        cache = latent_cache.open(reported.store, split)
        counts = count_codes(cache)
        assert counts.sum() == cache.codes.size
        assert perplexity(counts) == pytest.approx(cache.notes["code_perplexity"])
        assert f">{counts.sum():,}</td>" in text
    assert 'class="note problem"' not in text


def test_a_damaged_store_is_reported(copied) -> None:
    chunk = next(path for path in sorted((copied.store / "train" / "codes" / "c").rglob("*")) if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"\0")
    copied.run("report").ok()
    text = (copied.runs / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'class="note problem"', text)) == 1
    assert str(chunk.relative_to(copied.folder)) in text


@needs_browser
@pytest.mark.parametrize("width", [1280, 390, 320])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_opens_without_errors_and_fits(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark, still=False)
    assert browser.complaints() == []
    assert {url.partition(":")[0] for url in browser.requests()} <= {"file", "data"}
    assert [url for url in browser.requests() if url.startswith("file")] == [page.as_uri()]
    assert browser.value("document.images.length") == 5  # four clips and the reconstructions
    assert browser.value("[...document.images].every((image) => image.naturalWidth > 0)")
    assert browser.value("document.documentElement.scrollWidth") == width
    browser.value("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert browser.value("document.documentElement.scrollWidth") == width  # wide parts scroll in their own boxes
    shown = browser.screenshot()
    assert shown.shape == (900, width, 3)
    assert (np.median(shown) < 60) == dark
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 50  # not blank


@needs_browser
def test_frames_are_those_that_were_sampled(browser: Browser, reported, page: Path) -> None:
    browser.open(page)
    names = json.loads((reported.runs / "samples" / "samples.json").read_text())["clips"]
    read = """(frame) => {
        const slider = document.querySelector('.frame');
        slider.value = frame;
        slider.dispatchEvent(new Event('input'));
        return [...document.querySelector('.clip').querySelectorAll('canvas')].map((canvas) => ({
            edge: getComputedStyle(canvas).borderTopColor, side: canvas.width,
            pixels: [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data],
        }));
    }"""
    truth, predicted = (video.astype(int) for video in read_clip(reported.runs / "samples" / f"{names[0]}.gif", 32, 8))
    expected = np.stack([truth, predicted, (2 * abs(truth - predicted)).clip(0, 255)])
    edges = []
    for frame in (0, 1, 2, 7):
        canvases = browser.value(f"({read})({frame})")
        shown = [np.reshape(canvas["pixels"], (canvas["side"], canvas["side"], 4))[..., :3] for canvas in canvases]
        np.testing.assert_array_equal(shown, expected[:, frame])
        edges.append([canvas["edge"] for canvas in canvases])
    assert len(set(edges[0])) == 1  # both are given frames
    assert edges[0] == edges[1]
    assert edges[2] == edges[3]
    assert not set(edges[0]) & set(edges[2])
    assert browser.value("document.querySelector('.where').textContent") == "predicted frame 6"


@needs_browser
@pytest.mark.parametrize("still", [True, False])
def test_it_plays_unless_the_system_asks_for_reduced_motion(browser: Browser, page: Path, still: bool) -> None:
    browser.open(page, still=still)
    moves = """new Promise((done) => {
        const slider = document.querySelector('.frame'), seen = new Set(), end = performance.now() + 1500;
        const look = () => {
            seen.add(slider.value);
            if (seen.size > 1 || performance.now() > end) done(seen.size > 1); else setTimeout(look, 20);
        };
        look();
    })"""
    assert browser.value("document.querySelector('.play').textContent") == ("Play" if still else "Pause")
    assert browser.value(moves) is not still
    browser.value("document.querySelector('.play').click()")
    assert browser.value(moves) is still


@needs_browser
def test_values_appear_under_the_pointer(browser: Browser, page: Path, reported) -> None:
    browser.open(page)
    place = browser.value("""(() => {
        const drawing = document.querySelector('#quality svg[data-chart]');
        drawing.scrollIntoView({block: 'center'});
        const box = drawing.getBoundingClientRect();
        return [box.left, box.top, box.width, box.height];
    })()""")
    left, top, width, height = place
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + width - 12, y=top + height / 2)
    curve = json.loads((reported.runs / "evaluation.json").read_text())["metrics"]["psnr"]["per_frame"]["prediction"]
    tip = browser.value("document.querySelector('#quality .tip').textContent")
    assert tip.startswith(f"predicted frame {len(curve)}")
    assert f"prediction {curve[-1]:.4g}" in tip
    box = "(({left, top, right, bottom}) => [left, top, right, bottom])(%s.getBoundingClientRect())"
    inner = browser.value(box % "document.querySelector('#quality .tip')")
    assert left <= inner[0] < inner[2] <= left + width
    assert top <= inner[1] < inner[3] <= top + height


@needs_browser
def test_text_of_files_runs_no_script(browser: Browser, copied) -> None:
    path = copied.runs / "evaluation.json"
    content = json.loads(path.read_text())
    content["protocol"] |= {"description": EVIL, "missing": {EVIL: EVIL}}
    path.write_text(json.dumps(content))
    samples = copied.runs / "samples"
    listed = json.loads((samples / "samples.json").read_text())
    (samples / f"{file_name(listed['clips'][0])}.gif").rename(samples / f"{file_name(EVIL)}.gif")
    (samples / "samples.json").write_text(json.dumps(listed | {"clips": [EVIL, *listed["clips"][1:]]}))
    copied.run("report").ok()
    report = copied.runs / "report.html"
    browser.open(report)
    assert browser.complaints() == []
    assert EVIL in browser.value("document.querySelector('#summary').textContent")
    assert EVIL in browser.value("document.querySelector('#predictions').textContent")
    assert browser.value("document.scripts.length") == 1
    # The policy refuses scripts and pictures even where markup is in the page.
    report.write_text(report.read_text().replace("<footer>", f"<footer>{EVIL}"))
    browser.open(report.rename(report.with_name("broken.html")))
    refused = [event["params"]["entry"]["text"] for event in browser.complaints() if "entry" in event["params"]]
    assert len(refused) >= 2
    assert all("Content Security Policy" in text for text in refused)
