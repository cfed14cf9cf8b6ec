"""Nearest-code vector quantization."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

# Positions whose distances to all codes are held at once; 4096 x 16384 codes are 256 MiB in fp32.
POSITIONS_AT_ONCE = 4096


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


class VectorQuantizer(nn.Module):
    """A codebook of `codes` vectors of `dimensions`, initialised U[-1/codes, 1/codes] as in taming."""

    def __init__(self, codes: int, dimensions: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dimensions)
        nn.init.uniform_(self.embedding.weight, -1.0 / codes, 1.0 / codes)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """The code nearest to each latent vector in Euclidean distance; of equals the first.

        Args:
            latents: [b, c, h, w] float.
        Returns:
            [b, h, w] int64.
        """
        # Distances decide between neighbours that may differ in the last digits: never in half precision.
        with torch.autocast(latents.device.type, enabled=False):
            codebook = self.embedding.weight.to(torch.promote_types(latents.dtype, torch.float32))
            vectors = rearrange(latents.to(codebook.dtype), "b c h w -> (b h w) c")
            # |z - e|^2 = |z|^2 - 2 z.e + |e|^2; the first term is the same for all codes of a position.
            squared = codebook.square().sum(1)
            codes = [
                torch.addmm(squared, part, codebook.T, alpha=-2).argmin(1) for part in vectors.split(POSITIONS_AT_ONCE)
            ]
        b, _, h, w = latents.shape
        return rearrange(torch.cat(codes), "(b h w) -> b h w", b=b, h=h, w=w)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes [b, h, w] back to latents [b, c, h, w]."""
        return rearrange(self.embedding(codes), "b h w c -> b c h w")

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
