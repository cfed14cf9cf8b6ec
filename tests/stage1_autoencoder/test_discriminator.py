"""The discriminator: its network, losses and weights in closed form, and the warnings about it."""

import json

import pytest
import torch
from torch import nn

from stage1_autoencoder.config import AdversarialConfig
from stage1_autoencoder.discriminator import (
    DiscriminatorWatch,
    PatchDiscriminator,
    adaptive_weight,
    adversarial_weight,
    generator_loss,
    hinge_loss,
)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make(filters: int = 4, layers: int = 3) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(filters, layers)


def test_the_standard_network_is_tamings():
    modules = list(make(64).main)
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    described = [(m.in_channels, m.out_channels, m.stride[0], m.bias is not None) for m in convolutions]
    assert described == [(3, 64, 2, True), (64, 128, 2, False), (128, 256, 2, False), (256, 512, 1, False),
                         (512, 1, 1, True)]  # fmt: skip
    assert {(m.kernel_size, m.padding) for m in convolutions} == {((4, 4), (1, 1))}
    assert [type(m).__name__ for m in modules if not isinstance(m, nn.Conv2d)] == (
        ["LeakyReLU"] + ["BatchNorm2d", "LeakyReLU"] * 3
    )
    assert {m.negative_slope for m in modules if isinstance(m, nn.LeakyReLU)} == {0.2}
    assert sum(parameter.numel() for parameter in make(64).parameters()) == 2_765_633
    names = [f"main.{i}.{kind}" for i in (0, 2, 3, 5, 6, 8, 9, 11) for kind in ("weight", "bias")]
    assert {name for name, _ in make().named_parameters()} == set(names) - {f"main.{i}.bias" for i in (2, 5, 8)}
    # Channels are multiplied by 8 at most.
    widths = [m.out_channels for m in make(2, layers=5).main if isinstance(m, nn.Conv2d)]
    assert widths == [2, 4, 8, 16, 16, 16, 1]


