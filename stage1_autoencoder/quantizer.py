"""Nearest-code vector quantization."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

# Distances between positions and codes that are held at once: what fits into a CPU's cache (three times as fast as what
# doesn't, at 16384 codes), and 256 MiB on other devices.
DISTANCES_AT_ONCE = {"cpu": 2**19}
OTHERWISE = 2**26
# Of the way to its code, what a latent is pulled first when rounding would give it another one.
FIRST_PULL = 2.0**-8
PULLED_AT_ONCE = 64


@dataclass(frozen=True)
class Quantized:
    """Latents moved to their nearest codes.

    Attributes:
        latents: [b, c, h, w], values of the codes, with the straight-through gradient.
        codes: [b, h, w] int64 in [0, number of codes).
        codebook_loss: mean squared distance that pulls codes to (detached) latents.
        commitment_loss: mean squared distance that pulls latents to (detached) codes.
    """

    latents: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


@dataclass(frozen=True)
class Rounded:
    """Latents in a narrower type.

    Attributes:
        latents: [b, c, h, w].
        pulled: [b, h, w] bool, where the nearest code would have become another one.
        changed: [b, h, w] bool, where it did all the same.
    """

    latents: Tensor
    pulled: Tensor
    changed: Tensor


class VectorQuantizer(nn.Module):
    """A codebook of `codes` vectors of `dimensions`, initialised U[-1/codes, 1/codes] as in taming.

    With `normalize` the codes are the vectors' directions, of length 1. Then the nearest one in Euclidean distance is
    the one at the smallest angle, however long the latent is.
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
        """The code nearest to each latent vector in Euclidean distance; of equals the first.

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
        # Distances decide between neighbours that may differ in the last digits: never in half precision.
        with torch.autocast(vectors.device.type, enabled=False):
            codebook = self.codebook.to(torch.promote_types(vectors.dtype, torch.float32))
            # |z - e|^2 = |z|^2 - 2 z.e + |e|^2; the first term is the same for all codes of a position.
            squared, transposed = codebook.square().sum(1), codebook.T.contiguous()
            size = max(1, DISTANCES_AT_ONCE.get(vectors.device.type, OTHERWISE) // len(codebook))
            parts = vectors.to(codebook.dtype).split(size)
            return torch.cat([torch.addmm(squared, part, transposed, alpha=-2).argmin(1) for part in parts])

    @torch.no_grad()
    def rounded(self, latents: Tensor, codes: Tensor, dtype: torch.dtype) -> Rounded:
        """Round latents to a narrower type, so that their nearest codes stay what they are.

        Where rounding alone would give a latent another nearest code, it is pulled towards its own one first, by
        1/256 of the way, or twice as much, and so on. What is nearest to a code stays so on the way to it.

        Args:
            latents: [b, c, h, w] float.
            codes: [b, h, w] int64, the nearest code of each.
            dtype: of the result. Values that it cannot hold become infinite.
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
        """As `_nearest`, in products of one shape: what becomes of one must not depend, to the bit, on their number."""
        filled = F.pad(vectors, (0, 0, 0, -len(vectors) % PULLED_AT_ONCE))
        return torch.cat([self._nearest(part) for part in filled.split(PULLED_AT_ONCE)])[: len(vectors)]

    def embed(self, codes: Tensor) -> Tensor:
        """Codes [b, h, w] back to latents [b, c, h, w]."""
        return rearrange(F.embedding(codes, self.codebook), "b h w c -> b c h w")

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize latents [b, c, h, w] and give both losses (van den Oord et al. 2017, Eq. 3)."""
        codes = self.nearest(latents)
        embedded = self.embed(codes)
        return Quantized(
            latents=latents + (embedded - latents).detach(),
            codes=codes,
            codebook_loss=F.mse_loss(embedded.float(), latents.detach().float()),
            commitment_loss=F.mse_loss(latents.float(), embedded.detach().float()),
        )
