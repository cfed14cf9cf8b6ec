"""Nearest-code vector quantization."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.precision import exact_matrix_products

# Distances between positions and codes per block: on a CPU they fit into its cache (three times faster at 16384 codes),
# elsewhere they take 256 MiB.
BLOCK_OF_DISTANCES = {"cpu": 2**19}
OTHER_BLOCK_OF_DISTANCES = 2**26
# Fraction of the way to its code by which a latent is pulled first, if rounding would change its code.
FIRST_PULL = 2.0**-8
PULLED_PER_BLOCK = 64


@dataclass(frozen=True)
class Quantized:
    """Quantized latents.

    Attributes:
        latents: [b, c, h, w], the vectors of the codes, with the straight-through gradient.
        codes: [b, h, w] int64 in [0, number of codes).
        codebook_loss: mean squared distance of codes from (detached) latents.
        commitment_loss: mean squared distance of latents from (detached) codes.
    """

    latents: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


@dataclass(frozen=True)
class Rounded:
    """Latents in a narrower dtype.

    Attributes:
        latents: [b, c, h, w].
        pulled: [b, h, w] bool, where plain rounding would have changed the nearest code.
        changed: [b, h, w] bool, where it changed nevertheless.
    """

    latents: Tensor
    pulled: Tensor
    changed: Tensor


class VectorQuantizer(nn.Module):
    """A codebook of `codes` vectors of `dimensions`, initialised U[-1/codes, 1/codes] as in taming.

    With `normalize` the codes are the directions of the vectors, of length 1. Then the nearest code in Euclidean
    distance is the one at the smallest angle, whatever the length of the latent.
    """

    def __init__(self, codes: int, dimensions: int, *, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        self.embedding = nn.Embedding(codes, dimensions)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    @property
    def codebook(self) -> Tensor:
        """The codes, [codes, dimensions]."""
        return F.normalize(self.embedding.weight, dim=1) if self.normalize else self.embedding.weight

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """The code nearest to each latent vector in Euclidean distance; the first one of equal codes.

        Args:
            latents: [b, c, h, w] float.
        Returns:
            [b, h, w] int64.
        """
        b, _, h, w = latents.shape
        codes = self._nearest(rearrange(latents, "b c h w -> (b h w) c"))
        return rearrange(codes, "(b h w) -> b h w", b=b, h=h, w=w)

    def _nearest(self, vectors: Tensor) -> Tensor:
        """Codes [n] of vectors [n, c]."""
        # Distances of neighboring codes may differ in the last digits only: never in half precision, never in TF32.
        with torch.autocast(vectors.device.type, enabled=False), exact_matrix_products():
            codebook = self.codebook.to(torch.promote_types(vectors.dtype, torch.float32))
            # |z - e|^2 = |z|^2 - 2 z.e + |e|^2; the first term does not depend on the code.
            squared, transposed = codebook.square().sum(1), codebook.T.contiguous()
            size = max(1, BLOCK_OF_DISTANCES.get(vectors.device.type, OTHER_BLOCK_OF_DISTANCES) // len(codebook))
            parts = vectors.to(codebook.dtype).split(size)
            return torch.cat([torch.addmm(squared, part, transposed, alpha=-2).argmin(1) for part in parts])

    @torch.no_grad()
    def rounded(self, latents: Tensor, codes: Tensor, dtype: torch.dtype) -> Rounded:
        """Round latents to a narrower dtype without changing their nearest codes.

        If rounding would change the nearest code of a latent, the latent is pulled towards its code first, by 1/256 of
        the way, or twice as much, and so on. On the way to its nearest code, this code stays the nearest.

        Args:
            latents: [b, c, h, w] float.
            codes: [b, h, w] int64, the nearest code of each.
            dtype: of the result. Values out of its range become infinite.
        """
        b, _, h, w = latents.shape
        vectors, own = rearrange(latents, "b c h w -> (b h w) c"), codes.flatten()
        result = vectors.to(dtype)
        differ = (self._nearest(result.to(latents.dtype)) != own) & result.isfinite().all(1)
        places = differ.nonzero()[:, 0]
        lost = torch.ones_like(places, dtype=torch.bool)
        towards = self.codebook[own[places]] - vectors[places]
        pull = FIRST_PULL
        while pull <= 1 and lost.any():
            trial = torch.where(lost[:, None], (vectors[places] + pull * towards).to(dtype), result[places])
            result = result.index_copy(0, places, trial)
            lost = self._nearest_of_few(trial.to(latents.dtype)) != own[places]
            pull *= 2
        changed = torch.zeros_like(differ).index_copy(0, places, lost)
        return Rounded(
            latents=rearrange(result, "(b h w) c -> b c h w", b=b, h=h, w=w),
            pulled=rearrange(differ, "(b h w) -> b h w", b=b, h=h, w=w),
            changed=rearrange(changed, "(b h w) -> b h w", b=b, h=h, w=w),
        )

    def _nearest_of_few(self, vectors: Tensor) -> Tensor:
        """Like `_nearest`, in blocks of one shape: results must not depend, bit for bit, on the number of vectors."""
        filled = F.pad(vectors, (0, 0, 0, -len(vectors) % PULLED_PER_BLOCK))
        return torch.cat([self._nearest(part) for part in filled.split(PULLED_PER_BLOCK)])[: len(vectors)]

    def embed(self, codes: Tensor) -> Tensor:
        """Map codes [b, h, w] to their vectors [b, c, h, w]."""
        return rearrange(F.embedding(codes, self.codebook), "b h w c -> b c h w")

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize latents [b, c, h, w] and compute both losses (van den Oord et al. 2017, Eq. 3)."""
        codes = self.nearest(latents)
        embedded = self.embed(codes)
        return Quantized(
            latents=latents + (embedded - latents).detach(),
            codes=codes,
            codebook_loss=F.mse_loss(embedded.float(), latents.detach().float()),
            commitment_loss=F.mse_loss(latents.float(), embedded.detach().float()),
        )
