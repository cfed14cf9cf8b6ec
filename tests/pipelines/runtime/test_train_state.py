"""One update of a model: clipping, averaging, and what the training delivers."""

import pytest
import torch
from torch import nn

from pipelines.runtime.train_state import TrainState
from stage2_flow.config import FlowTrainingConfig


def train_state(**options) -> TrainState:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return TrainState(
        model, FlowTrainingConfig(learning_rate=0.1, weight_decay=0.0, **options), list(model.parameters())
    )


def loss_of(model: nn.Module, scale: float = 1.0) -> torch.Tensor:
    return scale * model(torch.ones(4, 3)).square().sum()


@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_gradients_are_clipped_to_the_norm_asked_for(grad_clip, monkeypatch):
    trained = train_state(grad_clip=grad_clip)
    norms = []

    def measure() -> None:
        norms.append(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in trained.model.parameters()])))

    monkeypatch.setattr(trained.optimizers[0], "step", measure)
    trained.update(loss_of(trained.model, scale=100.0), 1.0)
    if grad_clip is None:
        assert norms[0] > 100
    else:
        assert norms[0] == pytest.approx(grad_clip, rel=1e-4)


def test_an_update_lowers_the_loss_and_forgets_its_gradients():
    trained = train_state()
    before = loss_of(trained.model).item()
    for _ in range(5):
        trained.update(loss_of(trained.model), 0.5)
    assert loss_of(trained.model).item() < before
    assert trained.learning_rate == pytest.approx(0.05)
    assert all(parameter.grad is None for parameter in trained.model.parameters())


def test_the_averaged_model_is_what_a_training_delivers():
    plain, averaged = train_state(), train_state(ema_decay=0.9)
    assert plain.best_model is plain.model
    copies = []
    for _ in range(3):
        averaged.update(loss_of(averaged.model), 1.0)
        copies.append(averaged.model.weight.detach().clone())
    # The first update starts the average; from then on it moves a tenth of the way at each.
    expected = copies[0]
    for copy in copies[1:]:
        expected = 0.9 * expected + 0.1 * copy
    torch.testing.assert_close(averaged.best_model.weight, expected)
    assert not torch.allclose(averaged.best_model.weight, averaged.model.weight)
