"""AdamW and Muon: which parameters each updates, and exact resuming from a checkpoint."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipelines.runtime.checkpoints import CheckpointFolder, pack_optimizers, unpack_optimizers
from pipelines.runtime.train_state import build_optimizers, set_learning_rate


def network(channels_last: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(144, 5),
    )
    return made.to(memory_format=torch.channels_last) if channels_last else made


def optimizers(model: nn.Module, name: str, **options):
    defaults = {"learning_rate": 1e-2, "muon_learning_rate": 2e-2, "betas": (0.9, 0.99), "weight_decay": 0.01}
    never = options.pop("never_matrices", ())
    return build_optimizers(model, SimpleNamespace(optimizer=name, **(defaults | options)), never)


def train(model: nn.Module, made, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        set_learning_rate(made, 1 / (1 + step))
        model(torch.randn(6, 3, 8, 8, generator=generator)).square().mean().backward()
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resuming_from_a_checkpoint_is_exact(tmp_path: Path, name, channels_last):
    whole = network(channels_last)
    train(whole, optimizers(whole, name), range(8))

    first = network(channels_last)
    made = optimizers(first, name)
    train(first, made, range(4))
    folder = CheckpointFolder(tmp_path)
    folder.save(4, {"model": first.state_dict(), "optimizer": pack_optimizers(made)}, {})

    torch.manual_seed(99)
    resumed = network(channels_last)
    resumed_optimizers = optimizers(resumed, name)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    resumed.load_state_dict(folder.latest().tensors("model"))
    unpack_optimizers(resumed_optimizers, folder.latest().tensors("optimizer"))
    train(resumed, resumed_optimizers, range(4, 8))
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key

    # Without the state of the optimizers the result differs.
    forgetful = network(channels_last)
    forgetful.load_state_dict(folder.latest().tensors("model"))
    train(forgetful, optimizers(forgetful, name), range(4, 8))
    assert any(not torch.equal(forgetful.state_dict()[key], tensor) for key, tensor in whole.state_dict().items())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_updated_exactly_once(name):
    model = network()
    made = optimizers(model, name, never_matrices=list(model[0].parameters()))
    before = copied(model)
    train(model, made, range(1))
    for key, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[key]), key
    count = sum(len(group["params"]) for optimizer in made for group in optimizer.param_groups)
    assert count == len(list(model.parameters()))


def test_muon_takes_matrices_and_adamw_the_rest():
    model = network()
    muon, adamw = optimizers(model, "muon", never_matrices=list(model[0].parameters()))
    assert [tuple(matrix.shape) for matrix in muon.param_groups[0]["params"]] == [(8, 72), (4, 8), (5, 144)]
    assert [tuple(p.shape) for p in adamw.param_groups[0]["params"]] == [(8, 3, 3, 3), (8,), (8,), (4,), (5,)]
    assert muon.param_groups[0]["lr"] == 2e-2
    assert adamw.param_groups[0]["lr"] == 1e-2
    assert adamw.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_updated_as_its_flattened_matrix(channels_last):
    torch.manual_seed(0)
    gradient = torch.randn(8, 6, 3, 3)
    convolution = nn.Conv2d(6, 8, 3)
    matrix = nn.Parameter(convolution.weight.detach().reshape(8, 54).clone())
    if channels_last:
        convolution = convolution.to(memory_format=torch.channels_last)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    made = optimizers(convolution, "muon")
    reference = torch.optim.Muon([matrix], lr=2e-2, weight_decay=0.01, momentum=0.95)
    for _ in range(3):
        convolution.weight.grad, matrix.grad = gradient.clone(), gradient.reshape(8, 54).clone()
        made[0].step()
        reference.step()
    # The order of columns changes nothing but rounding (Muon works in bfloat16).
    torch.testing.assert_close(convolution.weight.reshape(8, 54), matrix, atol=1e-3 if channels_last else 0, rtol=0)


def test_learning_rates_are_set_relative_to_their_full_value():
    made = optimizers(network(), "muon")
    set_learning_rate(made, 0.5)
    set_learning_rate(made, 0.25)
    assert [optimizer.param_groups[0]["lr"] for optimizer in made] == [0.25 * 2e-2, 0.25 * 1e-2]


def test_frozen_parameters_are_left_alone():
    model = network()
    model[0].requires_grad_(False)
    before = copied(model)
    train(model, optimizers(model, "muon"), range(2))
    assert torch.equal(model[0].weight, before["0.weight"])


def test_options_come_from_the_current_configuration():
    model = network()
    made = optimizers(model, "adamw")
    train(model, made, range(2))
    other = optimizers(model, "adamw", learning_rate=5e-3, weight_decay=0.5)
    unpack_optimizers(other, pack_optimizers(made))
    assert (other[0].param_groups[0]["base_lr"], other[0].param_groups[0]["weight_decay"]) == (5e-3, 0.5)
    assert other[0].state[model[0].weight]["step"] == 2
