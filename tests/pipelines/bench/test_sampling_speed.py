"""The benchmark of sampling, made small: what it runs is the same prediction twice."""

import pytest
import torch

from pipelines.bench import sampling_speed as bench_sampling
from pipelines.bench.sampling_speed import sampling_measurements
from pipelines.config import parse_config
from stage2_flow.vector_field import VectorField

CPU = torch.device("cpu")


@pytest.fixture
def config():
    values = {
        "dataset": {"name": "toy", "source": "shapes", "image_size": 32},
        "flow": {"model": {"width": 16, "depth": 1, "mid_depth": 0, "heads": 2}},
    }
    return parse_config(values, "a test")


def test_measures_each_batch_and_a_long_past(config, monkeypatch):
    monkeypatch.setattr(bench_sampling, "SECONDS", 0.0)
    monkeypatch.setattr(bench_sampling, "EVALUATIONS", {"cpu": {1: 2, 4: 3, 64: 1}})
    rows = list(sampling_measurements(config, CPU))
    assert [row.name for row in rows[::4]] == [
        "sampling: a frame of 1 at 2 evaluations", "sampling: a frame of 4 at 3 evaluations",
        "sampling: a frame of 64 at 1 evaluations", "sampling: a frame after 500 frames",
    ]  # fmt: skip
    for (milliseconds, same, evaluations, frames), nfe, batch in zip(
        (rows[0:4], rows[4:8], rows[8:12]), (2, 3, 1), (1, 4, 64), strict=True
    ):
        assert evaluations.value == pytest.approx(1000 * nfe / milliseconds.value)
        assert frames.value == pytest.approx(1000 * batch / milliseconds.value)
        assert milliseconds.at_least == 1
        assert same.value == milliseconds.value
    assert rows[-1].at_most == 1.1


def test_both_sides_evaluate_the_field_alike_often(config, monkeypatch):
    calls = {"trunk": 0}
    trunk = VectorField.trunk

    def counted(field, *arguments):
        calls["trunk"] += 1
        return trunk(field, *arguments)

    monkeypatch.setattr(VectorField, "trunk", counted)
    field = VectorField(config.flow.model, 4).eval()
    context = torch.randn(2, 3, 4, 4, 4)
    bench_sampling._step_by_step(field, context, 2, 5)
    assert calls["trunk"] == 10
    rollouts = bench_sampling.FieldRollouts(field, CPU)
    bench_sampling._predict(rollouts, context, 2, bench_sampling._options(5, CPU))
    assert calls["trunk"] == 20
