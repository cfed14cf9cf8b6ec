"""A run keeps the settings that it was trained with: `--set`, then the run, then the file of the configuration."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import yaml

from pipelines.runtime.files import SEAL


def edit_file(place, key: str, value: object) -> None:
    """Change one value in the place's configuration file."""
    path = place.folder / "tiny.yaml"
    values = yaml.safe_load(path.read_text())
    *sections, last = key.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    path.write_text(yaml.safe_dump(values))


def newest_step(place, what: str = "flow") -> int:
    return int(place.checkpoint(what).name.removeprefix("step_"))


def test_a_later_command_does_not_train_further_than_the_run_was_asked_to(trained, tmp_path: Path) -> None:
    place = trained.copy(tmp_path / "short", "latents", "runs")
    place.run("train-flow", "--restart", sets=["flow.training.steps=4", "flow.training.learning_rate=0.002"]).ok()
    outcome = place.run("sample").ok()
    assert newest_step(place) == 4
    assert "flow.training.steps: 8 -> 4" in outcome.out
    assert "flow.training.learning_rate: 0.001 -> 0.002" in outcome.out
    settings = json.loads((place.checkpoint("flow") / "state.json").read_text())["settings"]["flow"]["training"]
    assert (settings["steps"], settings["learning_rate"]) == (4, 0.002)


def test_a_file_that_was_edited_since_is_named_and_does_not_contradict(copied) -> None:
    copied.run("train-flow").ok()
    for key, value in (("autoencoder.training.steps", 60), ("flow.model.width", 64), ("dataset.splits.val", 2)):
        edit_file(copied, key, value)
    outcome = copied.run("evaluate").ok()
    for words in ("autoencoder.training.steps: 60 -> 6", "flow.model.width: 64 -> 32", "dataset.splits.val: 2 -> 4"):
        assert words in outcome.out
    assert newest_step(copied, "autoencoder") == 6
    # Folders and what does not decide a result are the file's.
    edit_file(copied, "logging.every", 3)
    assert "logging" not in copied.run("evaluate").ok().out


def test_what_is_set_contradicts_and_restart_takes_the_file(copied) -> None:
    copied.run("train-flow", sets=["flow.model.width=64"]).refused(2, "flow.model.width: 32 -> 64", "--restart")
    edit_file(copied, "flow.model.width", 16)
    copied.run("train-flow").ok()
    copied.run("train-flow", "--restart").ok()
    state = json.loads((copied.checkpoint("flow") / "state.json").read_text())
    assert state["settings"]["flow"]["model"]["width"] == 16


def test_more_steps_than_the_schedule_had_are_said(copied) -> None:
    outcome = copied.run("train-flow", sets=["flow.training.steps=10"]).ok()
    assert newest_step(copied) == 10
    assert re.search(r"end at step 8\b.*step 10\b.*--fine-tune", outcome.out)
    assert "rises again" not in copied.run("train-flow").ok().out


def test_a_run_with_more_past_remembers_it(copied) -> None:
    """From the samples of the training to predictions, without the settings being repeated."""
    past = ["flow.model.recent_frames=3", "flow.model.past_noise=0.25"]
    copied.run("train-flow", "--restart", sets=past).ok()
    outcome = copied.run("sample", "--videos", "1").ok()
    assert "flow.model.recent_frames: 1 -> 3" in outcome.out


def test_a_training_from_before_a_key_existed_goes_on(copied) -> None:
    """Neither a contradiction nor a changed setting, as long as the key has its default."""
    copied.run("train-flow").ok()
    file = copied.checkpoint("flow") / "state.json"
    state = json.loads(file.read_text())
    del state[SEAL]
    for part in ("identity", "settings"):
        del state[part]["flow"]["model"]["recent_frames"], state[part]["flow"]["training"]["past_horizon"]
    file.write_text(json.dumps(state))
    assert "flow: done" in copied.run("train-flow").ok().out
    longer = copied.run("train-flow", sets=["flow.training.steps=10"]).ok()
    assert "recent_frames" not in longer.out
    copied.run("train-flow", sets=["flow.model.recent_frames=2"]).refused(2, "flow.model.recent_frames: 1 -> 2")


def test_predictions_without_an_autoencoder_are_refused_before_a_training(trained, tmp_path: Path) -> None:
    place = trained.copy(tmp_path / "latents only", "latents")
    for command in ("sample", "evaluate", "study"):
        place.run(command).refused(2, str(place.runs / "autoencoder"), str(place.store), "paths.latents")
        assert not place.runs.exists()


def test_a_refused_training_changes_nothing(copied) -> None:
    before = (copied.runs / "config.yaml").read_bytes()
    copied.run("train-flow", "--resume", "4", sets=["flow.training.batch_size=100000"]).refused(2, "batch_size")
    copied.run("train-flow", "--resume", "4", sets=["cache.residency=device", "flow.training.steps=9"]).ok()
    assert (copied.runs / "config.yaml").read_bytes() != before


def test_a_training_that_is_refused_late_moves_no_checkpoint(copied, monkeypatch) -> None:
    import pipelines.training.flow_trainer as module  # the last refusal comes from the data
    from pipelines.errors import UserError

    def refuse(*_: object) -> None:
        raise UserError("these data do not fit")

    monkeypatch.setattr(module, "check_data", refuse)
    before = sorted(copied.runs.rglob("*"))
    for words in (["--resume", "4"], ["--restart"]):
        copied.run("train-flow", *words).refused(2, "these data do not fit")
        assert sorted(path for path in copied.runs.rglob("*") if not path.name.startswith(".lock")) == [
            path for path in before if not path.name.startswith(".lock")
        ]


def test_a_training_has_one_run_of_wandb_from_its_first_step_to_its_last(copied, monkeypatch) -> None:
    """Also where it was resumed, and without wandb in between; a new training has another."""
    begun, package = [], ModuleType("wandb")
    run = SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    package.init = lambda **options: begun.append(options["id"]) or run
    package.Image = str
    monkeypatch.setitem(sys.modules, "wandb", package)
    stories = (([], "offline"), ([], "off"), ([], "offline"), (["--resume", "10"], "offline"))
    for steps, (words, wandb) in enumerate(stories, start=9):
        copied.run("train-flow", *words, sets=[f"logging.wandb={wandb}", f"flow.training.steps={steps}"]).ok()
    copied.run("train-flow", "--restart", sets=["logging.wandb=offline", "flow.training.steps=1"]).ok()
    first, *others, new = begun
    assert others == [first, first]
    assert new != first
