"""`distill` on the tiny story: a student is a run like any other, that takes one evaluation per frame."""

import json
import shutil

import pytest
import torch

from pipelines.predictor import VideoPredictor
from stage2_flow.rollout import CachedEvaluator

STUDENT = ("--run", "student")
LONG = ("distillation.steps_share=0.5",)


@pytest.fixture(scope="module")
def distilled(trained, tmp_path_factory):
    """A place with a student. Tests must not change it: they copy it."""
    place = trained.copy(tmp_path_factory.mktemp("student") / "place", "latents", "runs")
    place.run("distill", sets=LONG).ok()
    return place


def test_a_student_is_a_run_that_takes_one_evaluation_per_frame(
    distilled, trained, story, tmp_path, monkeypatch
) -> None:
    state = json.loads((distilled.checkpoint("student/flow") / "state.json").read_text())
    assert (state["step"], state["teacher"]["run"], state["teacher"]["sampler"]["steps"]) == (4, None, 2)
    before = story.tree(distilled.runs / "student/flow/checkpoints")
    assert "done" in distilled.run("distill").ok().out
    assert "done" in distilled.run("train-flow", *STUDENT).ok().out
    assert story.tree(distilled.runs / "student/flow/checkpoints") == before
    assert story.tree(distilled.runs / "flow") == story.tree(trained.runs / "flow")
    predictor = VideoPredictor.from_run(distilled.runs / "student", device="cpu")
    calls = story.count_calls(monkeypatch, CachedEvaluator, "velocity")
    predictor.generate_frames(torch.zeros(1, 2, 3, 32, 32), num_frames=3)
    assert calls == [3]
    place = distilled.copy(tmp_path / "place", "latents", "runs")
    place.run("evaluate", *STUDENT, sets=["evaluation.videos=2"]).ok()
    result = json.loads((place.runs / "student/evaluation.json").read_text())
    assert result["protocol"]["predictor"]["nfe"] == 1
    assert "step 8 of the default run" in place.run("runs").ok().out
    place.run("study", *STUDENT, "--videos", "2").ok()
    points = json.loads((place.runs / "student/quality.json").read_text())["points"]
    assert {point["nfe"] for point in points} == {1}
    place.run("report", *STUDENT).ok()


def test_interrupted_and_resumed_it_is_the_same_student(distilled, trained, tmp_path, story, monkeypatch) -> None:
    place = trained.copy(tmp_path / "place", "latents", "runs")
    with monkeypatch.context() as patch:
        story.send_at(patch, torch.optim.AdamW, "step", 3)
        place.run("distill", sets=LONG).refused(143, "step 3")
    place.run("sample", *STUDENT).refused(2, "distill --run student")
    place.run("distill").ok()
    assert "done" in place.run("distill").ok().out
    place.run("distill", "--resume", "3").ok()  # trains its last step again, as a student
    for name in ("model", "optimizer"):
        file = f"{name}.safetensors"
        whole, resumed = (each.checkpoint("student/flow") / file for each in (distilled, place))
        assert whole.read_bytes() == resumed.read_bytes()
    logs = [story.timeless(story.read_log(each, "student/flow")) for each in (distilled, place)]
    assert logs[0] == logs[1]
    assert logs[0][-1]["validation_loss"] < logs[0][0]["loss"] * 10


def test_what_a_student_refuses(distilled, tmp_path) -> None:
    place = distilled.copy(tmp_path / "place", "latents", "runs")
    for words, needed in (
        (("train-flow", *STUDENT, "--fine-tune"), "--restart"),
        (("train-flow", *STUDENT, "--minutes", "1"), "distill --run student"),
        (("distill", "--teacher", "student"), "--teacher"),
        (("distill", "--run", "other", "--set", "distillation.evaluations=2"), "distillation.evaluations"),
    ):
        outcome = place.run(*words).refused(2, needed)
        assert outcome.err.count("\n") == 1
    place.run("train-flow", "--restart", sets=["seed=1"]).ok()
    outcome = place.run("distill").refused(2, "--restart", "the default run")
    assert outcome.err.count("\n") == 1
    shutil.rmtree(place.runs / "flow")
    assert "done" in place.run("distill").ok().out
    VideoPredictor.from_run(place.runs / "student", device="cpu")
    # Two evaluations, of a teacher that is trained first.
    place.run("distill", "--restart", sets=["sampling.steps=4", "distillation.evaluations=2"]).ok()
    assert VideoPredictor.from_run(place.runs / "student", device="cpu").sampling.nfe == 2
