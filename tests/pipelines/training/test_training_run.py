"""The status of a training, and resuming it: conflicts, named checkpoints, restart, lock."""

import os

import pytest
import torch

from pipelines.config import parse_config
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.context import RunContext
from pipelines.runtime.distributed import Processes
from pipelines.runtime.run_folder import only_training_of
from pipelines.training import training_run
from pipelines.training.training_loop import LoopSettings
from pipelines.training.training_run import TrainingPlan, training_status

TENSORS = {"model": {"a": torch.zeros(1)}, "optimizer": {"a": torch.zeros(1)}}


@pytest.fixture
def trained(tmp_path):
    folder = tmp_path / "flow"
    CheckpointFolder(folder / "checkpoints").save(7, TENSORS, {"identity": {"seed": 0, "b": {"c": 1}}})
    return folder


def plan(folder, identity, steps=10, **options):
    loop = LoopSettings("flow", steps=steps, checkpoint_every=1, validate_every=1, log_every=1)
    return TrainingPlan(folder=folder, loop=loop, keep=2, identity=identity, settings={}, **options)


def resume(folder, identity, restart=False, **options):
    run_context = RunContext(torch.device("cpu"), restart=restart, **options)
    return training_run.resume(plan(folder, identity), run_context)


def test_nothing_to_resume(tmp_path):
    for restart in (False, True):
        checkpoints, found = resume(tmp_path / "flow", {"seed": 0}, restart)
        assert found is None
        assert checkpoints.keep == 2


def test_the_same_configuration_resumes(trained):
    assert resume(trained, {"seed": 0, "b": {"c": 1}})[1].step == 7


def test_another_configuration_is_refused_with_the_way_out(trained):
    with pytest.raises(UserError, match=r"b\.c: 1 -> 2\n") as error:
        resume(trained, {"seed": 0, "b": {"c": 2}})
    assert "--restart" in str(error.value)
    assert "--run" in str(error.value)


def test_restart_resumes_nothing_and_moves_nothing_before_the_training_begins(trained):
    checkpoints, found = resume(trained, {"seed": 1}, restart=True)
    assert found is None
    assert checkpoints.latest().step == 7


def test_a_second_process_moves_nothing(trained):
    second = Processes(1, 2)
    CheckpointFolder(trained / "checkpoints").save(9, TENSORS, {"identity": {"seed": 0}})
    assert resume(trained, {"seed": 0, "b": {"c": 1}}, resume="7", processes=second)[1].step == 7
    assert resume(trained, {"seed": 1}, restart=True, processes=second)[1] is None
    assert [path.name for path in trained.parent.glob("flow*")] == ["flow"]
    assert [path.name for path in trained.glob("checkpoints*")] == ["checkpoints"]
    assert CheckpointFolder(trained / "checkpoints").latest().step == 9


def test_a_resume_from_a_name_is_checked_and_moves_nothing(trained):
    CheckpointFolder(trained / "checkpoints").save(9, TENSORS, {"identity": {"seed": 0}})
    with pytest.raises(UserError, match=r"b\.c: 1 -> 2"):
        resume(trained, {"seed": 0, "b": {"c": 2}}, resume="7")
    assert [path.name for path in trained.glob("checkpoints*")] == ["checkpoints"]
    checkpoints, found = resume(trained, {"seed": 0, "b": {"c": 1}}, resume="7")
    assert (found.step, checkpoints.latest().step) == (7, 9)
    assert [path.name for path in trained.glob("checkpoints*")] == ["checkpoints"]


@pytest.mark.parametrize("state", ["[", "[]", "{}"])
def test_resuming_from_a_damaged_name(trained, state):
    (trained / "checkpoints" / "step_00000007" / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"--resume 7: .*step_00000007 is not a whole checkpoint .*--resume auto"):
        resume(trained, {}, resume="7")


def test_a_running_training_is_not_moved(trained):
    config = parse_config({"dataset": {"name": "toy", "source": "shapes"}}, "test")
    run_context = RunContext(torch.device("cpu"), restart=True)
    for _ in range(2):  # the second time there is a number in the file already
        with only_training_of(trained):
            with pytest.raises(UserError, match=rf"flow: process {os.getpid()} is training here"):
                training_run.train(plan(trained, {"seed": 1}), config, run_context, lambda found, held: None)
            assert CheckpointFolder(trained / "checkpoints").latest().step == 7


def test_a_number_of_steps_that_is_open_is_that_of_the_checkpoints(tmp_path):
    asked = plan(tmp_path, {"seed": 0}, steps=None)
    assert training_status(asked).state == "missing"
    assert "--minutes" in training_status(asked).detail
    settings = {"flow": {"training": {"steps": 9}}}
    CheckpointFolder(tmp_path / "checkpoints").save(7, TENSORS, {"identity": {"seed": 0}, "settings": settings})
    assert (training_status(asked).state, training_status(asked).detail) == ("partial", "7 of 9 steps")
    assert training_status(plan(tmp_path, {"seed": 0}, steps=7)).is_done


@pytest.mark.parametrize(
    ("identity", "inputs", "steps", "state", "needed"),
    [
        ({"seed": 0, "b": {"c": 1}}, {}, 10, "partial", "7 of 10 steps"),
        ({"seed": 0, "b": {"c": 1}}, {}, 7, "done", "7 steps"),
        ({"seed": 0, "b": {"c": 2}}, {}, 7, "conflicting", "b.c: 1 -> 2"),
        ({"seed": 0, "b": {"c": 1}}, {"store": {"fingerprint": "x"}}, 7, "done", "7 steps"),
        ({"seed": 0, "b": {"c": 1}}, {"store": {"fingerprint": "y"}}, 7, "conflicting", "store.fingerprint: x -> y"),
    ],
)
def test_how_far_a_training_is(tmp_path, identity, inputs, steps, state, needed):
    def status():
        return training_status(plan(tmp_path, identity, steps, inputs=inputs))

    assert (status().state, status().path) == ("missing", tmp_path)
    recorded = {"identity": {"seed": 0, "b": {"c": 1}}, "store": {"path": "somewhere", "fingerprint": "x"}}
    CheckpointFolder(tmp_path / "checkpoints").save(7, TENSORS, recorded)
    assert status().state == state
    assert needed in status().detail
