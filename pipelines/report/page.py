"""The page: sections rendered one by one, in one file that loads nothing and runs no script but its own."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from latent_cache import StoreError
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.report import charts
from pipelines.report.contents import autoencoder_section, contents_section
from pipelines.report.predictions import predictions_section
from pipelines.report.quality import headline, quality_section, study_section
from pipelines.report.run_files import Missing, Run
from pipelines.report.trainings import speed_section, training_section
from pipelines.report.warnings import run_warnings
from pipelines.runtime.files import size_text, write_text
from pipelines.runtime.progress import say, warn

# Bytes of the whole file; pictures have budgets of their own, which leave room for everything else.
MAX_PAGE = 15_000_000

# Key, which is its address in the page and its template -> title and the function that makes the template's values.
SECTIONS: dict[str, tuple[str, Callable[[Run], dict[str, Any]]]] = {
    "predictions": ("Predictions", predictions_section),
    "quality": ("Quality", quality_section),
    "study": ("Quality against NFE", study_section),
    "training": ("Training", training_section),
    "autoencoder": ("Autoencoder", autoencoder_section),
    "speed": ("Speed", speed_section),
    "contents": ("What was run", contents_section),
}


def write_report(config: RiverConfig) -> Path:
    """Write `runs/<name>/report.html`; nothing is trained, predicted or measured for it.

    Missing parts are reported in their section with the command that makes them, damaged ones with their file.

    Returns:
        The page.
    Raises:
        UserError: there is no run.
    """
    run = Run(config)
    if run.is_empty():
        raise UserError(
            f"{run.path}: there is no run to report on; `{run.command('train-flow')}` starts one, `river demo` "
            "makes one in minutes, and --set paths.runs=<folder> reads another place"
        )
    environment = template_environment()
    style, script = read_template("house.css") + read_template("page.css"), read_template("page.js")
    text = environment.get_template("page.html").render(
        name=run.name,
        summary=render_section(run, "summary", lambda run: headline(run) | {"warnings": [*run_warnings(run)]}),
        sections=[(key, title, render_section(run, key, build)) for key, (title, build) in SECTIONS.items()],
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {run.path}",
        style=Markup(style),
        script=Markup(script),
        style_digest=_digest(style),
        script_digest=_digest(script),
    )
    size = len(text.encode())
    assert size < MAX_PAGE, f"{size} bytes: a section has no budget"
    path = run.path / "report.html"
    write_text(path, text)
    say(f"report: {path}, {size_text(size)}, opens in any browser")
    return path


@cache
def template_environment() -> jinja2.Environment:
    """Templates of this package. Every value is escaped, and a name that is not defined is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"with_code": _with_code, "flattened": _flattened}
    environment.filters |= {"number": charts.number_text, "tick": charts.tick_text}
    environment.globals |= {name: value for name, value in vars(charts).items() if name.isupper()}
    return environment


def render_section(run: Run, key: str, build: Callable[[Run], dict[str, Any]]) -> Markup:
    """A section, or why there is none: a damaged file must not hide the others."""
    environment = template_environment()
    try:
        return Markup(environment.get_template(f"{key}.html").render(run=run, **build(run)))
    except Missing as missing:
        return _note(environment, "missing", str(missing))
    except (UserError, StoreError) as error:
        message = str(error)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        message = f"{run.path}: a file of this section has unexpected content: {type(error).__name__}: {error}"
    warn(f"report: {key}: {message}")
    return _note(environment, "problem", message)


def _note(environment: jinja2.Environment, kind: str, text: str) -> Markup:
    return environment.get_template("macros.html").module.note(kind, text)


def _with_code(text: str) -> Markup:
    """Text in which parts between backticks are code; a backtick without a partner is a character like others."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    # Both `format` and `join` of Markup escape what is plain text.
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as pairs of a dotted name and a text; None is left out."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flattened(value, f"{prefix}{name}.")
        elif value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            pairs.append((f"{prefix}{name}", text))
    return pairs


def read_template(name: str) -> str:
    """A template of this package, or another text of its page."""
    return files("pipelines.report").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """For the content security policy, which lets the browser run and apply this text only."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
