"""Nearest codes, the two losses, and rounding that keeps codes."""

import pytest
import torch

from stage1_autoencoder.quantizer import VectorQuantizer


@pytest.fixture
def quantizer() -> VectorQuantizer:
    torch.manual_seed(0)
    made = VectorQuantizer(codes=97, dimensions=4)
    torch.nn.init.normal_(made.embedding.weight)
    return made


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))


def distances(quantizer: VectorQuantizer, latents: torch.Tensor) -> torch.Tensor:
    """[b, h, w, codes] squared distances in float64, by the definition."""
    vectors = latents.double().movedim(1, -1)
    return (vectors[..., None, :] - quantizer.embedding.weight.double()).square().sum(-1)


def check_nearest(distances: torch.Tensor, codes: torch.Tensor, scale: float = 1.0) -> None:
    """Chosen codes are the nearest, up to roundings of a float32 distance: 4 products of values up to 5, and |e|^2."""
    chosen = distances.gather(-1, codes[..., None])[..., 0]
    assert (chosen - distances.amin(-1)).max() <= scale * 16 * 25 * torch.finfo(torch.float32).eps
    assert (codes == distances.argmin(-1)).float().mean() > 0.99


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 4, 80, 80)])  # in one block of distances, and in several
def test_nearest_is_the_brute_force_answer(quantizer, shape):
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = distances(quantizer, latents)
    codes = quantizer.nearest(latents)
    assert codes.shape == (shape[0], *shape[2:])
    assert codes.dtype == torch.int64
    check_nearest(expected, codes)
    assert (quantizer.nearest(latents.double()) == expected.argmin(-1)).all()
    embedded = quantizer.embed(codes)
    assert torch.equal(embedded.movedim(1, -1), quantizer.embedding.weight[codes])
    assert torch.equal(quantizer.nearest(embedded), codes)
    fresh = VectorQuantizer(64, 4).embedding.weight
    assert 0.9 / 64 < fresh.abs().max() <= 1 / 64


def test_of_equal_codes_the_first_is_chosen(quantizer, latents):
    with torch.no_grad():
        quantizer.embedding.weight[60:90] = quantizer.embedding.weight[:30]
    codes = quantizer.nearest(latents)
    assert not ((codes >= 60) & (codes < 90)).any()
    assert (codes < 30).any()


def test_autocast_does_not_change_codes(quantizer):
    latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer.nearest(latents)
    assert (inside == quantizer.nearest(latents)).all()
    # The test could fail: rounding to bfloat16 moves some positions to another code.
    assert (quantizer.nearest(latents.bfloat16()) != quantizer.nearest(latents)).any()


def test_values_are_codes_and_losses_are_mean_squared_distances(quantizer, latents):
    output = quantizer(latents)
    expected = distances(quantizer, latents).amin(-1).mean() / 4
    # z + (e - z): two roundings of values up to 8.
    torch.testing.assert_close(output.latents, quantizer.embed(output.codes), atol=2 * 8 * 2.0**-24, rtol=0)
    # A mean of 360 squares of differences.
    assert output.codebook_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.commitment_loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_pass_straight_through_and_each_loss_moves_its_own_side(quantizer, latents):
    latents.requires_grad_()
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    output = quantizer(latents)
    quantized = quantizer.embed(output.codes).detach()
    (gradient,) = torch.autograd.grad((output.latents * weights).sum(), latents, retain_graph=True)
    assert torch.equal(gradient, weights)
    output.commitment_loss.backward(retain_graph=True)
    torch.testing.assert_close(latents.grad, 2 * (latents - quantized).detach() / latents.numel())
    assert quantizer.embedding.weight.grad is None
    latents.grad = None
    output.codebook_loss.backward()
    assert latents.grad is None
    moved = quantizer.embedding.weight.grad.abs().sum(1) > 0
    assert (moved.nonzero().flatten() == output.codes.unique()).all()


def dense_quantizer() -> VectorQuantizer:
    """Many codes in little space, so that float16 moves many latents into another cell."""
    torch.manual_seed(1)
    quantizer = VectorQuantizer(2048, 3)
    quantizer.embedding.weight.data = torch.rand(2048, 3) + 2
    return quantizer


def normalized_quantizer() -> VectorQuantizer:
    torch.manual_seed(1)
    return VectorQuantizer(8192, 3, normalize=True)


