"""ST-LPIPS: recorded outputs of the public code, on its own weights and on random ones, and gradients."""

import math
import sys

import pytest
import torch
from torch import Tensor

from pipelines.evaluation.measures.networks import find_st_lpips, load_st_lpips
from stage1_autoencoder.st_lpips import STLPIPS

CONVOLUTIONS = {"slice1.0": (64, 3, 11), "slice2.5": (192, 64, 5), "slice3.9": (384, 192, 3),
                "slice4.11": (256, 384, 3), "slice5.13": (256, 256, 3)}  # fmt: skip
# What stlpips_pytorch 0.0.2 gives in float64 (`net="alex", variant="shift_tolerant"`, retPerLayer) for `pair(32, 40)`.
PUBLIC = {
    "random": [[0.0237718425, 0.0218625731], [0.00191177146, 0.00210237524], [0.000262944614, 0.000410612205],
               [0.000515965115, 0.000737823626], [0.000608193098, 0.000716952266]],
    "its own": [[0.0107335577, 0.0102093218], [0.000422089949, 0.000315267072], [0.000607507411, 0.000929325715],
                [0.00230457625, 0.00248791656], [0.0487393837, 0.0313164084]],
}  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The random weights of the recorded outputs."""
    generator, weights = torch.Generator().manual_seed(7), {}
    for name, (after, before, side) in CONVOLUTIONS.items():
        deviation = math.sqrt(2 / (before * side * side))
        weights[f"net.{name}.weight"] = torch.randn(after, before, side, side, generator=generator) * deviation
        weights[f"net.{name}.bias"] = torch.randn(after, generator=generator) * 0.05
    for i, channels in enumerate((64, 192, 384, 256, 256)):
        weights[f"lin{i}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator) / channels * 10
    return weights


def pair(*sides: int) -> tuple[Tensor, Tensor]:
    a, b = (torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    return a, (a + b) / 2


@pytest.mark.parametrize("which", PUBLIC)
def test_distances_equal_the_public_ones(weights, which):
    path = find_st_lpips()
    assert path is not None
    model = STLPIPS(weights) if which == "random" else load_st_lpips(path, torch.device("cpu"))
    assert "stlpips_pytorch" not in sys.modules  # its code needs torchvision
    ours = model.per_layer(*pair(32, 40))
    # In float64, up to the 9 recorded digits; float32 rounds five convolutions with sums of up to 3456 terms, whose
    # errors grow like sqrt(5 x 3456) x 2^-24.
    torch.testing.assert_close(ours, torch.tensor(PUBLIC[which]), rtol=1e-5, atol=0)
    exact = model.double().per_layer(*(images.double() for images in pair(32, 40)))
    torch.testing.assert_close(exact, torch.tensor(PUBLIC[which]).double(), rtol=1e-7, atol=0)


def test_gradients_are_those_of_finite_differences(weights):
    model = STLPIPS(weights).double()
    a, b = (images[:1].double() for images in pair(21, 21))
    torch.autograd.gradcheck(lambda x: model(x, b), (a.requires_grad_(),), fast_mode=True)
    assert model(b, b).tolist() == [0]


def test_small_images_and_other_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"20x21 .*21"):
        STLPIPS(weights)(*pair(20, 21))
    vgg = {name.replace("slice5.13", "slice5.32"): tensor for name, tensor in weights.items()}
    with pytest.raises(ValueError, match=r"missing: features\.13\.weight.*unexpected: features\.32\.weight"):
        STLPIPS(vgg)
    with pytest.raises(ValueError, match=r"heads.*lin4\.model\.1\.weight"):
        STLPIPS({name: tensor for name, tensor in weights.items() if not name.startswith("lin4")})
