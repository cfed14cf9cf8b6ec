"""log.jsonl: one valid object per line, each step once."""

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from pipelines.config import parse_config
from pipelines.errors import UserError
from pipelines.runtime.logs import GrowingLog, StepTimer, TrainingLog, read_log, validation_pictures


def config(**logging):
    return parse_config({"dataset": {"name": "toy", "source": "shapes"}, "logging": logging}, "test")


def write(folder, steps, resumed_step=0, **extra) -> None:
    log = TrainingLog(folder, config(), "flow", resumed_step)
    for step in steps:
        log.write({"step": step, "loss": 1.0 / step, **extra})
    log.close()


def steps(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("before", "resumed_step", "after", "expected"),
    [
        ([10, 20, 30, 40], 25, [30, 40, 50], [10, 20, 30, 40, 50]),
        ([10, 20, 30], 20, [30], [10, 20, 30]),  # the line of the resumed step is kept
        ([10, 20], 0, [5], [5]),
    ],
)
def test_a_resumed_log_has_each_step_once(tmp_path, before, resumed_step, after, expected):
    write(tmp_path, before)
    write(tmp_path, after, resumed_step)
    assert steps(tmp_path) == expected


@pytest.mark.parametrize(
    "torn", [b'{"step": 30, "lo', b'{"loss": 2}\n', b"\x00\x00\x00", b"\xff\xfe\n", b"null\n", b"3\n"]
)
def test_damaged_lines_are_dropped(tmp_path, torn):
    write(tmp_path, [10, 20])
    with (tmp_path / "log.jsonl").open("ab") as stream:
        stream.write(torn)
    write(tmp_path, [30], resumed_step=20)
    assert steps(tmp_path) == [10, 20, 30]


@pytest.mark.parametrize(("old", "new"), [(b'"step": 20', b'"step"& 20'), (b"0.05", b"0.15"), (b"crc32", b"crc22")])
def test_a_damaged_line_is_told(tmp_path, capsys, old, new):
    write(tmp_path, [10, 20, 30])
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[1].replace(old, new) + lines[2] + b'{"step": 40, "lo')
    problem, _ = read_log(log).problems
    assert f"{log}, line 2: " in problem
    write(tmp_path, [40], resumed_step=30)
    assert steps(tmp_path) == [10, 30, 40]
    told = capsys.readouterr().err
    assert f"{log}: 1 damaged" in told
    assert told.count("\n") == 1
    write(tmp_path, [50], resumed_step=40)
    assert capsys.readouterr().err == ""


def test_a_log_of_an_earlier_version_goes_on(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 10, "loss": 0.1}\n{"step": 20, "loss": 0.05}\n')
    assert read_log(log).series("loss") == ([10, 20], [0.1, 0.05])
    write(tmp_path, [20], resumed_step=10)
    assert read_log(log).series("loss") == ([10, 20], [0.1, 0.05])
    assert capsys.readouterr().err == ""


def test_a_flushed_log_has_its_lines_and_its_name_on_disk(tmp_path, monkeypatch):
    log, flushed = TrainingLog(tmp_path / "made", config(), "flow", 0), []
    log.write({"step": 1})
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append(Path(f"/dev/fd/{descriptor}").resolve()))
    log.flush()
    log.close()
    assert flushed == [log.path, log.path.parent]


def test_a_line_that_cannot_be_written_names_the_log(tmp_path):
    log, limits = TrainingLog(tmp_path, config(), "flow", 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match=f"too large.*{log.path}"):
            log.write({"step": 1, "loss": 2.5})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_lines_are_on_disk_at_once(tmp_path):
    log = TrainingLog(tmp_path / "made" / "for it", config(), "flow", 0)
    log.write({"step": 1, "loss": 2.5})
    line = json.loads((tmp_path / "made" / "for it" / "log.jsonl").read_text())
    assert line == {"step": 1, "loss": 2.5, "crc32": "2d8596d8"}
    log.close()


def test_numbers_that_are_not_finite_are_strings(tmp_path):
    write(tmp_path, [1], a=float("nan"), b=float("-inf"), c=None, d="x")

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    line.pop("crc32")
    assert line == {"step": 1, "loss": 1.0, "a": "nan", "b": "-inf", "c": None, "d": "x"}


def picture_of(folder: Path, step: int) -> Path:
    """A picture as validation writes it."""
    path = folder / "samples" / f"step_{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (255, 0, 0)).save(path)
    return path


def test_wandb_is_used_only_when_it_is_on(tmp_path, monkeypatch):
    """A stand-in for the package notes what it is given."""
    calls, package = [], ModuleType("wandb")
    run = SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finished")
    )
    package.init = lambda **options: calls.append(options) or run
    package.Image, package.Error = Path, RuntimeError
    monkeypatch.setitem(sys.modules, "wandb", package)
    write(tmp_path, [2])
    assert calls == []
    log = TrainingLog(tmp_path, config(wandb="offline", wandb_project="mine"), "flow", 2)
    path = picture_of(tmp_path, 6)
    log.write({"step": 4, "loss": 0.25})
    log.write({"step": 6, "loss": 0.125})
    log.close()
    options, *rest = calls
    assert (options["mode"], options["project"], options["dir"]) == ("offline", "mine", str(tmp_path))
    assert (options["group"], options["job_type"]) == ("toy", "flow")
    assert rest == [({"loss": 0.25}, 4), ({"loss": 0.125, "samples": path}, 6), "finished"]


def test_what_wandb_refuses_is_one_line_with_the_key(tmp_path, monkeypatch):
    def refuse(**options):
        raise RuntimeError("no account\nand a long story")

    package = ModuleType("wandb")
    package.init, package.Error = refuse, RuntimeError
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(UserError, match=r"^logging.wandb: online: no account.*offline[^\n]*$"):
        TrainingLog(tmp_path, config(wandb="online"), "flow", 0)


