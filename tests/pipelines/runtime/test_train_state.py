"""One update of a model: clipping, averaging, steps that are not finite, and what the training delivers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.train_state import TrainState
from stage2_flow.config import FlowTrainingConfig


def train_state(model: nn.Module | None = None, **options) -> TrainState:
    torch.manual_seed(0)
    model = model or nn.Linear(3, 2)
    settings = {"learning_rate": 0.1, "weight_decay": 0.0} | options
    return TrainState(model, FlowTrainingConfig(**settings), [p for p in model.parameters() if p.ndim < 2])


def loss_of(model: nn.Module, scale: float = 1.0) -> Tensor:
    return scale * model(torch.ones(4, 3)).square().sum()


def update(trained: TrainState, step: int, loss: Tensor, factor: float = 1.0) -> bool:
    """One update as the trainers do it; whether it was finite."""
    loss.backward()
    norm = trained.gradient_norm()
    finite = norm.isfinite() & loss.isfinite()
    trained.update(step, factor, norm, finite)
    return bool(finite)


@pytest.mark.parametrize("grad_clip", [None, 0.5])
def test_gradients_are_clipped_to_the_norm_asked_for(grad_clip, monkeypatch):
    trained = train_state(grad_clip=grad_clip)
    norms = []

    def measure() -> None:
        norms.append(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in trained.model.parameters()])))

    monkeypatch.setattr(trained.optimizers[0], "step", measure)
    update(trained, 0, loss_of(trained.model, scale=100.0))
    if grad_clip is None:
        assert norms[0] > 100
    else:
        assert norms[0] == pytest.approx(grad_clip, rel=1e-4)


def test_an_update_lowers_the_loss_and_forgets_its_gradients():
    trained = train_state()
    before = loss_of(trained.model).item()
    for step in range(5):
        update(trained, step, loss_of(trained.model), 0.5)
    assert loss_of(trained.model).item() < before
    assert trained.learning_rate == pytest.approx(0.05)
    assert all(parameter.grad is None for parameter in trained.model.parameters())


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_a_moving_one_with_a_warm_up(decay):
    """Against its recursion in float64."""
    plain, averaged = train_state(), train_state(ema_decay=decay)
    assert plain.best_model is plain.model
    expected = averaged.model.weight.detach().double()
    for step in range(20):
        update(averaged, step, loss_of(averaged.model))
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * averaged.model.weight.detach().double()
    torch.testing.assert_close(averaged.best_model.weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(averaged.best_model.weight, averaged.model.weight)


class WithNorm(nn.Module):
    """A model with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.out = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.convolution(x)).square().mean((2, 3)))


def images(step: int) -> Tensor:
    return 3 + 2 * torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(step))


def train_with_norm(trained: TrainState, steps: range, bad: int = -1) -> list[bool]:
    finite = []
    for step in steps:
        x = images(step)
        if step == bad:
            x[3] = torch.nan
        trained.model.train()
        loss = (trained.model(x) - 1).square().mean()
        trained.observe(lambda average, x=x: average(x))
        finite.append(update(trained, step, loss))
    return finite


def snapshot(trained: TrainState) -> dict[str, Tensor]:
    files = trained.files()
    return {f"{file}/{name}": tensor.clone() for file, tensors in files.items() for name, tensor in tensors.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer):
    trained = train_state(WithNorm(), optimizer=optimizer, ema_decay=0.9, grad_clip=1.0)
    train_with_norm(trained, range(3))
    before = snapshot(trained)
    assert train_with_norm(trained, range(3, 4), bad=3) == [False]
    after = snapshot(trained)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert train_with_norm(trained, range(4, 5)) == [True]
    assert not torch.equal(snapshot(trained)["ema/norm.running_mean"], before["ema/norm.running_mean"])


def test_an_infinite_loss_with_finite_gradients_changes_nothing():
    trained = train_state(ema_decay=0.9)
    before = snapshot(trained)
    assert not update(trained, 0, loss_of(trained.model) + torch.tensor(torch.inf))
    assert all(torch.equal(snapshot(trained)[name], tensor) for name, tensor in before.items())


def test_the_statistics_of_the_average_are_of_its_own_activations():
    """Exactly those of a model that has its weights at each step: the raw model's statistics are others."""
    trained = train_state(WithNorm(), ema_decay=0.9)
    reference = nn.BatchNorm2d(4)
    for step in range(30):
        own = copy.deepcopy(trained.best_model.convolution)
        train_with_norm(trained, range(step, step + 1))
        with torch.no_grad():
            reference(own(images(step)))
    norm = trained.best_model.norm
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    torch.testing.assert_close(norm.running_var, reference.running_var)
    assert not torch.allclose(norm.running_mean, trained.model.norm.running_mean, rtol=1e-3)
    assert not trained.best_model.training


def test_resuming_is_exact_with_average_and_statistics(tmp_path):
    whole = train_state(WithNorm(), ema_decay=0.9)
    train_with_norm(whole, range(3))
    folder = CheckpointFolder(tmp_path)
    folder.save(3, whole.files(), {})
    resumed = train_state(WithNorm(), ema_decay=0.9)
    resumed.load(folder.latest(), torch.device("cpu"))
    for trained in (whole, resumed):
        train_with_norm(trained, range(3, 6), bad=3)
    for name, tensor in snapshot(whole).items():
        assert torch.equal(snapshot(resumed)[name], tensor), name
