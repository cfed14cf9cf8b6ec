"""The documentation as a site: built without a network, complete, and readable in a browser."""

import contextlib
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("material", reason="the extra docs is not installed")

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOADING = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
VIEWS = {
    "light": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 400, "height": 800}, "color_scheme": "light"},
}

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=REPOSITORY,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


class Loaded(HTMLParser):
    """What a page loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses = list[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag in LOADING and named.get("rel") != "canonical" and (address := named.get(LOADING[tag])):
            self.addresses.append(address)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        assert not [address for address in Loaded(page).addresses if re.match(r"(https?:)?//", address)], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_every_page_is_in_the_navigation(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    for page in (path for path in (REPOSITORY / "docs").iterdir() if path.suffix in {".md", ".ipynb"}):
        assert f'href="{page.stem}.html" class="md-nav__link"' in home, page.name


def test_code_that_is_not_run_says_so(site: Path) -> None:
    for page in (REPOSITORY / "docs").glob("*.md"):
        marked = re.findall(r"^<!-- not run: .+ -->\n```", page.read_text(encoding="utf-8"), re.MULTILINE)
        shown = (site / f"{page.stem}.html").read_text(encoding="utf-8").count(">not run: ")
        assert shown == len(marked), page.name


def test_the_reference_has_the_public_names(site: Path) -> None:
    import river_two_stage

    reference = (site / "api.html").read_text(encoding="utf-8")
    for name in set(river_two_stage.__all__) - {"__version__", "open_store"}:
        assert re.search(rf'id="[\w.]+\.{name}"', reference), name


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with (
        playwright.sync_playwright() as driver,
        contextlib.closing(driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])) as opened,
    ):
        yield opened


@pytest.mark.parametrize("view", VIEWS)
def test_every_page_opens(view: str, site: Path, address: str, browser: Any) -> None:
    """Without an error, a request to elsewhere, a picture that is missing, or scrolling to the side."""
    with contextlib.closing(browser.new_context(**VIEWS[view])) as context:
        tab, problems = context.new_page(), list[str]()
        tab.on("console", lambda told: problems.append(told.text) if told.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on(
            "request", lambda asked: None if asked.url.startswith((address, "data:")) else problems.append(asked.url)
        )
        for page in sorted(site.glob("*.html")):
            tab.goto(f"{address}/{page.name}")
            tab.wait_for_function("[...document.images].every((image) => image.complete)")
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), page.name
            assert tab.evaluate("[...document.images].every((image) => image.naturalWidth)"), page.name
            assert not problems, page.name


def test_search_finds_a_page(address: str, browser: Any) -> None:
    with contextlib.closing(browser.new_page()) as tab:
        tab.goto(f"{address}/index.html")
        tab.fill("input.md-search__input", "silhouettes")
        tab.wait_for_selector(".md-search-result__link[href*='evaluation.html']", state="attached")
