"""`study` on the tiny run: from the command line to its files, interrupted and resumed."""

import json

from pipelines.evaluation.study_points import StudyClips

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
    first = json.loads(path.read_text())["points"]
    assert len(first) == 4
    outcome = copied.run(*FEW, "--videos", "3").ok()
    assert "4 of them measured before" in outcome.out
    result = json.loads(path.read_text())
    assert result["points"][:4] == first
    assert len(calls) == 1 + len(result["points"]) == 1 + len({point["key"] for point in result["points"]}) > 10
    # The test split decides nothing, whatever `evaluate` measures.
    assert result["protocol"]["split"] == "val"
    assert result["protocol"]["clips"] == ["val_00000", "val_00002", "val_00003"]
    assert result["protocol"]["missing"].keys() == {"lpips", "interval"}
    # All points in the one precision that the protocol names.
    assert {json.loads(point["key"])["precision"] for point in result["points"]} == {result["protocol"]["precision"]}
    assert result["cheapest"] is None  # of three recordings
    assert {point["psnr_difference_interval"] for point in result["points"]} == {None}
    assert (copied.runs / "quality.png").stat().st_size > 10_000
    # Other clips, another reference, a file from before SSIM was the standard one.
    del result["protocol"]["ssim"]
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
