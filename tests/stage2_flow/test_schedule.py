"""The learning rate at the places that its formula names."""

import pytest

from stage2_flow.schedule import learning_rate

PAPER = {"base": 1e-4, "final": 1e-7, "warmup": 5000, "total": 300_000}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 1e-4 / 5000),
        (4999, 1e-4 * 4999 / 5000),
        (5000, 1e-4),
        (152_500, 1e-7 + (1e-4 - 1e-7) * 0.5**0.5),
        (299_999, 1e-7 + (1e-4 - 1e-7) * (1 / 295_000) ** 0.5),
        (300_000, 1e-7),
        (400_000, 1e-7),
    ],
)
def test_paper_schedule(step, expected):
    assert learning_rate(step, **PAPER) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(0, base=1e-3, final=0.0, warmup=0, total=10) == 1e-3


@pytest.mark.parametrize("total", [3, 5])
def test_a_training_shorter_than_its_warmup_stays_defined(total):
    rates = [learning_rate(step, base=1.0, final=0.1, warmup=5, total=total) for step in range(8)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.1, 0.1, 0.1])
