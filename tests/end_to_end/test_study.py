"""`study` on the tiny run: from the command line to its files, interrupted and gone on with."""

import json

import pytest

from pipelines.evaluation import sampler_study as module
from pipelines.evaluation.study_points import StudyClips


@pytest.fixture(autouse=True)
def _few_ways(monkeypatch) -> None:
    monkeypatch.setattr(module, "EVALUATIONS", (1, 4))
    monkeypatch.setattr(module, "FEW_EVALUATIONS", (1,))
    monkeypatch.setattr(module, "WARM_STARTS", (0.5,))
    monkeypatch.setattr(module, "MANY_EVALUATIONS", 8)


def test_it_measures_says_and_plots(copied, monkeypatch) -> None:
    calls, point = [], StudyClips.point

    def counted(clips, key, options, reference):
        calls.append(key)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return point(clips, key, options, reference)

    monkeypatch.setattr(StudyClips, "point", counted)
    copied.run("study", "--videos", "3").refused(130, "interrupted")
    path = copied.runs / "quality.json"
    first = json.loads(path.read_text())["points"]
    assert len(first) == 4
    outcome = copied.run("study", "--videos", "3").ok()
    assert "4 of them measured before" in outcome.out
    assert "Fewest evaluations that lose nothing measurable" in outcome.out
    result = json.loads(path.read_text())
    assert result["points"][:4] == first
    assert len(result["points"]) == len({point["key"] for point in result["points"]}) > 10
    assert result["protocol"]["clips"] == ["test_00000", "test_00002", "test_00003"]
    assert (copied.runs / "quality.png").stat().st_size > 10_000
    measured_before = len(calls)
    assert "measured before" not in copied.run("study", "--videos", "2").ok().out  # other clips
    assert len(calls) > measured_before


def test_intervals_need_two_videos(copied) -> None:
    copied.run("study", "--videos", "1").refused(2, "clips of two or more", "--videos")
