"""LPIPS: recorded outputs of the public code on a random trunk, and properties that hold for any weights."""

import hashlib
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stage1_autoencoder.lpips import HEADS_FILE, LPIPS, normalize_channels, vgg16

# Where torchvision's VGG16 has its convolutions, and the channels they take and give.
CONVOLUTIONS = {
    0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
    17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip
# Where a smaller network of the same kind is enough.
NARROW = ((3, 4), (4, 4), (4, 4, 5), (5, 5, 5), (5, 5, 6))
HEADS_SHA256 = "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78"


@pytest.fixture(scope="module")
def trunk() -> dict[str, Tensor]:
    """The random trunk of the recorded outputs."""
    generator = torch.Generator().manual_seed(1234)
    state = {}
    for number, (before, after) in CONVOLUTIONS.items():
        weight = torch.randn(after, before, 3, 3, generator=generator) * math.sqrt(2 / (9 * before))
        state[f"features.{number}.weight"] = weight
        state[f"features.{number}.bias"] = torch.randn(after, generator=generator) * 0.05
    return state


@pytest.fixture(scope="module")
def lpips(trunk) -> LPIPS:
    return LPIPS(trunk)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    arrays = np.load(HEADS_FILE.parents[2] / "tests" / "fixtures" / "lpips_vgg_reference.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def narrow() -> LPIPS:
    """A network with few channels in float64: fast, and exact enough for numerical derivatives."""
    generator = torch.Generator().manual_seed(3)
    features, _ = vgg16(NARROW)
    trunk = {
        f"features.{name}": torch.randn(tensor.shape, generator=generator) * 0.5
        for name, tensor in features.state_dict().items()
    }
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, stage[-1], 1, 1, generator=generator) for i, stage in enumerate(NARROW)
    }
    return LPIPS(trunk, heads, NARROW).double()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def test_distances_equal_the_public_ones(trunk, lpips, recorded):
    a, b = recorded["image_a"], recorded["image_b"]
    exact = LPIPS(trunk).double().per_layer(a.double(), b.double())
    assert exact.shape == (5, 4)
    # The recorded float32 values differ from float64 by 5e-7: ten times that. Ours in float32 add their own roundings:
    # 13 convolutions with sums of up to 4608 terms, whose errors grow like sqrt(13 x 4608) x 2^-24.
    ours = lpips.per_layer(a, b)
    for found, rtol in ((exact, 5e-6), (ours, 2e-5)):
        torch.testing.assert_close(found.float(), recorded["per_layer"], rtol=rtol, atol=1e-12)
        torch.testing.assert_close(found.sum(0).float(), recorded["distance"], rtol=rtol, atol=1e-12)
    torch.testing.assert_close(lpips(a, b), ours.sum(0))


def test_the_shipped_heads_are_the_public_ones():
    heads = load_file(HEADS_FILE)
    assert [(name, tuple(heads[name].shape), heads[name].dtype) for name in sorted(heads)] == [
        (f"lin{i}.model.1.weight", (1, channels, 1, 1), torch.float32)
        for i, channels in enumerate((64, 128, 256, 512, 512))
    ]
    values = b"".join(heads[name].numpy().astype("<f4").tobytes() for name in sorted(heads))
    assert hashlib.sha256(values).hexdigest() == HEADS_SHA256


def test_the_heads_have_their_license_beside_them():
    (license,) = (path.read_text() for path in HEADS_FILE.parent.glob("LICENSE*"))
    for part in (
        "Copyright (c) 2018, Richard Zhang, Phillip Isola, Alexei A. Efros",
        "Redistributions",
        HEADS_FILE.name,
    ):
        assert part in license


