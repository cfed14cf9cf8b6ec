"""Conversion between raw latents (in the store) and final latents (inputs and outputs of the flow)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Standardization:
    """Per-channel mean and standard deviation [c] of the raw latents.

    Not part of the store, so the same store serves runs with and without standardization.

    Raises:
        ValueError: different shapes, a mean that is not finite, or a deviation that is not finite and positive.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise ValueError(f"mean and std must be [c] both, got {list(self.mean.shape)} and {list(self.std.shape)}")
        usable = self.mean.isfinite() & self.std.isfinite() & (self.std > 0)
        if not usable.all():
            raise ValueError(
                f"mean must be finite and std finite and positive, got {self.mean.tolist()} and {self.std.tolist()}"
            )

    @classmethod
    def identity(cls, channels: int) -> "Standardization":
        """No change: official weights work on raw latents."""
        return cls(mean=torch.zeros(channels), std=torch.ones(channels))

    def to(self, device: torch.device | str) -> "Standardization":
        """The same on a device, so that calls do not have to copy."""
        return Standardization(mean=self.mean.to(device), std=self.std.to(device))

    def to_final(self, raw: Tensor) -> Tensor:
        """final = (raw - mean) / std. [..., k c, h, w] of any float type -> float32 (float64 from float64)."""
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return (raw - self._spread(self.mean, raw)) / self._spread(self.std, raw)

    def to_raw(self, final: Tensor) -> Tensor:
        """raw = final std + mean. [..., k c, h, w] of any float type -> float32 (float64 from float64)."""
        final = final.to(torch.promote_types(final.dtype, torch.float32))
        return final * self._spread(self.std, final) + self._spread(self.mean, final)

    @staticmethod
    def _spread(values: Tensor, like: Tensor) -> Tensor:
        """[c] -> [k c, 1, 1]: k frames may be concatenated as channels."""
        return values.to(like).repeat(like.shape[-3] // len(values))[:, None, None]
