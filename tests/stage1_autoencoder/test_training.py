"""The autoencoder's loss, its gradients, and its learning-rate schedule."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.autoencoder import Autoencoder, Reconstruction
from stage1_autoencoder.config import AutoencoderTrainingConfig, VQGANConfig, VQVAEConfig
from stage1_autoencoder.discriminator import PatchDiscriminator, generator_loss, hinge_loss
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.training import (
    DiscriminatorStep,
    backward,
    codebook_loss,
    learning_rate_factor,
    reconstruction_loss,
)

FAMILIES = [
    VQGANConfig(channels=8, channel_multipliers=(1, 2), blocks=1, attention_resolutions=(), codes=32, norm_groups=4),
    VQVAEConfig(channels=8, levels=1, codes=32, norm_groups=4),
]


def test_every_term_has_its_closed_form():
    truth = torch.zeros(2, 3, 4, 4)
    off_by = torch.full_like(truth, 0.5)
    off_by[0] = -0.1
    config = AutoencoderTrainingConfig(l1_weight=2.0, l2_weight=3.0, perceptual_weight=7.0)
    l1, l2 = (0.5 + 0.1) / 2, (0.25 + 0.01) / 2
    loss = reconstruction_loss(off_by, truth, config)
    assert loss.perceptual is None
    # Means of 96 float32 values.
    assert loss.l1.item() == pytest.approx(l1, rel=1e-5)
    assert loss.l2.item() == pytest.approx(l2, rel=1e-5)
    assert loss.total.item() == pytest.approx(2 * l1 + 3 * l2, rel=1e-5)
    seen = []

    def perceptual(images: Tensor, truth: Tensor) -> Tensor:
        seen.append((images, truth))
        return torch.tensor([0.2, 0.4])

    loss = reconstruction_loss(off_by, truth, config, perceptual)
    assert loss.perceptual.item() == pytest.approx(0.3)
    assert loss.total.item() == pytest.approx(2 * l1 + 3 * l2 + 7 * 0.3, rel=1e-5)
    assert torch.equal(seen[0][0], off_by)
    assert torch.equal(seen[0][1], truth)
    rough = reconstruction_loss(off_by.bfloat16(), truth, config)
    assert rough.total.dtype == torch.float32


def test_beta_weighs_the_term_that_moves_the_encoder():
    latents, config = torch.zeros(1, 4, 1, 1), AutoencoderTrainingConfig(commitment=0.25)
    terms = torch.tensor(3.0), torch.tensor(8.0)
    output = Reconstruction(torch.zeros(1, 3, 2, 2), latents, latents[:, 0].long(), *terms)
    assert codebook_loss(output, config).item() == 3 + 0.25 * 8


@pytest.fixture(params=FAMILIES, ids=lambda config: config.architecture)
def model(request) -> Autoencoder:
    torch.manual_seed(0)
    return build_autoencoder(request.param)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Perceptual(nn.Module):
    """A distance with gradients of its own."""

    def forward(self, images: Tensor, truth: Tensor) -> Tensor:
        return (images.sin() - truth.sin()).square().mean((1, 2, 3))


CONFIG = AutoencoderTrainingConfig(l2_weight=1.5, perceptual_weight=2.0, codebook_weight=0.7, commitment=0.3)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Up to float32 roundings: about 25 layers and sums over 1024 positions, with errors like sqrt(25 x 1024)."""
    assert ours.keys() == theirs.keys()
    relative = 1e-4
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        difference = (ours[name] - gradient).abs().max()
        assert difference <= relative * gradient.abs().max() + 1e-6 * largest, name