def test_a_missing_package_is_one_line_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"^logging.tensorboard: .*pip install[^\n]*$"):
        TrainingLog(tmp_path, config(tensorboard=True), "flow", 0)


@pytest.mark.long
def test_tensorboard_continues_its_curves(tmp_path):
    """Scalars, pictures, and the configuration as text; a resumed training has no point twice."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for number, (steps, resumed_step) in enumerate((([10, 20, 30], 0), ([20, 30, 40], 10), ([50], 40))):
        log = TrainingLog(tmp_path, config(tensorboard=True, wandb_project=f"number {number}"), "flow", resumed_step)
        for step in steps:
            picture_of(tmp_path, 30)
            log.write({"step": step, "loss": step + number / 4, "note": "nan", "bad": math.nan})
        log.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(10, 10), (20, 20.25), (30, 30.25), (40, 40.25), (50, 50.5)]
    assert events.Tags()["scalars"] == ["loss", "bad"]
    assert [event.step for event in events.Images("samples")] == [30]
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary")]
    assert "wandb_project: number 2" in texts[-1]


@pytest.mark.long
def test_the_offline_folder_of_wandb_has_what_a_page_of_it_needs(tmp_path, monkeypatch):
    """By wandb's own reader: name, group, configuration, curves, picture, summary, and one run for both halves."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    state, found = None, []
    for resumed_step, steps in ((0, [10, 20]), (20, [30])):
        log = TrainingLog(tmp_path, config(wandb="offline"), "flow", resumed_step, state)
        picture_of(tmp_path, 20)
        for step in steps:
            log.write({"step": step, "loss": 1 / step})
        log.close()
        state = log.state
    for folder in sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        found.append(
            {kind: [each[kind] for each in records if each["type"] == kind] for kind in ("run", "history", "summary")}
        )
    (run, again) = (half["run"][0] for half in found)
    assert run["run_id"] == again["run_id"] == state["wandb_run"]
    assert again["resume"]
    assert (run["display_name"], run["run_group"], run["job_type"]) == ("toy-flow", "toy", "flow")
    assert run["config"]["update"]["flow"]["training"]["batch_size"] == config().flow.training.batch_size
    assert [(line["item"]["_step"], line["item"]["loss"]) for half in found for line in half["history"]] == [
        (10, 0.1), (20, 0.05), (30, 1 / 30)
    ]  # fmt: skip
    shown = found[0]["history"][-1]["item"]
    assert (shown["samples._type"], shown["samples.width"]) == ("image-file", 8)
    assert list((tmp_path / "wandb").glob(f"*/files/{shown['samples.path']}"))
    summary = {key: value for line in found[1]["summary"] for key, value in line["update"].items()}
    assert summary["loss"] == 1 / 30


def test_the_timer_counts_steps_since_its_last_reading(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    timer = StepTimer()
    for _ in range(6):
        timer.step()
    clock[0] += 2.0
    assert timer.rate() == 3.0
    timer.step()
    clock[0] += 0.5
    assert timer.rate() == 2.0


def test_lines_that_cannot_be_read_are_named(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 30, "loss": "nan"}\n{"step": 10, "loss": 1}\n{"step": 20, "lo\n[]\n{"loss": 3}\n'
        '{"step": "x"}\n{"step": NaN}\n{"step": 10, "validation_loss": 2.5}\n'
    )
    log = read_log(path)
    steps, losses = log.series("loss")
    assert steps == [10, 30]
    assert losses[0] == 1
    assert math.isnan(losses[1])
    assert log.finite("loss") == [(1, 10)]
    assert log.finite("validation_loss") == [(2.5, 10)]
    assert log.step == 30
    assert len(log.problems) == 5
    for number, problem in enumerate(log.problems, start=3):
        assert f"{path}, line {number}" in problem


def test_no_log_and_one_that_is_a_folder(tmp_path: Path):
    assert read_log(tmp_path / "none") is None
    log = read_log(tmp_path)
    assert log.records == {}
    assert str(tmp_path) in log.problems[0]
    assert log.median("loss") is None


def test_a_log_that_grows_is_read_from_where_it_was(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    log = GrowingLog(path)
    assert log.read() is None
    write(tmp_path, [10, 20])
    assert log.read().series("loss") == ([10, 20], [0.1, 0.05])
    with path.open("a") as stream:
        stream.write("no JSON\n" + '{"step": 30, "lo')  # the last line is still being written
    assert log.read().step == 20
    (problem,) = log.read().problems
    assert f"{path}, line 3" in problem
    with path.open("a") as stream:
        stream.write('ss": 0.5}\n')
    reads = []
    monkeypatch.setattr("pipelines.runtime.logs.LogLine.model_validate_json", reads.append)
    log.read()
    assert len(reads) == 1


def test_a_growing_log_that_was_cut_at_a_resume_is_read_again(tmp_path):
    log = GrowingLog(tmp_path / "log.jsonl")
    write(tmp_path, [10, 20, 30])
    assert log.read().step == 30
    write(tmp_path, [15], resumed_step=10)
    assert log.read().series("loss")[0] == [10, 15]
    (tmp_path / "log.jsonl").unlink()
    assert log.read() is None


def test_pictures_of_a_training_are_found_by_their_step(tmp_path):
    assert validation_pictures(tmp_path) == {}
    pictures = {step: picture_of(tmp_path, step) for step in (500, 1000)}
    (tmp_path / "checkpoints" / "step_00002000").mkdir(parents=True)
    (tmp_path / "samples" / "step_.png").touch()
    assert validation_pictures(tmp_path) == pictures
