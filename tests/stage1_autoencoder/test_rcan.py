"""The refiner's network: official names, the formula written out, and its start as a copy."""

import copy
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from stage1_autoencoder.config import RefinerModelConfig, RefinerTrainingConfig
from stage1_autoencoder.rcan import RCAN

KEYS = Path(__file__).parents[1] / "fixtures" / "reference" / "rcan_s3_b3_c64_r8.keys.txt"
SMALL = {"groups": 2, "blocks": 2, "features": 8, "reduction": 4}


def network(**sizes) -> RCAN:
    torch.manual_seed(0)
    return RCAN(RefinerModelConfig(**(SMALL | sizes))).double().eval().requires_grad_(False)


def frames(seed: int = 1, side: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(2, 3, side, side, generator=generator).double() * 2 - 1 for _ in range(2))


def test_names_and_shapes_are_the_official_ones():
    names = [f"{name}  {list(tensor.shape)}" for name, tensor in RCAN(RefinerModelConfig()).state_dict().items()]
    assert names == KEYS.read_text().splitlines()
    with_tanh = RCAN(RefinerModelConfig(tanh=True)).state_dict()
    assert list(with_tanh)[-2:] == ["tail.0.weight", "tail.0.bias"]
    assert len(with_tanh) == len(names)


@pytest.mark.parametrize("tanh", [False, True])
def test_the_output_is_the_formula_written_out(tanh):
    refiner, (previous, decoded) = network(tanh=tanh), frames()
    state = refiner.state_dict()

    def convolve(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    head = x = convolve(torch.cat([previous, decoded], 1), "head")
    for group in range(2):
        before_group = x
        for block in range(2):
            name = f"body.{group}.body.{block}.body"
            y = convolve(F.relu(convolve(x, f"{name}.0")), f"{name}.2")
            squeezed = F.relu(convolve(F.adaptive_avg_pool2d(y, 1), f"{name}.3.conv_du.0", 0))
            x = x + y * torch.sigmoid(convolve(squeezed, f"{name}.3.conv_du.2", 0))
        x = before_group + convolve(x, f"body.{group}.body.2")
    expected = convolve(head + convolve(x, "body.2"), "tail.0" if tanh else "tail")
    output = refiner(previous, decoded)
    torch.testing.assert_close(output, expected.tanh() if tanh else expected, rtol=0, atol=1e-12)


def test_channels_last_and_bfloat16_are_close():
    exact, (previous, decoded) = network(), frames(side=32)
    expected = exact(previous, decoded)
    size = expected.abs().max()
    refiner, (previous, decoded) = exact.float(), (previous.float(), decoded.float())
    layout = copy.deepcopy(refiner).to(memory_format=torch.channels_last)
    last = layout(*(x.contiguous(memory_format=torch.channels_last) for x in (previous, decoded)))
    assert last.is_contiguous(memory_format=torch.channels_last)
    # 14 layers with sums of up to 72 terms.
    assert (last - expected).abs().max() < 14 * 72 * torch.finfo(torch.float32).eps * size
    with torch.autocast("cpu", torch.bfloat16):
        half = refiner(previous, decoded)
    assert half.dtype == torch.bfloat16
    assert 0 < (half - expected).abs().max() < 14 * 2.0**-8 * size


@pytest.mark.parametrize("tanh", [False, True])
def test_started_as_a_copy_it_returns_the_decoded_frame(tanh):
    refiner, (previous, decoded) = network(tanh=tanh), frames()
    refiner.start_as_copy()
    decoded = 1.3 * decoded  # decoders leave [-1, 1]
    torch.testing.assert_close(refiner(previous, decoded), decoded.tanh() if tanh else decoded, rtol=0, atol=1e-12)


def test_started_as_a_copy_every_layer_learns():
    refiner, (previous, decoded) = network(reduction=1), frames()
    refiner.requires_grad_(True).start_as_copy()
    before = {name: parameter.detach().clone() for name, parameter in refiner.named_parameters()}
    optimizer = torch.optim.SGD(refiner.parameters(), lr=0.1)
    for _ in range(3):  # weights that start at zero block the gradients of earlier layers at first
        optimizer.zero_grad()
        F.mse_loss(refiner(previous, decoded), 0.5 * decoded + 0.5 * previous).backward()
        optimizer.step()
    still = [name for name, parameter in refiner.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


@pytest.mark.parametrize("shapes", [((2, 3, 8, 8), (1, 3, 8, 8)), ((2, 6, 8, 8), (2, 6, 8, 8)), ((3, 8, 8), (3, 8, 8))])
def test_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match=r"\[b, 3, h, w\]"):
        network()(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("sizes", "message"), [({"features": 4, "reduction": 5}, r"reduction: 5 .* 4 "), ({"features": 2}, "features")]
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValidationError, match=message):
        RefinerModelConfig(**sizes)


def test_learning_rate_and_warm_up_follow_batch_and_steps():
    official = RefinerTrainingConfig(batch_size=64, steps=1000)
    assert official.peak_learning_rate == pytest.approx(3e-4 * 64 / 256)
    assert official.warmup == 200
    chosen = RefinerTrainingConfig(batch_size=64, learning_rate=1e-3, warmup_steps=0, steps=1000)
    assert (chosen.peak_learning_rate, chosen.warmup) == (1e-3, 0)
