"""The report of a real run in a real browser: nothing is requested, nothing fails, and the sampled frames are shown."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latent_cache
from pipelines.encoding.store_summary import count_codes, perplexity
from pipelines.prediction.pictures import file_name
from pipelines.report.predictions import read_clip

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)
EVIL = "<img src=x onerror=alert(1)><script>alert(1)</script>"
DARK, STILL = "--blink-settings=preferredColorScheme=0", "--force-prefers-reduced-motion"
# A page around the report that runs a test's script beside it and then holds the result.
# An open document within it delays its load event, for which the browser waits.
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body><iframe></iframe><script>
const open = document.querySelector("iframe").contentDocument;
open.open();
const frame = Object.assign(document.createElement("iframe"), {src: "ADDRESS"});
frame.style = "width: 1280px; height: 900px; border: 0";
frame.onload = async () => {
  const page = frame.contentWindow, find = (selector) => page.document.querySelector(selector);
  await Promise.allSettled([...page.document.images].map((image) => image.decode()));
  const second = () => new Promise((done) => setTimeout(done, 1000));
  document.body.dataset.value = JSON.stringify(await (async () => { SCRIPT })().catch(String));
  open.close();
};
document.body.append(frame);
</script>"""


def browse(page: Path, script: str, *options: str) -> tuple[Any, list[str]]:
    """Open a page in headless Chromium and run the body of a function beside it.

    Args:
        script: returns a JSON value, and uses `page` (window), `find(selector)`, `frame` (around the page) and
            `await second()`.
    Returns:
        The value, and the console's lines: errors, refused requests, messages.
    """
    around = page.with_name("around.html")
    around.write_text(HARNESS.replace("ADDRESS", page.as_uri()).replace("SCRIPT", script))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={page.with_name('profile')}", "--allow-file-access-from-files", "--enable-logging=stderr",
        "--window-size=1400,1000", *options, "--dump-dom", around.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    value = json.loads(html.unescape(re.search(r'<body data-value="([^"]*)"', done.stdout)[1]))
    return value, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


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
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_opens_without_errors_and_fits(page: Path, dark: bool) -> None:
    script = """
        const widths = [], details = page.document.querySelectorAll('details');
        for (const open of [false, true]) {
            details.forEach((part) => { part.open = open; });
            for (const width of [1280, 390, 320]) {
                frame.style.width = `${width}px`;
                widths.push(page.document.documentElement.scrollWidth - width);
            }
        }
        return {
            widths, images: [...page.document.images].map((image) => image.naturalWidth),
            loaded: page.performance.getEntriesByType('resource').map((entry) => entry.name),
            background: page.getComputedStyle(page.document.body).backgroundColor,
        };"""
    shown, complaints = browse(page, script, *([DARK] if dark else []))
    assert complaints == []
    assert shown["loaded"] == []
    assert len(shown["images"]) == 6  # four clips, the audited ones and the reconstructions
    assert all(shown["images"])
    assert shown["widths"] == [0] * 6  # wide parts scroll in their own boxes
    red, green, blue = map(int, re.findall(r"\d+", shown["background"]))
    assert (max(red, green, blue) < 60) == dark


@needs_browser
def test_frames_are_those_that_were_sampled(reported, page: Path) -> None:
    script = """return [0, 1, 2, 7].map((number) => {
        find('.frame').value = number;
        find('.frame').dispatchEvent(new page.Event('input'));
        return [...find('.clip').querySelectorAll('canvas')].map((canvas) => ({
            edge: page.getComputedStyle(canvas).borderTopColor, where: find('.where').textContent,
            pixels: [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data],
        }));
    });"""
    names = json.loads((reported.runs / "samples" / "samples.json").read_text())["clips"]
    gif = reported.runs / "samples" / f"{names[0]}.gif"
    truth, predicted = (video.astype(int) for video in read_clip(gif, (32, 32), 8, 10))
    expected = np.stack([truth, predicted, (2 * abs(truth - predicted)).clip(0, 255)])
    shown, _ = browse(page, script, STILL)
    for number, canvases in zip((0, 1, 2, 7), shown, strict=True):
        pixels = [np.reshape(canvas["pixels"], (32, 32, 4))[..., :3] for canvas in canvases]
        np.testing.assert_array_equal(pixels, expected[:, number])
    given, still_given, first, last = ([canvas["edge"] for canvas in canvases] for canvases in shown)
    assert len(set(given)) == 1  # both are given frames
    assert given == still_given
    assert first == last
    assert not set(given) & set(first)
    assert shown[-1][0]["where"] == "predicted frame 6"


@needs_browser
@pytest.mark.parametrize("still", [True, False])
def test_it_plays_unless_the_system_asks_for_reduced_motion(page: Path, still: bool) -> None:
    script = """const seen = [];
        for (const click of [false, true]) {
            if (click) find('.play').click();
            const before = find('.where').textContent;
            await second();
            seen.push([find('.play').textContent, find('.where').textContent !== before]);
        }
        return seen;"""
    paused, playing = ["Play", False], ["Pause", True]
    assert browse(page, script, *([STILL] if still else []))[0] == ([paused, playing] if still else [playing, paused])


@needs_browser
def test_values_appear_under_the_pointer(page: Path, reported) -> None:
    script = """const box = ({left, top, right, bottom}) => [left, top, right, bottom];
        const drawing = find('#quality svg[data-chart]'), outer = drawing.getBoundingClientRect();
        drawing.dispatchEvent(new page.PointerEvent('pointermove', {clientX: outer.right - 12}));
        const tip = find('#quality .tip');
        return [tip.textContent, box(tip.getBoundingClientRect()), box(outer)];"""
    curve = json.loads((reported.runs / "evaluation.json").read_text())["metrics"]["psnr"]["per_frame"]["prediction"]
    (text, inner, outer), _ = browse(page, script)
    assert text.startswith(f"predicted frame {len(curve)}")
    assert f"prediction {curve[-1]:.4g}" in text
    assert outer[0] <= inner[0] < inner[2] <= outer[2]
    assert outer[1] <= inner[1] < inner[3] <= outer[3]


@needs_browser
def test_text_of_files_runs_no_script(copied) -> None:
    path = copied.runs / "evaluation.json"
    content = json.loads(path.read_text())
    del content["content_sha256"]
    content["protocol"]["predictor"]["description"] = EVIL
    content["protocol"]["missing"] = {EVIL: EVIL}
    path.write_text(json.dumps(content))
    samples = copied.runs / "samples"
    listed = json.loads((samples / "samples.json").read_text())
    del listed["content_sha256"]
    (samples / f"{file_name(listed['clips'][0])}.gif").rename(samples / f"{file_name(EVIL)}.gif")
    (samples / "samples.json").write_text(json.dumps(listed | {"clips": [EVIL, *listed["clips"][1:]]}))
    copied.run("report").ok()
    report = copied.runs / "report.html"
    script = "return [find('#summary').textContent, find('#predictions').textContent, page.document.scripts.length];"
    (summary, predictions, scripts), complaints = browse(report, script)
    assert complaints == []
    assert EVIL in summary
    assert EVIL in predictions
    assert scripts == 1
    # The policy refuses scripts and pictures even where markup is in the page.
    report.write_text(report.read_text().replace("<footer>", f"<footer>{EVIL}"))
    _, refused = browse(report, "return 0;")
    assert len(refused) >= 2
    assert all("Content Security Policy" in line for line in refused)