# Half a unit in the last place, and a pull by some hundredths of the way to the code.
@pytest.mark.parametrize(("make", "largest"), [(dense_quantizer, 1.5 * 2**-9), (normalized_quantizer, 1e-2)])
def test_rounding_keeps_nearest_codes(make, largest) -> None:
    quantizer = make()
    latents = torch.rand(6, 3, 20, 20) + 2
    if quantizer.normalize:
        latents = torch.nn.functional.normalize(latents - 2.5, dim=1)
    codes = quantizer.nearest(latents)
    plain = latents.half()
    moved = quantizer.nearest(plain.float()) != codes
    assert 5 < moved.sum() < moved.numel() / 5
    rounded = quantizer.rounded(latents, codes, torch.float16)
    assert torch.equal(quantizer.nearest(rounded.latents.float()), codes)
    assert torch.equal(rounded.pulled, moved)
    assert not rounded.changed.any()
    assert torch.equal(rounded.latents.movedim(1, -1)[~moved], plain.movedim(1, -1)[~moved])
    assert (rounded.latents.float() - latents).abs().max() < largest


def test_rounding_does_not_depend_on_the_batch() -> None:
    quantizer = dense_quantizer()
    latents = torch.rand(12, 3, 16, 16) + 2

    def rounded(latents: torch.Tensor) -> torch.Tensor:
        parts = [quantizer.rounded(part, quantizer.nearest(part), torch.float16).latents for part in latents.split(4)]
        return torch.cat(parts)

    assert torch.equal(rounded(latents), rounded(latents.roll(-2, 0)).roll(2, 0))


def test_rounding_without_a_remedy() -> None:
    quantizer = dense_quantizer()
    latents = torch.rand(1, 3, 4, 4) + 2
    same = quantizer.rounded(latents, quantizer.nearest(latents), torch.float32)
    assert torch.equal(same.latents, latents)
    assert not same.pulled.any()

    latents[0, 1, 2, 3] = 70000.0
    assert quantizer.rounded(latents, quantizer.nearest(latents), torch.float16).latents[0, 1, 2, 3] == torch.inf

    # Two codes that are equal in float16: the first of them is always found.
    quantizer = quantizer.double()
    quantizer.embedding.weight.data[:2] = torch.tensor([[9.0, 9.0, 9.0], [9.0, 9.0, 9.001]])
    latents = torch.full((1, 3, 1, 1), 9.0, dtype=torch.float64)
    latents[0, 2] = 9.0009
    codes = quantizer.nearest(latents)
    assert codes.item() == 1
    lost = quantizer.rounded(latents, codes, torch.float16)
    assert lost.pulled.all()
    assert lost.changed.all()


@pytest.fixture
def directions() -> VectorQuantizer:
    """Normalized codes whose vectors have lengths from 0.1 to 10."""
    torch.manual_seed(0)
    made = VectorQuantizer(codes=97, dimensions=4, normalize=True)
    torch.nn.init.normal_(made.embedding.weight)
    made.embedding.weight.data *= 10 ** (2 * torch.rand(97, 1) - 1)
    return made


def test_of_normalized_codes_the_nearest_is_at_the_smallest_angle(directions, latents):
    vectors, weight = latents.double().movedim(1, -1), directions.embedding.weight.double()
    cosines = vectors @ weight.T / (vectors.norm(dim=-1, keepdim=True) * weight.norm(dim=1))
    for length in (1e-3, 1.0, 1e3):
        check_nearest(-length * cosines, directions.nearest(length * latents), scale=length)
    # The test could fail: the vectors themselves are nearest to other latents.
    plain = VectorQuantizer(97, 4)
    plain.load_state_dict(directions.state_dict())
    assert (plain.nearest(latents) != cosines.argmax(-1)).float().mean() > 0.3


def test_normalized_codes_have_length_one_whatever_their_vectors(directions, latents):
    torch.testing.assert_close(directions.codebook.norm(dim=1), torch.ones(97))
    codes = directions.nearest(latents)
    embedded = directions.embed(codes)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3, 5, 6))
    weight = directions.embedding.weight
    expected = (weight / weight.norm(dim=1, keepdim=True))[codes].movedim(-1, 1)
    torch.testing.assert_close(embedded, expected)
    assert torch.equal(directions.nearest(embedded), codes)
    torch.testing.assert_close(directions(latents).latents, embedded, atol=2 * 8 * 2.0**-24, rtol=0)


def test_gradients_of_normalized_codes_turn_and_do_not_stretch(directions, latents):
    output = directions(torch.nn.functional.normalize(latents, dim=1))
    output.codebook_loss.backward()
    weight = directions.embedding.weight
    chosen = output.codes.unique()
    assert (weight.grad[chosen].norm(dim=1) > 0).all()
    along = (weight.grad * weight).sum(1) / (weight.norm(dim=1) * weight.grad.norm(dim=1).clamp(min=1e-12))
    assert along.abs().max() < 100 * torch.finfo(torch.float32).eps  # the projection takes about 20 operations
    # A small step down makes it smaller.
    before = output.codebook_loss.item()
    with torch.no_grad():
        weight -= 1e-3 * weight.grad
    after = directions(torch.nn.functional.normalize(latents, dim=1)).codebook_loss.item()
    assert after < before
