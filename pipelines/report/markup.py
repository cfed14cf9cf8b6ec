"""HTML that cannot be broken into: whatever is not made here is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Html(str):
    """Markup that is what it is meant to be. Plain strings are text, and are escaped wherever they go."""

    __slots__ = ()


# What a child may be: markup, text, a number, several of these, or nothing.
Content = Any
VOID = {"img", "input", "link", "meta", "br", "circle", "line", "path", "polyline", "polygon", "rect"}


def el(tag: str, /, *children: Content, **attributes: Any) -> Html:
    """An element.

    Args:
        children: see `join`.
        attributes: `class_` is class, and `data_x` is data-x; None and False leave one out, True gives it no value.
    """
    words = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words.append(f'{name}="{escape(_text(value), quote=True)}"')
    start = f"<{' '.join(words)}>"
    if tag in VOID:
        assert not children, f"<{tag}> holds nothing"
        return Html(start if tag in ("img", "input", "link", "meta", "br") else start[:-1] + "/>")
    return Html(f"{start}{join(children)}</{tag}>")


def join(parts: Content) -> Html:
    """Markup as it is, text escaped, None left out, of sequences all one after the other."""
    if parts is None or parts is False:
        return Html("")
    if isinstance(parts, Html):
        return parts
    if isinstance(parts, Iterable) and not isinstance(parts, str):
        return Html("".join(map(join, parts)))
    return Html(escape(_text(parts), quote=False))


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]], label: str, numbers_from: int = 1) -> Html:
    """A table in a box of its own, which scrolls where a screen is narrow.

    Args:
        head: of the columns; the first column names the rows.
        label: what it is, for who cannot see it.
        numbers_from: the first column of numbers, which are aligned to the right.
    """

    def kind(column: int) -> str | None:
        return "number" if column >= numbers_from else None

    titles = [el("th", cell, scope="col", class_=kind(column)) for column, cell in enumerate(head)]
    body = [
        el(
            "tr",
            el("th", row[0], scope="row"),
            [el("td", cell, class_=kind(column)) for column, cell in enumerate(row[1:], start=1)],
        )
        for row in rows
    ]
    content = el("table", el("thead", el("tr", titles)), el("tbody", body))
    # Who has no mouse must be able to reach what scrolls.
    return el("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def facts(pairs: Iterable[tuple[str, Content]]) -> Html:
    """Names and what they are, as a list; what is empty is left out."""
    return el(
        "dl",
        [el("div", el("dt", name), el("dd", value)) for name, value in pairs if value not in (None, "")],
        class_="facts",
    )


def details(title: Content, *children: Content, open_: bool = False) -> Html:
    """What is folded away."""
    return el("details", el("summary", title), el("div", *children, class_="folded"), open=open_)


def note(kind: str, *children: Content) -> Html:
    """A remark: `warning`, `problem` (a file cannot be read) or `missing` (not there yet); `...` in a text is code."""
    parts = [child if isinstance(child, Html) else _with_code(_text(child)) for child in children]
    return el("p", parts, class_=f"note {kind}")


def code(text: str) -> Html:
    return el("code", text)


def _with_code(text: str) -> list[Content]:
    """Every second part between backticks; one that has no partner is a character like others."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return [text]
    return [code(part) if number % 2 else part for number, part in enumerate(parts)]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
