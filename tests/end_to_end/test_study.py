"""`study` on the tiny run, interrupted and resumed; and the sampler that is chosen after a training."""

import json

from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.evaluation.study import sampler_study
from pipelines.evaluation.study.study_points import StudyClips
from pipelines.predictor import VideoPredictor
from pipelines.runtime.files import SEAL
from pipelines.runtime.status import Status
from pipelines.stages import STAGES

FEW = ("study", "--most-evaluations", "4")


def test_an_interrupted_study_resumes_and_is_plotted(copied, monkeypatch) -> None:
    calls, measure = [], StudyClips.measure

    def interrupted(clips, options, reference):
        calls.append(options)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(clips, options, reference)

    monkeypatch.setattr(StudyClips, "measure", interrupted)
    copied.run(*FEW, "--videos", "3").refused(130, "study")
    path = copied.runs / "quality.json"
    interrupted = json.loads(path.read_text())
    first = interrupted["points"]
    assert len(first) == 4
    assert interrupted["chosen"] is None
    outcome = copied.run(*FEW, "--videos", "3").ok()
    assert "4 of them measured before" in outcome.out
    result = json.loads(path.read_text())
    assert [point | {"score": None} for point in result["points"][:4]] == first
    assert len(calls) == 1 + len(result["points"]) == 1 + len({point["key"] for point in result["points"]}) > 10
    # The test split decides nothing, whatever `evaluate` measures.
    assert result["protocol"]["split"] == "val"
    assert result["protocol"]["clips"] == ["val_00000", "val_00002", "val_00003"]
    assert result["protocol"]["missing"].keys() == {"lpips", "interval"}
    assert all(0 <= point["whole"] <= 1 for point in result["points"])
    # All points in the one precision that the protocol names.
    assert {json.loads(point["key"])["precision"] for point in result["points"]} == {result["protocol"]["precision"]}
    scores = [point["score"] for point in result["points"] if point["seed"] == 0]
    assert result["points"][result["chosen"]]["score"] >= max(scores) - 0.1
    assert {point["psnr_difference_interval"] for point in result["points"]} == {None}
    assert (copied.runs / "quality.png").stat().st_size > 10_000
    # Other clips, another reference, a file from before SSIM was the standard one.
    del result["protocol"]["ssim"], result[SEAL]
    path.write_text(json.dumps(result))
    assert "measured before" not in copied.run(*FEW, "--videos", "3").ok().out
    assert "measured before" not in copied.run(*FEW, "--videos", "2").ok().out
    assert "measured before" not in copied.run("study", "--most-evaluations", "8", "--videos", "2").ok().out


def test_a_study_needs_validation_clips_before_anything_is_trained(place, story) -> None:
    for number, folder in enumerate(("train", "train", "train", "test")):
        story.write_video(place.folder / "videos" / folder / f"{number}.mp4", story.moving_square(12, number))
    videos = ("dataset.source=videos", f"dataset.root={place.folder / 'videos'}")
    place.run(*FEW, sets=[*videos, "dataset.splits={val: 0}"]).refused(2, "val", "dataset.splits.val")
    place.run(*FEW, "--videos", "1", sets=["dataset.splits={val: 1}"]).refused(2, "--videos")
    assert not place.runs.exists()


def test_a_training_chooses_its_sampler(copied, monkeypatch) -> None:
    """It is used until somebody sets another one or the weights change; nothing but the choice is lost by a failure."""
    calls, measure, failure = [], StudyClips.measure, []

    def counted(clips, options, reference):
        calls.append(options)
        if failure:
            raise failure.pop()
        return measure(clips, options, reference)

    monkeypatch.setattr(StudyClips, "measure", counted)
    path, samples = copied.runs / "quality.json", copied.runs / "samples" / "samples.json"

    def used() -> list[str | int | None]:
        sampling = json.loads(samples.read_text())["sampling"]
        return [sampling["solver"], sampling["nfe"]]

    copied.run("train-flow").ok()
    assert status_of_sampler(copied).is_done  # as it is set
    assert not path.exists()

    open_ = copied.with_sets("sampling.solver=null", "sampling.steps=null")
    failure.append(UserError("for a test"))
    assert "for a test" in open_.run("train-flow").ok().err
    without = open_.run("train-flow", sets=["dataset.source=videos", "dataset.splits={}"]).ok()
    assert str(copied.data) in without.out  # no such folder
    failure.append(KeyboardInterrupt())
    open_.run("train-flow", "--restart").refused(130, "resumes")
    assert not path.exists()
    assert status_of_sampler(open_).state == "missing"

    assert "quality.json" in open_.run("train-flow").ok().out
    result = json.loads(path.read_text())
    assert [(point["solver"], point["nfe"]) for point in result["points"]] == [
        ("midpoint", 8), ("euler", 2), ("euler", 4), ("midpoint", 4), ("euler", 8), ("euler", 16), ("midpoint", 16)
    ]  # fmt: skip
    assert result["protocol"]["split"] == "val"
    assert result["chosen"] is not None
    path.write_text(json.dumps(result | {"chosen": 2}))
    assert not VideoPredictor.from_run(copied.runs, "cpu").sampler_is_chosen  # changed after it was written
    del result[SEAL]
    path.write_text(json.dumps(result | {"chosen": 2}))
    calls.clear()
    assert "euler, 4 evaluations per frame, warm start 0 (chosen" in open_.run("sample", "--videos", "2").ok().out
    assert used() == ["euler", 4]
    assert status_of_sampler(open_).is_done
    assert "euler, 4 evaluations per frame" in status_of_sampler(open_).detail
    assert VideoPredictor.from_run(copied.runs, "cpu").sampling.nfe == 4
    assert "chosen" not in open_.run("sample", "--videos", "2", sets=["sampling.nfe=6"]).ok().out
    assert used() == [None, 6]
    assert calls == []

    failure.append(KeyboardInterrupt())
    open_.run("train-flow", "--restart", sets=["flow.training.learning_rate=0.002"]).refused(130)
    assert not VideoPredictor.from_run(copied.runs, "cpu").sampler_is_chosen
    for name in ("SECONDS", "SHARE_OF_TRAINING"):
        monkeypatch.setattr(sampler_study, name, 0)
    assert "midpoint, 16 evaluations" in open_.run("sample", "--videos", "2").ok().out  # left out: no time
    assert json.loads(path.read_text())["chosen"] == 0
    assert used() == ["midpoint", 8]


def status_of_sampler(place) -> Status:
    """As a dry run shows it."""
    return STAGES["sampler"].status(load_config(place.folder / "tiny.yaml", place.sets))
