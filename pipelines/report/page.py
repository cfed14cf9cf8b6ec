"""The page around the sections: one file, which may load nothing and run nothing but its own script."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from pipelines.report.markup import Html, el, join


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: its address within the page.
        title: of the part, and of its link.
        content: its markup.
    """

    key: str
    title: str
    content: Html


def compose(name: str, summary: Html, sections: Sequence[Section], written: str) -> str:
    """The whole document.

    Args:
        name: of the run.
        summary: what stands at its top.
        written: date and version, for the foot; nothing else on the page depends on the time.
    """
    style, script = _resource("page.css"), _resource("page.js")
    # The browser itself is told: no network, no other script, whatever a file of the run may have brought in.
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{name} - RIVER run report"),
        el("link", rel="icon", href="data:,"),
        # What we wrote ourselves, and no part of any run.
        Html(f"<style>{style}</style>"),
    ]
    links = [el("a", section.title, href=f"#{section.key}") for section in sections]
    body = [
        el("a", "to the content", href="#summary", class_="skip"),
        el(
            "header",
            el("p", "RIVER, two-stage · run report", class_="eyebrow"),
            el("h1", name),
            el("div", summary, id="summary"),
        ),
        el("nav", links, aria_label="sections"),
        el(
            "main",
            [el("section", el("h2", part.title), part.content, id=part.key) for part in sections],
        ),
        el("footer", el("p", written)),
        Html(f"<script>{script}</script>"),
    ]
    return "<!DOCTYPE html>\n" + el("html", el("head", head), "\n", el("body", join(body)), lang="en") + "\n"


def _resource(name: str) -> str:
    text = files("pipelines.report").joinpath(name).read_text(encoding="utf-8")
    assert "</" not in text, f"{name} would end its own element"
    return text


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
