"""The I3D of the Fréchet video distance and of the refiner's perceptual loss: found, fetched, checked, called."""

import hashlib
import os
import warnings
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipelines.data.fetch import fetch
from pipelines.errors import UserError
from pipelines.runtime.progress import say, warn

I3D_FILE = "i3d_torchscript.pt"
I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"


class VideoNetwork:
    """A frozen TorchScript network that makes a vector of a video.

    Attributes:
        network: called as net(video [b, 3, t, h, w] in [-1, 1], rescale=False, resize=True, return_features=True)
            -> [b, d]; the I3D resizes to 224x224 itself, bilinearly.
        sha256: of its file.
        path: of its file.
    """

    def __init__(self, path: str | Path, device: torch.device, setting: str, spoilt: str) -> None:
        """Load the network.

        Args:
            path: a TorchScript file.
            setting: which names it, for messages.
            spoilt: what another network than the usual one leads to: "distances are not comparable with others'".
        Raises:
            UserError: no such file, or no TorchScript.
        """
        self._setting = setting
        self.path = path = _existing(path, setting)
        self.sha256 = file_sha256(path)
        try:
            with warnings.catch_warnings():
                # Deprecated in favour of torch.export, which cannot read the file that everybody has.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(path, map_location=device)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{setting}: {path} is no TorchScript file, or a damaged one ({_first_line(error)}): get {I3D_FILE} "
                f"from {I3D_URL}, or set it to null"
            ) from None
        if self.sha256 != I3D_SHA256:
            warn(f"{setting}: {path} has sha256 {self.sha256}, and the usual {I3D_FILE} {I3D_SHA256}: {spoilt}")
        self.network.eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)

    def features(self, videos: Tensor) -> Tensor:
        """What the network makes of videos; gradients flow to them.

        Args:
            videos: [b, t, 3, h, w] float, about [-1, 1], on the network's device; t >= 10 for the I3D.
        Returns:
            [b, d] float32.
        Raises:
            UserError: the network can't be called as the I3D is, or answers otherwise.
        """
        called = f"{self._setting}: {self.path} can't be applied to videos of {videos.shape[1]} frames of "
        called += f"{videos.shape[3]}x{videos.shape[4]}"
        way_out = f"take the I3D from {I3D_URL}, or set it to null"
        video = rearrange(videos.float(), "b t c h w -> b c t h w")
        try:
            features = self.network(video, rescale=False, resize=True, return_features=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, torch.jit.Error) as error:
            raise UserError(f"{called} ({str(error).strip().splitlines()[-1]}): {way_out}") from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(videos):
            answer = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"{called}: it answers {answer}, and [{len(videos)}, features] is expected: {way_out}")
        return features.float()


def download_path() -> Path:
    """Where the fetched network lies, if it was fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints" / I3D_FILE


def find_video_network(configured: str | Path | None, setting: str, *, download: bool) -> Path | None:
    """The file of the network, or None where it is not on this machine.

    Args:
        configured: what the setting says; None: look into torch's folder of downloads.
        download: fetch what is not there, into that folder.
    Raises:
        UserError: a configured path that names no file; a fetched file that is another one, or damaged.
        FetchError: the download fails.
    """
    if configured is not None:
        return _existing(configured, setting)
    path = download_path()
    if path.exists():
        _check(path, f"remove it and get it again, from {I3D_URL} or with --download")
    elif download:
        _download(path, setting)
    return path if path.exists() else None


def file_sha256(path: Path) -> str:
    """sha256 (hexadecimal) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _existing(given: str | Path, setting: str) -> Path:
    path = Path(given).expanduser()
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{setting}: {given}: {found}; get it from {I3D_URL}, or set it to null to do without")
    return path


def _download(target: Path, setting: str) -> None:
    """Fetch the file; it gets its name once its content is the known one: other programs trust it."""
    say(f"fetching {I3D_URL} (50 MB) to {target.parent}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{target.parent}: cannot be made ({error.strerror}): set TORCH_HOME to a folder that can be written, or "
            f"{setting} to a copy of {I3D_FILE}"
        ) from error
    unchecked = target.with_name(f"unchecked-{target.name}")
    fetch(I3D_URL, unchecked, way_out=f"or copy {I3D_FILE} to this machine and set {setting} to its path")
    try:
        _check(unchecked, f"fetched from {I3D_URL}; get {I3D_FILE} elsewhere and set {setting} to its path")
    except UserError:
        unchecked.unlink()
        raise
    os.replace(unchecked, target)


def _check(path: Path, way_out: str) -> None:
    digest = file_sha256(path)
    if digest != I3D_SHA256:
        raise UserError(f"{path}: its sha256 is {digest}, and that of {I3D_FILE} {I3D_SHA256}: another file, or a "
                        f"damaged one: {way_out}")  # fmt: skip


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
