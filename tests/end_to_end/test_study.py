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
    assert "Fewest evaluations that lose nothing measurable" in outcome.out
    result = json.loads(path.read_text())
    assert result["points"][:4] == first
    assert len(calls) == 1 + len(result["points"]) == 1 + len({point["key"] for point in result["points"]}) > 10
    assert result["protocol"]["clips"] == ["test_00000", "test_00002", "test_00003"]
    assert (copied.runs / "quality.png").stat().st_size > 10_000
    # Other clips, another reference.
    assert "measured before" not in copied.run(*FEW, "--videos", "2").ok().out
    assert "measured before" not in copied.run("study", "--most-evaluations", "8", "--videos", "2").ok().out


def test_intervals_need_two_videos(copied) -> None:
    copied.run(*FEW, "--videos", "1").refused(2, "clips of two or more", "--videos")
