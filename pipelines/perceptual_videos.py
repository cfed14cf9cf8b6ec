"""The perceptual term of the refiner's loss: how far two videos lie apart for a video network, the I3D."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.errors import UserError
from pipelines.video_network import I3D_URL, VideoNetwork

SETTING = "refiner.training.perceptual_network"


class PerceptualVideos:
    """Mean squared error between the features of two batches of videos, by a frozen TorchScript network.

    Attributes:
        sha256: of the network's file.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        """Load the network; arguments and errors as of `VideoNetwork`."""
        self._video_network = VideoNetwork(path, device, SETTING, "losses are not comparable with others'")
        self.network = self._video_network.network
        self.sha256 = self._video_network.sha256
        self.path = self._video_network.path

    def distance(self, videos: Tensor, truth: Tensor) -> Tensor:
        """The term of the loss.

        Args:
            videos, truth: [b, t, 3, h, w] float, about [-1, 1]; gradients flow to `videos`.
        Returns:
            Scalar, mean over batch and features.
        Raises:
            UserError: the network can't be called as the I3D is, or hands no gradients on.
        """
        with torch.no_grad():
            wanted = self._video_network.features(truth)
        features = self._video_network.features(videos)
        if videos.requires_grad and not features.requires_grad:
            raise UserError(f"{SETTING}: {self.path} hands no gradients on: take the I3D from {I3D_URL}")
        return F.mse_loss(features, wanted)
