"""Scores of samples against closed forms, `scoringrules`, and ensembles that are calibrated or not."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import scoringrules
import torch
from torch import Tensor

from pipelines.evaluation.measures.intervals import draw_counts
from pipelines.evaluation.measures.measure import ClipBatch, Records
from pipelines.evaluation.measures.sample_scores import (
    CalibrationMeasure,
    count_ranks,
    crps,
    energy_score,
    rank_histogram,
    sample_scores,
)
from pipelines.runtime.results import Calibration

LEVEL = 1 / 127.5  # of frames in [-1, 1]


def batch(samples: int, clips: int = 12, spread: float = 1.0, deviation: float = 20.0, seed: int = 0) -> ClipBatch:
    """Clips whose truth is drawn from a normal distribution around a mean; samples have `spread` times its deviation.

    Args:
        deviation: of the truth, in levels.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(clips, count, *shape, generator=generator)

    frame, latent = (4, 3, 16, 16), (6, 2, 4, 4)
    means = [0.4 * torch.rand(clips, 1, *shape, generator=generator) - 0.2 for shape in (frame, latent)]
    truth, latent_truth = (m + draw(1, deviation * LEVEL, *m.shape[2:]) for m in means)
    predicted, latents = (m + draw(samples, spread * deviation * LEVEL, *m.shape[2:]) for m in means)
    copied, latent_copy = (m.expand_as(t) for m, t in zip(means, (truth, latent_truth), strict=True))
    return ClipBatch(
        clips=[], given=truth[:, 0, :2], truth=truth[:, 0], autoencoded=truth[:, 0],
        futures={"prediction": predicted, "copy_last": copied},
        latents={"truth": latent_truth, "prediction": latents, "copy_last": latent_copy},
    )  # fmt: skip


def calibration(of: ClipBatch, counts: Tensor | None = None) -> Calibration:
    measure = CalibrationMeasure()
    return Calibration.model_validate(measure.results(measure.measure(of), counts))


