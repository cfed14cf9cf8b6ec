"""Public networks that compare images and videos, VGG16 (for LPIPS) and the I3D: found, fetched, verified, called."""

import importlib.metadata
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pipelines.data.fetch import fetch
from pipelines.errors import UserError
from pipelines.loading import not_finite
from pipelines.official import is_state_dict, load_pickle
from pipelines.runtime.context import image_memory_format
from pipelines.runtime.files import file_sha256
from pipelines.runtime.progress import say, warn
from stage1_autoencoder.lpips import LPIPS
from stage1_autoencoder.st_lpips import STLPIPS

MOST_BYTES = 2**30  # of a public file
VGG_SETTING = "autoencoder.training.vgg_weights"


@dataclass(frozen=True)
class PublicFile:
    """A file of public weights.

    Attributes:
        name: under which torch's folder of downloads holds it.
        url: where it is downloaded from.
        sha256: hexadecimal, the whole digest or its beginning.
        size: as text, for messages.
    """

    name: str
    url: str
    sha256: str
    size: str

    @property
    def path(self) -> Path:
        """Its place in torch's folder of downloads, whether it is there or not."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name

    def find(self, configured: str | Path | None, setting: str, *, download: bool) -> Path | None:
        """The file to use: the configured one, else the verified one in torch's folder; None if there is none.

        Args:
            configured: the value of the setting; not verified.
            setting: its key, for messages.
            download: download a missing file to torch's folder. Call it from one process at a time.
        Raises:
            UserError: the configured file does not exist; the file in torch's folder is another one, or damaged.
            FetchError: the download failed.
        """
        if configured is not None:
            path = Path(configured)
            if not path.is_file():
                found = "a folder" if path.is_dir() else "no such file"
                raise UserError(
                    f"{setting}: {configured}: {found}; get {self.name} from {self.url}, or set {setting} to null"
                )
            return path
        if self.path.exists():
            self.verify(self.path, f"remove it and download it again, from {self.url} or with --download")
        elif download:
            self._download(setting)
        else:
            return None
        return self.path

    def verify(self, path: Path, way_out: str) -> None:
        """Compare the digest of a file.

        Raises:
            UserError: it is another file, or a damaged one.
        """
        digest = file_sha256(path)
        if not digest.startswith(self.sha256):
            raise UserError(
                f"{path}: sha256 is {digest}, expected {self.sha256} of {self.name}: damaged or another file; {way_out}"
            )

    def _download(self, setting: str) -> None:
        """Download the file. It gets its name once it is verified, since other programs use it as well."""
        folder = self.path.parent
        say(f"downloading {self.url} ({self.size}) to {folder}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be created ({error.strerror}): set TORCH_HOME to a writable folder, or {setting} to "
                f"a copy of {self.name}"
            ) from error
        unverified = self.path.with_name(f"unchecked-{self.name}")
        way_out = f"or copy {self.name} to this machine and set {setting} to its path"
        fetch(self.url, unverified, most=MOST_BYTES, way_out=way_out)
        try:
            self.verify(unverified, f"get {self.name} elsewhere and set {setting} to its path")
        except UserError:
            unverified.unlink()
            raise
        unverified.replace(self.path)


VGG16 = PublicFile(
    name="vgg16-397923af.pth",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af",
    size="528 MB",
)
I3D = PublicFile(
    name="i3d_torchscript.pt",
    url="https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
    sha256="bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    size="50 MB",
)
ST_LPIPS_PACKAGE = "stlpips_pytorch"
ST_LPIPS_FILE = "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth"
ST_LPIPS_SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
# Why there is no ST-LPIPS or LPIPS, and the ways out.
NO_ST_LPIPS = "the package with its weights is not installed: pip install stlpips_pytorch==0.0.2"
NO_VGG16 = f"no weights of VGG16: set {VGG_SETTING}, or download them with --download"


def load_lpips(vgg_weights: str | Path | None, device: torch.device, *, download: bool) -> LPIPS | None:
    """LPIPS on a device; None where the weights of VGG16 are missing.

    Args:
        vgg_weights: torchvision's file of VGG16, the value of `autoencoder.training.vgg_weights`; None: look into
            torch's folder of downloads.
        download: download a missing file to that folder. Call it from one process at a time.
    Raises:
        UserError: the file does not exist, is damaged, holds pickled objects, or is of another network.
        FetchError: the download failed.
    """
    path = VGG16.find(vgg_weights, VGG_SETTING, download=download)
    if path is None:
        return None
    if vgg_weights is not None and path.name == VGG16.name:
        VGG16.verify(path, f"download it again from {VGG16.url}")
    try:
        state = load_pickle(path)
    except OSError as error:
        raise UserError(f"{VGG_SETTING}: {path} cannot be read: {error.strerror or error}") from error
    if not is_state_dict(state):
        raise UserError(f"{VGG_SETTING}: {path}: expected a dictionary of tensors, as in torchvision's {VGG16.name}")
    try:
        model = LPIPS(state)
    except ValueError as error:
        raise UserError(f"{path}: {error}: use torchvision's {VGG16.name} ({VGG16.url})") from None
    if (broken := not_finite(model)) is not None:
        raise UserError(f"{path}: {broken} has NaN or inf: use torchvision's {VGG16.name} ({VGG16.url})")
    return model.to(device).to(memory_format=image_memory_format(device))


def find_st_lpips() -> Path | None:
    """The weights of ST-LPIPS in the installed package, whose code is not imported; None: it is not installed."""
    try:
        return Path(str(importlib.metadata.distribution(ST_LPIPS_PACKAGE).locate_file(ST_LPIPS_FILE)))
    except importlib.metadata.PackageNotFoundError:
        return None


def load_st_lpips(path: Path, device: torch.device) -> STLPIPS:
    """ST-LPIPS on a device.

    Args:
        path: from `find_st_lpips`.
    Raises:
        UserError: no such file, or another one.
    """
    way_out = "pip install --force-reinstall stlpips_pytorch==0.0.2"
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}: {way_out}") from error
    if digest != ST_LPIPS_SHA256:
        raise UserError(f"{path}: sha256 is {digest}, expected {ST_LPIPS_SHA256}: damaged or another file: {way_out}")
    return STLPIPS(load_pickle(path)).to(device).to(memory_format=torch.channels_last)


class VideoNetwork:
    """A frozen TorchScript network that maps a video to a feature vector, called as the I3D is.

    Attributes:
        network: network(video [b, 3, t, h, w] in [-1, 1], rescale=False, resize=True, return_features=True) -> [b, d];
            the I3D resizes to 224x224 itself, bilinearly.
        sha256: of its file.
        path: of its file.
    """

    def __init__(self, path: str | Path, device: torch.device, setting: str) -> None:
        """Load the network; warn where it is not the public I3D.

        Args:
            path: a TorchScript file.
            setting: the key that names it, for messages.
        Raises:
            UserError: no such file, not a TorchScript file, or weights that are not finite.
        """
        found = I3D.find(path, setting, download=False)
        assert found is not None
        self._setting, self.path, self.sha256 = setting, found, file_sha256(found)
        try:
            with warnings.catch_warnings():
                # Deprecated in favor of torch.export, which cannot read the public file.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(self.path, map_location=device)
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{setting}: {path} is damaged or not a TorchScript file ({reason}): get {I3D.name} from {I3D.url}, or "
                "set it to null"
            ) from None
        if (broken := not_finite(self.network)) is not None:
            raise UserError(
                f"{setting}: {path}: {broken} has NaN or inf: get {I3D.name} from {I3D.url}, or set it to null"
            )
        if self.sha256 != I3D.sha256:
            warn(
                f"{setting}: {path} has sha256 {self.sha256}, the public {I3D.name} has {I3D.sha256}: results are not "
                "comparable with others'"
            )
        self.network.eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)

    def features(self, videos: Tensor) -> Tensor:
        """Features of videos; gradients flow to the videos.

        Args:
            videos: [b, t, 3, h, w] float, about [-1, 1], on the network's device; t >= 10 for the I3D.
        Returns:
            [b, d] float32.
        Raises:
            UserError: the network cannot be called as the I3D, or returns another shape.
        """
        size = f"{videos.shape[1]} frames of {videos.shape[3]}x{videos.shape[4]}"
        failed = f"{self._setting}: {self.path} cannot be applied to videos of {size}"
        way_out = f"use the I3D from {I3D.url}, or set it to null"
        video = rearrange(videos.float(), "b t c h w -> b c t h w")
        try:
            features = self.network(video, rescale=False, resize=True, return_features=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, torch.jit.Error) as error:
            raise UserError(f"{failed} ({str(error).strip().splitlines()[-1]}): {way_out}") from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(videos):
            answer = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"{failed}: it returns {answer}, expected [{len(videos)}, features]: {way_out}")
        return features.float()

    def distance(self, videos: Tensor, truth: Tensor) -> Tensor:
        """Mean squared error between the features of two batches of videos, as a term of a loss.

        Args:
            videos, truth: as for `features`; gradients flow to `videos` only.
        Returns:
            Scalar, mean over batch and features.
        Raises:
            UserError: as `features`; the network passes no gradients.
        """
        with torch.no_grad():
            wanted = self.features(truth)
        features = self.features(videos)
        if videos.requires_grad and not features.requires_grad:
            raise UserError(f"{self._setting}: {self.path} passes no gradients: use the I3D from {I3D.url}")
        return F.mse_loss(features, wanted)
