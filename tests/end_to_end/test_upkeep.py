"""`clean` removes what it has shown, and nothing else; `doctor` describes the machine and the folder."""

import shutil
import sys
from importlib.metadata import version
from typing import Any

import pytest

from pipelines import __version__
from pipelines.runtime.files import replacing
from pipelines.runtime.run_folder import only_training_of


@pytest.fixture
def used(copied: Any) -> dict[str, list[str]]:
    """What killed and finished commands left in the copied place, by the options that remove it."""
    runs, store = copied.runs, copied.store
    left = {
        "": [
            runs / ".0123456789abcdef.partial.png",
            runs / "wide" / ".0123456789abcdef.partial",
            runs / "flow" / "checkpoints" / ".step_00000009.tmp",
            runs / "evaluation_records",
            store.with_suffix(".features.sqlite"),
        ],
        "--backups": [runs / "flow.20261128-201500", runs / "flow" / "checkpoints.20261128-201500-2"],
        "--run wide": [runs / "wide"],
        "--latents": [store],
    }
    shutil.copytree(runs / "flow", runs / "flow.20261128-201500")
    shutil.copytree(runs / "flow", runs / "wide" / "flow")
    (runs / "wide" / "config.yaml").touch()
    for path in (*left[""], left["--backups"][1]):
        if path.suffix in ("", ".tmp", ".20261128-201500-2") and not path.exists():
            path.mkdir(parents=True)
            path = path / "file"
        path.write_bytes(bytes(1000))
    return {options: [str(path) for path in paths] for options, paths in left.items()}


@pytest.mark.parametrize("options", ["", "--backups", "--run wide", "--latents"])
def test_clean_removes_what_it_shows_with_yes_alone(options, used, copied, story):
    paths, words, folder = used[options], options.split(), copied.folder
    before = story.tree(folder)
    with replacing(copied.runs / "samples" / "new.gif") as alive:  # of a command that is running
        for asked in (words, [*words, "--yes", "--dry-run"]):
            shown = copied.run("clean", *asked).ok().out
            assert all(path in shown for path in paths)
            assert str(alive) not in shown
        copied.run("clean", *words, "--yes").ok()
        assert alive.exists()
    gone = {name for name in before if any(f"{folder / name}/".startswith(f"{path}/") for path in paths)}
    assert gone
    after = story.tree(folder).keys() - {"runs/tiny/samples/new.gif", "tiny.yaml"}
    assert {name for name in after if ".lock" not in name} == {name for name in before if ".lock" not in name} - gone
    if options == "":
        assert "nothing to remove" in copied.run("clean").ok().out


def test_clean_says_what_it_costs(used, copied, story):
    assert "--backups" in copied.run("clean").ok().out
    assert "8 steps" in copied.run("clean", "--run", "wide").ok().out
    shown = copied.run("clean", "--latents").ok().out
    assert "24 + 4 + 4 videos" in shown
    # Nothing can make it again.
    lost = copied.run("clean", "--latents", sets=(*story.OWN_VIDEOS, "dataset.root=/no/where")).ok().out
    assert "/no/where" in lost


def test_clean_refuses_what_it_does_not_know_or_is_in_use(used, copied, story):
    before = story.tree(copied.folder)
    copied.run("clean", "--run", "narrow", "--yes").refused(2, f"{copied.runs}/narrow", "wide")
    with only_training_of(copied.runs / "wide" / "flow"):
        copied.run("clean", "--run", "wide", "--yes").refused(2, f"{copied.runs}/wide/flow")
    copied.run("clean", "--latents", "--yes", sets=("paths.latents=/no/where",)).refused(2, "/no/where/tiny.zarr")
    assert {name for name in before if ".lock" not in name} <= story.tree(copied.folder).keys()
    foreign = copied.folder / "mine" / "tiny.zarr"
    foreign.mkdir(parents=True)
    (foreign / "letters.txt").touch()
    copied.run("clean", "--latents", "--yes", sets=(f"paths.latents={foreign.parent}",)).refused(2, str(foreign))
    assert (foreign / "letters.txt").exists()


def test_doctor_fits_a_bug_report(used, copied, command, monkeypatch):
    monkeypatch.chdir(copied.folder)
    monkeypatch.setenv("HOME", str(copied.folder.parent))
    (copied.runs / "wide" / "flow" / "checkpoints" / "step_00000008" / "state.json").write_text("damaged")
    said = command(["doctor"]).ok().out
    assert len(said.splitlines()) < 30
    for part in (__version__, sys.version.split()[0], version("torch"), "bf16", "s3", "vgg16", "~/copied"):
        assert part in said
    assert str(copied.folder.parent) not in said
    lines = {line.split()[0].rstrip(":"): line for line in said.splitlines() if line.split()}
    assert "384 frames" in lines["latents/tiny.zarr"]
    assert "flow 8 steps" in lines["runs/tiny"]
    assert "runs/tiny/wide" in lines
