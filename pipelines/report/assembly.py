"""`report`: one self-contained HTML page of a run, of whatever is there of it."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from latent_cache import StoreError
from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.report.codes import autoencoder_section
from pipelines.report.evaluations import evaluations_section
from pipelines.report.inputs import Problem, Run
from pipelines.report.markup import Html, note
from pipelines.report.page import Section, compose
from pipelines.report.predictions import predictions_section
from pipelines.report.provenance import provenance_section
from pipelines.report.quality import quality_section
from pipelines.report.speed import speed_section
from pipelines.report.summary import summary_section
from pipelines.report.training_section import training_section
from pipelines.runtime.context import RunContext
from pipelines.runtime.progress import say, warn

# Of the whole file; pictures have budgets of their own, which leave room for everything else.
LARGEST_PAGE = 15_000_000

SECTIONS: dict[str, tuple[str, Callable[[Run], Html]]] = {
    "predictions": ("Predictions", predictions_section),
    "quality": ("Quality", quality_section),
    "evaluations": ("Quality against NFE", evaluations_section),
    "training": ("Training", training_section),
    "autoencoder": ("Autoencoder", autoencoder_section),
    "speed": ("Speed", speed_section),
    "run": ("What was run", provenance_section),
}


def report(config: RiverConfig, run_context: RunContext) -> Path:
    """Write `runs/<name>/report.html`; nothing is trained, predicted or measured for it.

    What lacks is said in its section, with the command that makes it; what is damaged, with its file.

    Returns:
        The page.
    Raises:
        UserError: there is no run.
    """
    run = Run(config)
    if run.is_empty():
        raise UserError(
            f"{run.path} holds no run to report on: `{run.command('train-autoencoder')}` begins one, `make demo` makes "
            "one in minutes, and --set paths.runs=<folder> says where another lies"
        )
    sections = [Section(key, title, _build(run, title, build)) for key, (title, build) in SECTIONS.items()]
    written = f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {run.path} by river report."
    text = compose(run.name, _build(run, "summary", summary_section), sections, written)
    size = len(text.encode())
    assert size < LARGEST_PAGE, f"{size} bytes: a section has no budget"
    path = run.path / "report.html"
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    say(f"report: {path}, {size / 1e6:.1f} MB, opens in any browser")
    return path


def _build(run: Run, title: str, build: Callable[[Run], Html]) -> Html:
    """A section, or why there is none: one damaged file must not hide all the others."""
    try:
        return build(run)
    except (Problem, UserError, StoreError) as error:
        message = str(error)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
        message = f"{run.path}: a file of this section is not what its writer makes: {type(error).__name__}: {error}"
    warn(f"report: {title}: {message}")
    return note("problem", message)
