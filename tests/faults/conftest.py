"""The tiny story of the end-to-end tests, for what goes wrong in it."""

import importlib.util
import sys
from pathlib import Path

_specification = importlib.util.spec_from_file_location(
    "tiny_story", Path(__file__).parents[1] / "end_to_end" / "conftest.py"
)
_story = importlib.util.module_from_spec(_specification)
sys.modules["tiny_story"] = _story  # dataclasses look their module up
_specification.loader.exec_module(_story)

command, copied, place, story, trained = _story.command, _story.copied, _story.place, _story.story, _story.trained
