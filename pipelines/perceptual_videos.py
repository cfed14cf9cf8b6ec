"""The perceptual term of the refiner's loss: how far two videos lie apart for a video network, the I3D."""

import hashlib
import warnings
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipelines.errors import UserError
from pipelines.runtime.progress import warn

I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
SETTING = "refiner.training.perceptual_network"


class PerceptualVideos:
    """Mean squared error between the features of two batches of videos, by a frozen TorchScript network.

    Attributes:
        sha256: of the network's file.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        """Load the network.

        Args:
            path: a TorchScript file; called as net(video [b, 3, t, h, w] in [-1, 1], rescale=False, resize=True,
                return_features=True) -> [b, d].
        Raises:
            UserError: no such file, or no TorchScript.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(
                f"{SETTING}: {path}: no such file; get it from {I3D_URL}, or set it to null to train without the "
                "perceptual term"
            )
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            with warnings.catch_warnings():
                # Deprecated in favour of torch.export, which cannot read the file that everybody has.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(path, map_location=device)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{SETTING}: {path} is no TorchScript file, or a damaged one ({str(error).splitlines()[0]}): get "
                f"i3d_torchscript.pt from {I3D_URL}, or set it to null"
            ) from None
        if self.sha256 != I3D_SHA256:
            warn(
                f"{SETTING}: {path} has sha256 {self.sha256}, and the usual i3d_torchscript.pt {I3D_SHA256}: losses "
                "are not comparable with others'"
            )
        self.network.eval()
        self.path = path
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)

    def distance(self, videos: Tensor, truth: Tensor) -> Tensor:
        """The term of the loss.

        Args:
            videos, truth: [b, t, 3, h, w] float, about [-1, 1]; gradients flow to `videos`.
        Returns:
            Scalar, mean over batch and features.
        Raises:
            UserError: the network can't be called as the I3D is, or hands no gradients on.
        """
        try:
            with torch.no_grad():
                wanted = self._features(truth)
            features = self._features(videos)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"{SETTING}: {self.path} can't be applied to videos of {videos.shape[1]} frames of "
                f"{videos.shape[3]}x{videos.shape[4]} ({str(error).strip().splitlines()[-1]}): take the I3D from "
                f"{I3D_URL}, or set it to null"
            ) from None
        if videos.requires_grad and not features.requires_grad:
            raise UserError(f"{SETTING}: {self.path} hands no gradients on: take the I3D from {I3D_URL}")
        return F.mse_loss(features.float(), wanted.float())

    def _features(self, videos: Tensor) -> Tensor:
        video = rearrange(videos.float(), "b t c h w -> b c t h w")
        return self.network(video, rescale=False, resize=True, return_features=True)
