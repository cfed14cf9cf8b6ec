"""The tiny story of the end-to-end tests, for what goes wrong in it; the table of random faults."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

_specification = importlib.util.spec_from_file_location(
    "tiny_story", Path(__file__).parents[1] / "end_to_end" / "conftest.py"
)
_story = importlib.util.module_from_spec(_specification)
sys.modules["tiny_story"] = _story  # dataclasses look their module up
_specification.loader.exec_module(_story)

command, copied, place, story, trained = _story.command, _story.copied, _story.place, _story.story, _story.trained

_TABLE = pytest.StashKey[dict[str, Any]]()


@pytest.fixture
def fault_table(pytestconfig: pytest.Config) -> dict[str, Any]:
    """Kind -> seed -> trial, printed at the end."""
    return pytestconfig.stash.setdefault(_TABLE, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if table := config.stash.get(_TABLE, {}):
        terminalreporter.write_line("\nkind  | trials | right | wrong | seeds of the wrong ones")
    for kind, trials in table.items():
        wrong = [seed for seed, trial in trials.items() if trial.problem]
        right = len(trials) - len(wrong)
        terminalreporter.write_line(
            f"{kind:<5} | {len(trials):6} | {right:5} | {len(wrong):5} | {' '.join(map(str, wrong))}"
        )