def test_gradients_are_those_of_the_whole_loss(model, images):
    """In two steps over the reconstructed images, or all at once as in the equations."""
    discriminator, perceptual, last = PatchDiscriminator(8, 1), Perceptual(), model.last_layer.weight
    terms = backward(
        model(images), images, CONFIG, last_layer=last, perceptual=perceptual, discriminator=discriminator,
        adversarial_weight=0.8,
    )  # fmt: skip
    ours = gradients(model)
    assert not gradients(discriminator)
    model.zero_grad()

    passed = model(images)
    reconstruction = (
        F.l1_loss(passed.images, images)
        + 1.5 * F.mse_loss(passed.images, images)
        + 2.0 * perceptual(passed.images, images).mean()
    )
    adversarial = generator_loss(discriminator(passed.images))
    of_reconstruction, of_adversary = (
        torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (reconstruction, adversarial)
    )
    ratio = of_reconstruction / (of_adversary + 1e-4)
    codebook = passed.codebook_loss + 0.3 * passed.commitment_loss
    whole = reconstruction + 0.7 * codebook + 0.8 * ratio.detach() * adversarial
    whole.backward()
    assert ours.keys() == dict(model.named_parameters()).keys()
    check_equal(ours, gradients(model))
    assert terms["adaptive_weight"].item() == pytest.approx(ratio.item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(whole.item(), rel=1e-5)
    assert terms["adversarial"].item() == pytest.approx(adversarial.item(), rel=1e-5)
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize("discriminator", [None, PatchDiscriminator(8, 1)])
def test_without_weight_there_is_no_adversarial_term(model, images, discriminator):
    last = model.last_layer.weight
    terms = backward(model(images), images, CONFIG, last_layer=last, discriminator=discriminator)
    with_none = gradients(model)
    model.zero_grad()
    backward(model(images), images, CONFIG, last_layer=last)
    assert all(torch.equal(with_none[name], gradient) for name, gradient in gradients(model).items())
    assert terms.keys() == {"loss", "l1", "l2", "codebook"}


def test_parts_of_a_batch_add_up_to_it(images):
    torch.manual_seed(0)
    model = build_autoencoder(FAMILIES[0])  # without BatchNorm, which sees parts otherwise
    last = model.last_layer.weight
    backward(model(images), images, CONFIG, last_layer=last)
    whole = gradients(model)
    model.zero_grad()
    for part in images.chunk(2):
        backward(model(part), part, CONFIG, last_layer=last, scale=0.5)
    check_equal(gradients(model), whole)


def test_the_ratio_is_of_averaged_gradients(model, images):
    last, seen = model.last_layer.weight, []

    def average(gradient: Tensor) -> None:
        seen.append(gradient.shape)
        gradient *= 2.0 if len(seen) == 1 else 1.0

    plain, averaged = (
        backward(
            model(images), images, CONFIG, last_layer=last, discriminator=discriminator, adversarial_weight=1.0,
            average=function,
        )
        for discriminator in [PatchDiscriminator(8, 1).eval()]
        for function in (lambda _: None, average)
    )  # fmt: skip
    assert seen == [last.shape, last.shape]
    assert averaged["adaptive_weight"].item() == pytest.approx(2 * plain["adaptive_weight"].item(), rel=0.2)


def test_the_discriminators_step(images):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(8, 1)
    fake = images.flip(0).neg().requires_grad_()
    loss, real_mean, fake_mean = DiscriminatorStep(discriminator)(images, fake)
    real_logits, fake_logits = discriminator(images), discriminator(fake)
    torch.testing.assert_close(loss, hinge_loss(real_logits, fake_logits))
    torch.testing.assert_close(real_mean, real_logits.mean())
    torch.testing.assert_close(fake_mean, fake_logits.mean())
    loss.backward()
    assert fake.grad is None
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_learning_rate_warms_up_and_ends_at_zero():
    factors = [learning_rate_factor(step, warmup=4, total=12) for step in range(14)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert factors[12:] == [0.0, 0.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert learning_rate_factor(0, warmup=0, total=10) == 1.0
    assert learning_rate_factor(0, warmup=10, total=10) == 0.1
    assert 0 <= learning_rate_factor(10, warmup=10, total=10) <= 1