def test_a_distance_is_symmetric_positive_zero_for_equal_images_and_the_same_in_any_batch(narrow):
    a, b = noise(3, 3, 32, 16).double(), noise(3, 3, 32, 16, seed=1).double()
    together = narrow(a, b)
    assert torch.equal(together, narrow(b, a))
    assert (together > 0).all()
    assert narrow(a, a.clone()).tolist() == [0, 0, 0]
    alone = torch.cat([narrow(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=0)


def test_gradients_are_those_of_finite_differences(narrow):
    a = noise(1, 3, 16, 16, dtype=torch.float64).requires_grad_()
    b = noise(1, 3, 16, 16, seed=1, dtype=torch.float64).requires_grad_()
    assert narrow(a, b).dtype == torch.float64
    torch.autograd.gradcheck(narrow, (a, b), fast_mode=True)
    torch.autograd.gradcheck(lambda x: narrow.per_layer(x, b.detach()), (a,), fast_mode=True)


def test_weights_get_no_gradients_and_the_network_stays_in_evaluation_mode(narrow):
    nn.ModuleList([narrow]).train()
    assert not any(module.training for module in narrow.modules())
    images = noise(1, 3, 16, 16, dtype=torch.float64).requires_grad_()
    narrow(images, noise(1, 3, 16, 16, seed=1, dtype=torch.float64)).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in narrow.parameters())


def test_truth_is_differentiated_only_where_asked(narrow):
    modes = []
    narrow.features[0].register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    for enabled in (True, False):
        for wanted in (True, False):
            with torch.set_grad_enabled(enabled):
                narrow(noise(1, 3, 16, 16).double(), noise(1, 3, 16, 16).double().requires_grad_(wanted))
    assert modes == [True, True, True, False, False, False, False, False]


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_vectors_without_length_have_finite_gradients(value):
    features = torch.full((1, 4, 2, 2), value, requires_grad=True)
    (normalize_channels(features) - 0.5).square().sum().backward()
    assert features.grad.isfinite().all()


def test_bf16_autocast_is_close_and_ends_in_float32(lpips, recorded):
    a, b = recorded["image_a"], recorded["image_b"]
    with torch.autocast("cpu", torch.bfloat16):
        ours = lpips(a, b)
        half = lpips(a.bfloat16(), b.bfloat16())
    assert ours.dtype == half.dtype == torch.float32
    # Each of 13 layers rounds features by up to 2^-9, which adds up like sqrt(13) x 2^-9 = 0.7 %: three times that. The
    # distance of equal images stays 0.
    torch.testing.assert_close(ours, recorded["distance"], rtol=0.02, atol=0)
    assert not torch.equal(ours, recorded["distance"])  # the convolutions did run in bf16


def test_reductions_stay_in_float32_under_autocast():
    """In bf16 a mean of small differences over many positions would stop growing."""
    features = [torch.full((1, 2, 64, 64), 1.0), torch.full((1, 2, 64, 64), 1.0)]
    features[1][:, 0] += 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        units = [normalize_channels(values) for values in features]
    assert {unit.dtype for unit in units} == {torch.float32}
    assert (units[0] - units[1]).abs().max() > 1e-4


def test_the_weights_are_copies(trunk):
    before = trunk["features.0.bias"].clone()
    model = LPIPS(trunk | {"classifier.0.weight": torch.zeros(3)})
    with torch.no_grad():
        model.features[0].bias += 1
    assert torch.equal(trunk["features.0.bias"], before)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 3, 15, 64)] * 2, r"15x64 .*16"),
        ([(1, 3, 64, 8)] * 2, r"64x8 .*16"),
        ([(1, 3, 16, 16), (2, 3, 16, 16)], r"\[1, 3, 16, 16\].*\[2, 3, 16, 16\]"),
        ([(1, 1, 16, 16)] * 2, r"\[b, 3, h, w\]"),
        ([(3, 16, 16)] * 2, r"\[b, 3, h, w\]"),
    ],
)
def test_other_shapes_are_refused(narrow, shapes, message):
    with pytest.raises(ValueError, match=message):
        narrow(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(ValueError, match=r"uint8.*x / 127\.5 - 1"):
        narrow(*(torch.zeros(1, 3, 16, 16, dtype=torch.uint8) for _ in range(2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("features.28.bias"), r"VGG16.*missing: features\.28\.bias$"),
        (lambda s: s.update({"features.1.weight": torch.zeros(1)}), r"unexpected: features\.1\.weight"),
        (lambda s: s.update({"features.0.bias": torch.zeros(3)}), r"features\.0\.bias \[3\].*\[64\]"),
        (lambda s: s.clear(), r"missing: features\.0\.weight, .* and 23 more"),
    ],
)
def test_another_trunk_is_refused(trunk, change, message):
    state = dict(trunk)
    change(state)
    with pytest.raises(ValueError, match=message):
        LPIPS(state)
    heads = load_file(HEADS_FILE)
    heads["lin0.model.1.weight"] = torch.zeros(1, 192, 1, 1)  # AlexNet's
    with pytest.raises(ValueError, match=r"heads.*lin0\.model\.1\.weight \[1, 192"):
        LPIPS(trunk, heads)
