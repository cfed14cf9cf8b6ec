"""The page of trainings that run: what it says of a run's folder, which changes under it."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.config import parse_config
from pipelines.report.live_page import Watcher
from pipelines.runtime.checkpoints import CheckpointFolder

EVIL = "<script>alert(1)</script>"


class Run:
    """A run that is written part by part, and who watches it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs" / "toys"
        content: dict[str, Any] = {
            "paths": {name: str(folder / name) for name in ("data", "latents", "runs")},
            "dataset": {"name": "toys", "source": "shapes", "image_size": 32},
            "flow": {"training": {"steps": 400}},
        }
        self.watcher = Watcher(parse_config(content, "a test"))

    def log(self, training: str, *steps: int, **values: Any) -> None:
        path = self.folder / training / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            for step in steps:
                record = {"step": step, "loss": 1 / step, "steps_per_second": 2.0} | values
                stream.write(json.dumps(record) + "\n")

    def checkpoint(self, training: str, step: int, steps: int) -> None:
        state = {"settings": {training: {"training": {"steps": steps}}}}
        CheckpointFolder(self.folder / training / "checkpoints").save(step, {}, state)

    def picture(self, training: str, step: int, suffix: str = ".png") -> Path:
        path = self.folder / training / "samples" / f"step_{step:08d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path)
        return path

    def tiles(self) -> list[dict[str, str]]:
        """Per section the words of its tiles."""
        sections = self.watcher.text().split("<section")[1:]
        pattern = re.compile(r'<div class="name">(.*?)</div><div class="value">(.*?)</div></div>')
        return [{n: re.sub("<.*?>", "", v) for n, v in pattern.findall(section)} for section in sections]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def ids(text: str) -> list[str]:
    return re.findall('<section id="([a-z]+)"', text)


def test_a_training_appears_when_it_begins_and_the_newest_is_first(run):
    assert "train-flow" in run.watcher.text()
    assert ids(run.watcher.text()) == []
    run.log("autoencoder", 10)
    assert ids(run.watcher.text()) == ["autoencoder"]
    run.log("flow", 50)
    hour_ago = time.time() - 3600
    os.utime(run.folder / "autoencoder" / "log.jsonl", (hour_ago, hour_ago))
    assert ids(run.watcher.text()) == ["flow", "autoencoder"]


def test_it_says_how_far_a_training_is_and_how_long_it_takes(run):
    run.checkpoint("flow", 50, steps=400)
    run.log("flow", 50, 100, 150)
    run.log("flow", 200, validation_loss=0.125)
    (told,) = run.tiles()
    assert told == {
        "Step": "200 of 400", "Loss": "0.005", "Validation loss": "0.125", "Rate": "2 steps/s", "Left": "2 min"
    }  # fmt: skip
    run.log("flow", 250, steps_per_second=0.5)
    assert run.tiles()[0]["Validation loss"] == "0.125 at 200"
    run.log("flow", 400)
    (told,) = run.tiles()
    assert (told["Step"], "Left" in told) == ("400 of 400", False)


def test_a_number_of_steps_that_is_not_known_yet_is_left_out(run):
    run.log("decoder", 50)
    (told,) = run.tiles()
    assert (told["Step"], "Left" in told) == ("50", False)


@pytest.mark.parametrize(("every", "late"), [(50, 300), (1000, 1500)])  # seconds
def test_a_training_is_late_when_lines_that_were_due_are_missing(run, every, late):
    run.log("flow", every, 2 * every)
    assert f'data-late="{late}.0"' in run.watcher.text()


def test_nothing_is_drawn_again_until_something_is_new(run):
    run.log("flow", 50)
    before = run.watcher.text()
    assert run.watcher.text() is before
    run.log("flow", 100)
    assert run.watcher.text() != before


def test_the_newest_validation_is_shown_playing_if_it_plays_and_no_other_file_is_served(run):
    run.picture("flow", 50)
    run.picture("flow", 100)
    plays = run.picture("flow", 100, ".gif")
    run.picture("flow", 200)  # of before the training was resumed
    run.log("flow", 100)
    text = run.watcher.text()
    (address,) = re.findall('<img src="pictures/(.*?)"', text)
    assert run.watcher.pictures == {address: plays}
    new = run.picture("flow", 150)
    run.log("flow", 150)
    run.watcher.text()
    assert [*run.watcher.pictures.values()] == [new]


def test_signs_of_trouble_are_warnings(run):
    run.log("flow", 50, validation_loss=0.1)
    assert 'class="note' not in run.watcher.text()
    run.log("flow", 100, validation_loss=0.2, skipped_steps=3)
    assert run.watcher.text().count('class="note warning"') == 2


def test_damaged_and_hostile_files_are_named_and_hide_nothing(run):
    run.log("autoencoder", 10)
    run.log("flow", 50)
    with (run.folder / "flow" / "log.jsonl").open("a") as stream:
        stream.write(f'{{"step": "{EVIL}"}}\n')
    (run.folder / "flow" / "checkpoints" / "step_00000050").mkdir(parents=True)
    (run.folder / "flow" / "checkpoints" / "step_00000050" / "state.json").write_text("{")
    (run.folder / "config.yaml").write_text("flow: 1")
    text = run.watcher.text()
    assert set(ids(text)) == {"flow", "autoencoder"}
    assert "log.jsonl, line 2" in text
    assert EVIL not in text
