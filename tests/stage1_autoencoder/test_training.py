"""The autoencoder's loss, its learning rate, and the care of its codebook."""

import math

import pytest
import torch

from stage1_autoencoder.autoencoder import Reconstruction
from stage1_autoencoder.config import AutoencoderTrainingConfig, VQGANConfig
from stage1_autoencoder.training import CodebookCare, autoencoder_loss, learning_rate_factor
from stage1_autoencoder.vqgan import VQGAN

TINY = VQGANConfig(channels=8, channel_multipliers=(1, 2), blocks=1, attention_resolutions=(), codes=32, norm_groups=4)


def reconstruction(images: torch.Tensor, codebook: float = 0.0, commitment: float = 0.0) -> Reconstruction:
    latents = torch.zeros(1, 4, 1, 1)
    return Reconstruction(images, latents, latents[:, 0].long(), torch.tensor(codebook), torch.tensor(commitment))


def test_every_term_has_its_closed_form():
    truth = torch.zeros(2, 3, 4, 4)
    off_by = torch.full_like(truth, 0.5)
    off_by[0] = -0.1
    config = AutoencoderTrainingConfig(l1_weight=2.0, l2_weight=3.0, codebook_weight=5.0, commitment=0.25)
    loss = autoencoder_loss(reconstruction(off_by, codebook=0.7, commitment=0.4), truth, config)
    l1, l2, codebook = (0.5 + 0.1) / 2, (0.25 + 0.01) / 2, 0.7 + 0.25 * 0.4
    assert loss.l1.item() == pytest.approx(l1)
    assert loss.l2.item() == pytest.approx(l2)
    assert loss.codebook.item() == pytest.approx(codebook)
    assert loss.total.item() == pytest.approx(2 * l1 + 3 * l2 + 5 * codebook)


def test_beta_stands_on_the_term_that_moves_the_encoder():
    output = reconstruction(torch.zeros(1, 3, 2, 2), codebook=1.0, commitment=0.0)
    images = torch.zeros(1, 3, 2, 2)
    assert autoencoder_loss(output, images, AutoencoderTrainingConfig(commitment=0.25)).codebook.item() == 1.0
    output = reconstruction(torch.zeros(1, 3, 2, 2), codebook=0.0, commitment=1.0)
    assert autoencoder_loss(output, images, AutoencoderTrainingConfig(commitment=0.25)).codebook.item() == 0.25


def test_the_loss_is_reduced_in_fp32():
    truth = torch.zeros(1, 3, 64, 64)
    output = reconstruction(torch.full_like(truth, 0.1).bfloat16())
    loss = autoencoder_loss(output, truth, AutoencoderTrainingConfig())
    assert loss.total.dtype == torch.float32
    assert loss.l1.item() == pytest.approx(float(torch.tensor(0.1).bfloat16()), rel=1e-6)


def test_gradients_reach_every_parameter_of_the_network():
    torch.manual_seed(0)
    model = VQGAN(TINY)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    autoencoder_loss(model(images), images, AutoencoderTrainingConfig(l2_weight=1.0)).total.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert model.encoder.conv_in.weight.grad.abs().max() > 0


def test_learning_rate_warms_up_and_ends_at_zero():
    factors = [learning_rate_factor(step, warmup=4, total=12) for step in range(14)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[11] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert factors[12:] == [0.0, 0.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_learning_rate_without_warm_up_starts_full():
    assert learning_rate_factor(0, warmup=0, total=10) == 1.0
    assert learning_rate_factor(0, warmup=10, total=10) == 0.1
    assert 0 <= learning_rate_factor(10, warmup=10, total=10) <= 1


@pytest.fixture
def model() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(TINY)


def latents(spread: float = 1.0, seed: int = 3) -> torch.Tensor:
    return 5 + spread * torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


def step_output(model: VQGAN, z: torch.Tensor) -> Reconstruction:
    return Reconstruction(z, z, model.quantizer.nearest(z), torch.zeros(()), torch.zeros(()))


def test_start_puts_codes_on_the_latents(model):
    z = latents()
    before = len(model.quantizer.nearest(z).unique())
    CodebookCare(model, 10).start(z, torch.Generator().manual_seed(0))
    vectors = z.movedim(1, -1).reshape(-1, 4)
    nearest = torch.cdist(model.quantizer.embedding.weight, vectors).amin(1)
    assert nearest.max() < 0.1  # a little noise beside a standard deviation of 1
    assert before < 8
    assert len(model.quantizer.nearest(z).unique()) > 24


def test_start_on_a_single_latent_vector_stays_finite(model):
    CodebookCare(model, 10).start(torch.ones(1, 4, 1, 1), torch.Generator().manual_seed(0))
    assert model.quantizer.embedding.weight.isfinite().all()


def test_restart_moves_unused_codes_only_and_brings_them_into_use(model):
    z = latents()
    with torch.no_grad():  # ten codes among the latents, the others far away
        model.quantizer.embedding.weight[:10] = z.movedim(1, -1).reshape(-1, 4)[:10]
        model.quantizer.embedding.weight[10:] = -100
    care = CodebookCare(model, restart_every=3)
    before = model.quantizer.embedding.weight.detach().clone()
    used = model.quantizer.nearest(z).unique()
    for step in (0, 1):
        care.after_step(step, step_output(model, z), torch.Generator().manual_seed(step))
        assert torch.equal(model.quantizer.embedding.weight, before)
    assert care.chosen.sum() == 2 * 4 * 36
    care.after_step(2, step_output(model, z), torch.Generator().manual_seed(2))
    moved = (model.quantizer.embedding.weight != before).any(1)
    assert not moved[used].any()
    assert moved.sum() == 32 - len(used)
    assert len(model.quantizer.nearest(z).unique()) > 2 * len(used)
    assert care.chosen.sum() == 0


def test_a_code_used_once_since_the_last_restart_stays(model):
    z = latents()
    care = CodebookCare(model, restart_every=2)
    with torch.no_grad():
        model.quantizer.embedding.weight[:] = 100.0
        model.quantizer.embedding.weight[3] = z[0, :, 0, 0]
        model.quantizer.embedding.weight[4] = -50.0
    far = torch.full((1, 4, 1, 1), -50.0)
    care.after_step(0, step_output(model, far), torch.Generator())  # code 4
    care.after_step(1, step_output(model, z), torch.Generator())  # code 3
    assert (model.quantizer.embedding.weight[4] == -50).all()
    assert torch.equal(model.quantizer.embedding.weight[3], z[0, :, 0, 0])
    assert (model.quantizer.embedding.weight[5:] < 50).all()


def test_no_restart_when_it_is_switched_off(model):
    care = CodebookCare(model, restart_every=0)
    before = model.quantizer.embedding.weight.detach().clone()
    for step in range(5):
        care.after_step(step, step_output(model, latents()), torch.Generator())
    assert torch.equal(model.quantizer.embedding.weight, before)


def test_counts_survive_a_checkpoint(model):
    care, other = CodebookCare(model, 5), CodebookCare(model, 5)
    care.after_step(0, step_output(model, latents()), torch.Generator())
    other.load_state({"chosen": care.state()["chosen"].clone()})
    assert torch.equal(other.chosen, care.chosen)
    assert other.chosen.sum() > 0
