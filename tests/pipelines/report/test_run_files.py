"""Logs as the report reads them."""

import math
from pathlib import Path

from pipelines.report.run_files import read_log


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