@pytest.mark.parametrize("samples", [2, 3, 20])
@pytest.mark.parametrize("ours", [crps, energy_score])
def test_scores_are_those_of_all_pairs_of_samples(samples: int, ours: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(samples)
    x, y = (255 * torch.rand(shape, generator=generator) for shape in ((samples, 300), (300,)))
    forecast, truth = x.double().numpy(), y.double().numpy()
    if ours is crps:
        expected = np.mean(scoringrules.crps_ensemble(truth, forecast.T, estimator="fair", backend="numpy"))
    else:
        expected = scoringrules.es_ensemble(truth, forecast, estimator="fair", backend="numpy") / np.sqrt(300)
    assert ours(x, y).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("score", [crps, energy_score])
def test_nothing_is_made_on_another_device(score: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert score(torch.empty(5, 30, device="meta"), torch.empty(30, device="meta")).device.type == "meta"


@pytest.mark.parametrize("samples", [2, 10])
def test_scores_of_a_normal_ensemble_have_a_closed_form_for_any_number_of_samples(samples: int) -> None:
    deviation, values = 20.0, 200_000
    generator = torch.Generator().manual_seed(1)
    x, y = (deviation * torch.randn(shape, generator=generator) for shape in ((samples, values), (values,)))
    expected = np.mean(scoringrules.crps_normal(y.double().numpy(), 0.0, deviation))
    # The scatter of E|X - X'| / 2 of `values` values is below 0.9 deviations each.
    assert crps(x, y).item() == pytest.approx(expected, abs=5 * 0.9 * deviation / values**0.5)
    # With this many values, all distances between vectors are about sqrt(2) deviations (root mean square).
    assert energy_score(x, y).item() == pytest.approx(deviation / 2**0.5, rel=0.01)
    short = torch.stack([energy_score(x[:, i : i + 4], y[i : i + 4]) for i in range(0, 8000, 4)])
    # In 4 dimensions E|X - X'| is sqrt(2) times the mean of a chi distribution, 3 sqrt(2 pi) / 4; half of it is left.
    expected = deviation * 2**0.5 * 3 * (2 * np.pi) ** 0.5 / 4 / 2 / 4**0.5
    assert short.mean().item() == pytest.approx(expected, abs=5 * short.std().item() / len(short) ** 0.5)


def test_one_sample_has_its_error_and_no_calibration() -> None:
    of = batch(1)
    records = {measure.name: measure.measure(of) for measure in sample_scores()}
    error = 127.5 * (of.futures["prediction"][:, 0] - of.truth).clamp(-2, 2)
    latent_error = (of.latents["prediction"] - of.latents["truth"])[:, 0, 2:]
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(records["crps"]["prediction"], error.abs().mean((2, 3, 4)), **close)
    torch.testing.assert_close(records["energy_score"]["prediction"], error.square().mean((2, 3, 4)).sqrt(), **close)
    expected = latent_error.square().mean((2, 3, 4)).sqrt()
    torch.testing.assert_close(records["latent_energy_score"]["prediction"], expected, **close)
    assert all(
        values.keys() == {"prediction", "copy_last"} for name, values in records.items() if name != "calibration"
    )
    with pytest.raises(ValueError, match=r"evaluation\.samples"):
        calibration(of)


def test_ranks_count_the_samples_below_and_leave_out_what_all_have_right() -> None:
    truth = torch.full((6,), 100.0)
    samples = torch.tensor([[90, 110, 100.4, 100, 90, 120], [95, 120, 99.7, 130, 100, 130]])
    # Above both; below both; equal; two that share a rank with an equal sample; below both.
    expected = [0 + 1 + 0 + 0.5 + 0 + 1, 0 + 0 + 0 + 0.5 + 0.5 + 0, 1 + 0 + 0 + 0 + 0.5 + 0]
    assert rank_histogram(count_ranks(samples, truth)[None]).tolist() == [expected]


# With a deviation of a third of a level most values are equal after rounding: ranks of ties are spread evenly.
@pytest.mark.parametrize("deviation", [20.0, 0.3])
@pytest.mark.parametrize("samples", [2, 9])
def test_a_perfect_ensemble_is_calibrated(samples: int, deviation: float) -> None:
    found = calibration(batch(samples, deviation=deviation), draw_counts(range(12), 200, 0))
    ratio, flat = found.spread_skill, 1 / (samples + 1)
    assert found.samples == samples
    # Both deviations are of 12 x 3072 values.
    assert ratio.prediction == pytest.approx(1, abs=0.03)
    assert ratio.per_frame["prediction"] == pytest.approx([1] * 4, abs=0.05)
    assert sum(found.ranks) == pytest.approx(1)
    assert found.ranks == pytest.approx([flat] * (samples + 1), abs=5 * (flat / (12 * 3072)) ** 0.5)
    for share, (low, high) in zip(found.ranks, found.ranks_interval, strict=True):
        assert low < share < high


@pytest.mark.parametrize(("spread", "sign"), [(0.5, 1), (2.0, -1)], ids=["too alike", "too different"])
def test_an_ensemble_that_is_not_calibrated_is_seen(spread: float, sign: int) -> None:
    found = calibration(batch(9, spread=spread))
    # var(mean - truth) = (1 + spread^2 / K) of the truth's variance.
    expected = spread * ((10 / 9) / (1 + spread**2 / 9)) ** 0.5
    assert found.spread_skill.prediction == pytest.approx(expected, rel=0.03)
    outer, inner = (found.ranks[0] + found.ranks[-1]) / 2, found.ranks[4]
    assert sign * (outer - 0.1) > 0.03
    assert sign * (0.1 - inner) > 0.01
    assert found.ranks_interval is None


def test_intervals_are_of_recordings() -> None:
    counts = draw_counts(range(12), 100, 0)
    recorded = CalibrationMeasure().measure(batch(3))
    often = {name: values.repeat_interleave(5, dim=0) for name, values in recorded.items()}
    one, other = (
        Calibration.model_validate(CalibrationMeasure().results(records, with_counts))
        for records, with_counts in ((recorded, counts), (often, counts.repeat_interleave(5, dim=1)))
    )
    np.testing.assert_allclose(other.ranks_interval, one.ranks_interval)
    np.testing.assert_allclose(other.spread_skill.interval["prediction"], one.spread_skill.interval["prediction"])


def test_no_record_depends_on_the_batch() -> None:
    whole = batch(3, clips=4)

    def part(number: int) -> ClipBatch:
        of = {name: {key: x[number : number + 1] for key, x in getattr(whole, name).items()}
              for name in ("futures", "latents")}  # fmt: skip
        rest = {name: getattr(whole, name)[number : number + 1] for name in ("given", "truth", "autoencoded")}
        return ClipBatch(clips=[], **rest, **of)

    for measure in sample_scores():
        together, alone = measure.measure(whole), [measure.measure(part(number)) for number in range(4)]
        for name, values in together.items():
            assert len(values) == 4
            assert torch.equal(values, torch.cat([records[name] for records in alone])), (measure.name, name)


def test_pixels_are_clamped() -> None:
    of = batch(2)
    wild = SimpleNamespace(futures={"prediction": of.futures["prediction"] + 10}, truth=of.truth + 10)
    records: Records = sample_scores()[0].measure(wild)
    assert records["prediction"].abs().max() == 0
