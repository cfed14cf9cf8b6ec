"""The autoencoder between frames and latents, and the check that both are finite."""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from pipelines.errors import UserError
from pipelines.runtime.context import in_full_precision
from stage1_autoencoder.autoencoder import Autoencoder
from stage1_autoencoder.packing import can_pack, with_packed_convolutions
from stage2_flow.standardization import Standardization

Network = TypeVar("Network", bound=nn.Module)

# Frames per call of the autoencoder.
FRAMES_AT_ONCE = 64
# Follows the error about a result that is not finite, though what it was computed from is.
DIVERGED = ": the network has diverged, or overflows: use an earlier checkpoint, or train it again"


class FrameCoding:
    """An autoencoder between frames and latents.

    Attributes:
        autoencoder: on the device, in eval mode. Its weights do not change.
        standardization: of its raw latents.
        threads: of a CPU; None: those of the process.
    """

    autoencoder: Autoencoder
    standardization: Standardization
    device: torch.device
    threads: int | None = None

    @torch.inference_mode()
    @in_full_precision
    def encode_videos(self, images: Tensor) -> Tensor:
        """[b, n, 3, h, w] images in [-1, 1] to [b, n, c, h / f, w / f] raw latents.

        Raises:
            UserError: NaN or inf in images or latents.
        """
        check_finite("images", images)
        frames = rearrange(images, "b n c h w -> (b n) c h w")
        dtype = self.autoencoder.last_layer.weight.dtype
        latents = [self.autoencoder.encode(part.to(self.device, dtype)) for part in frames.split(FRAMES_AT_ONCE)]
        encoded = rearrange(torch.cat(latents), "(b n) c h w -> b n c h w", b=len(images))
        check_finite("latents of the autoencoder", encoded, way_out=DIVERGED)
        return encoded

    @torch.inference_mode()
    @in_full_precision
    def decode_videos(self, latents: Tensor) -> Tensor:
        """[b, n, c, h, w] raw latents, quantized to their nearest codes, to [b, n, 3, h f, w f] images in [-1, 1].

        Raises:
            UserError: NaN or inf in latents or pixels.
        """
        return self._decode(latents).clamp(-1, 1)

    def _decode(self, latents: Tensor, decoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """As `decode_videos`, not clamped; by another decoder of quantized latents, if one is given."""
        check_finite("latents", latents)
        frames = rearrange(latents, "b n c h w -> (b n) c h w")
        decode = self._decoding.decode if decoder is None else lambda part: decoder(self.autoencoder.quantize(part)[0])
        images = [decode(part.to(self.device)) for part in frames.split(FRAMES_AT_ONCE)]
        decoded = rearrange(torch.cat(images), "(b n) c h w -> b n c h w", b=len(latents))
        check_finite("pixels of the autoencoder", decoded, way_out=DIVERGED)
        return decoded

    @cached_property
    def _decoding(self) -> Autoencoder:
        """The autoencoder, or on a CPU a copy that decodes in less time."""
        shared = (self.autoencoder.encoder, self.autoencoder.quantizer)
        return packed_for(self.autoencoder, self.device, shared)


def packed_for(network: Network, device: torch.device, shared: Iterable[nn.Module] = ()) -> Network:
    """A network, or on a CPU a copy that takes less time, with packed convolutions; `shared` parts are not copied."""
    dtype = next(network.parameters()).dtype
    if device.type != "cpu" or dtype != torch.float32 or not can_pack(dtype):
        return network
    return with_packed_convolutions(network, dtype, shared)


def check_finite(what: str, videos: Tensor, samples: int = 1, way_out: str = "", first: int = 0) -> None:
    """Refuse NaN and inf, in one pass over the videos, for which the host waits once.

    Args:
        what: begins the message.
        videos: [b samples, n, ...] of any type.
        samples: rows per video.
        way_out: ends the message.
        first: number of the first frame.
    Raises:
        UserError: names the first frame that is not finite, and its video.
    """
    if torch.stack(videos.aminmax()).isfinite().all():  # NaN propagates
        return
    finite = videos.isfinite().flatten(2).all(2)
    frame = int(finite.all(0).long().argmin())
    row = int(finite[:, frame].long().argmin())
    raise UserError(f"{what}: NaN or inf in frame {first + frame} of video {row // samples}{way_out}")