def test_weights_start_small():
    for name, parameter in make(32).state_dict().items():
        if "running" in name or "tracked" in name:
            continue
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.ndim == 4:
            assert abs(parameter.mean()) < 0.002
            assert parameter.std() == pytest.approx(0.02, rel=0.1)
        else:
            assert parameter.mean() == pytest.approx(1, abs=0.01)
            assert parameter.std() == pytest.approx(0.02, rel=0.35)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_map_of_patches_and_the_smallest_image_that_has_one(layers):
    network = make(layers=layers)
    side = 3 * 2**layers
    assert network.smallest_side == side
    assert network(images(2, 3, side, side + 2**layers)).shape == (2, 1, 1, 2)
    for shape in ((2, 3, side - 1, 64), (2, 3, 64, side - 1)):
        with pytest.raises(ValueError, match=rf"{layers} layers .*at least {side}; .*adversarial\.layers"):
            network(images(*shape))
    for shape in ((2, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(ValueError, match=r"\[b, 3, h, w\]"):
            network(images(*shape))


def test_a_logit_sees_seventy_pixels():
    network = make().eval()
    image = images(1, 3, 128, 128).requires_grad_()
    network(image)[0, 0, 7, 7].backward()
    rows, columns = (image.grad.abs().sum((0, 1, axis)).nonzero().flatten() for axis in (3, 2))
    assert (len(rows), len(columns)) == (70, 70)
    assert rows[-1] - rows[0] == 69


def test_losses_in_closed_form_and_fp32():
    real, fake = torch.tensor([3.0, 1.0, 0.5, -1.0]), torch.tensor([-3.0, -1.0, -0.5, 3.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0.5 + 2) / 4 + (0.5 + 4) / 4))
    assert hinge_loss(torch.full((2,), 1.0), torch.full((3,), -1.0)) == 0
    assert hinge_loss(torch.zeros(2), torch.zeros(5)) == 1
    logits = torch.tensor([1.0, 2.0, -6.0], requires_grad=True)
    loss = generator_loss(logits)
    loss.backward()
    assert loss.item() == 1.0
    assert torch.equal(logits.grad, torch.full((3,), -1 / 3))
    # 4096 ones and one more: bfloat16 would not see it. Sums of integers below 2^24 are exact in float32.
    logits = torch.ones(4097, dtype=torch.bfloat16)
    logits[0] = -512
    with torch.autocast("cpu", torch.bfloat16):
        generator, hinge = generator_loss(logits), hinge_loss(logits, logits)
    assert (generator.dtype, hinge.dtype) == (torch.float32, torch.float32)
    assert generator.item() == pytest.approx((512 - 4096) / 4097, rel=1e-6)
    assert hinge.item() == pytest.approx(0.5 * (513 + 2 * 4096) / 4097, rel=1e-6)


def test_adaptive_weight_is_the_ratio_of_norms():
    ours, theirs = torch.zeros(3, 4, 2, 2), torch.zeros(3, 4, 2, 2)
    ours[0, 0, 0] = torch.tensor([3.0, -4.0])
    theirs[2, 1, 1, 1] = -0.5
    ratio = adaptive_weight(ours.requires_grad_(), theirs)
    assert ratio.item() == pytest.approx(5 / (0.5 + 1e-4))
    assert not ratio.requires_grad
    assert adaptive_weight(theirs, ours).item() == pytest.approx(0.5 / (5 + 1e-4))
    assert adaptive_weight(ours, 0 * theirs).item() == 1e4
    assert adaptive_weight(0 * ours, 0 * theirs).item() == 0
    assert adaptive_weight(ours * 1e-4, 0 * theirs).item() == pytest.approx(5, rel=1e-5)
    # In half precision squares of 1e-4 are 0, and 70000 is infinite.
    small = torch.full((10000,), 1e-4, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        ratio = adaptive_weight(small, torch.full((4,), 6e4, dtype=torch.float16))
    assert ratio.dtype == torch.float32
    assert ratio.item() == pytest.approx(0.01 / 1.2e5, rel=1e-2)


@pytest.mark.parametrize(
    ("start", "warm_in", "expected"),
    [
        (3, 0, {0: 0.0, 2: 0.0, 3: 0.8, 4: 0.8, 10**9: 0.8}),
        (3, 4, {2: 0.0, 3: 0.0, 4: 0.2, 5: 0.4, 6: 0.6, 7: 0.8, 8: 0.8, 10**9: 0.8}),
        (0, 0, {0: 0.8, 1: 0.8}),
    ],
)
def test_adversarial_weight_waits_and_rises(start, warm_in, expected):
    config = AdversarialConfig(weight=0.8, start=start, warm_in=warm_in)
    assert {step: adversarial_weight(step, config) for step in expected} == pytest.approx(expected)
    assert adversarial_weight(100, AdversarialConfig(weight=0.0, start=start, warm_in=warm_in)) == 0


def warned(metrics: list[tuple[float, float, float, float]], watch: DiscriminatorWatch | None = None) -> list[int]:
    """Which updates (reconstruction, real, fake, weight) gave a warning."""
    watch = watch or DiscriminatorWatch()
    return [number for number, values in enumerate(metrics) if watch.update(number, *values) is not None]


BEFORE = [(0.2, 0.0, 0.0, 0.0)] * 30
FALLING = [(1.0 - 0.02 * i, 0.0, 0.0, 0.0) for i in range(40)]  # down to 0.22
FINE, RISEN = (0.24, 0.3, -0.3, 0.8), (0.26, 0.3, -0.3, 0.8)
WON = (0.2, 1.1, -1.1, 0.8)


@pytest.mark.parametrize(
    ("metrics", "warnings"),
    [
        (BEFORE + [FINE] * 30, []),
        (BEFORE + [RISEN] * 30, [34]),
        (BEFORE + [*[RISEN] * 4, FINE] * 6, []),
        # After a recovery of as many updates the warning is repeated, after a shorter one it is not.
        (BEFORE + [RISEN] * 6 + [FINE] * 5 + [RISEN] * 5, [34, 45]),
        (BEFORE + [RISEN] * 6 + [FINE] * 4 + [RISEN] * 9, [34]),
        ([(5.0 + i, 0, 0, 0.8) for i in range(50)], []),  # no level to compare with
        (FALLING + [(0.32, 0, 0, 0.8)] * 20, []),  # the level, 0.3, follows slowly
        (FALLING + [(0.5, 0, 0, 0.8)] * 20, [44]),
        (BEFORE + [WON] * 60, [49]),
        (BEFORE + [*[WON] * 19, (0.2, 0.9, -5.0, 0.8)] * 3, []),
        (BEFORE + [*[WON] * 19, (0.2, 5.0, -0.9, 0.8)] * 3, []),
        ([(0.2, 5.0, -5.0, 0.0)] * 60, []),  # without weight it has no effect
    ],
)
def test_warnings_about_rising_errors_and_a_winning_discriminator(metrics, warnings):
    assert warned(metrics) == warnings


def test_warnings_carry_what_was_measured_and_what_to_do():
    for metrics, carried in (
        ([(0.3, 2.0, -3.0, 0.8)] * 20, [("step 34", "0.3", "0.2", "50%"), ("step 49", "-3", "2")]),
        ([WON] * 15 + [(0.3, 1.1, -1.1, 0.8)] * 5, [("50%", "-1.1")]),  # both at once
    ):
        watch = DiscriminatorWatch()
        texts = [watch.update(number, *values) for number, values in enumerate(BEFORE + metrics)]
        for text, parts in zip(filter(None, texts), carried, strict=True):
            for part in (*parts, "autoencoder.training.adversarial.start", "weight", "warm_in"):
                assert part in text


@pytest.mark.parametrize("cut", range(0, 70, 3))
def test_warnings_do_not_depend_on_resuming(cut):
    metrics = BEFORE[:20] + [RISEN] * 6 + [FINE] * 5 + [RISEN] * 5 + [WON] * 30 + [FINE] * 3
    whole = warned(metrics)
    assert len(whole) == 3
    first, second = DiscriminatorWatch(), DiscriminatorWatch()
    told = warned(metrics[:cut], first)
    second.load_state(json.loads(json.dumps(first.state())))
    assert told + [cut + number for number in warned(metrics[cut:], second)] == whole
