"""Where the weights of LPIPS come from: a path, torch's own folder of downloads, or the network where allowed."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipelines.data.fetch import fetch
from pipelines.errors import UserError
from pipelines.official import load_pickle
from pipelines.runtime.context import image_memory_format
from pipelines.runtime.progress import say
from stage1_autoencoder.lpips import LPIPS

VGG_FILE = "vgg16-397923af.pth"
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
SETTING = "autoencoder.training.vgg_weights"
# torch's downloads carry the beginning of their sha256 in their names.
_PROMISE = re.compile(r"-([0-9a-f]{8,64})\.pth$")


def load_lpips(
    vgg_weights: str | Path | None, device: torch.device, *, download: bool, heads: str | Path | None = None
) -> LPIPS | None:
    """LPIPS on a device, or None where the weights of VGG16 are not on this machine: the caller then says
    `missing_weights_message` and does without.

    Args:
        vgg_weights: torchvision's file of VGG16, from `autoencoder.training.vgg_weights`; None: look into torch's
            folder of downloads.
        download: fetch what is not there, into that folder. To be called by one process at a time.
        heads: LPIPS's own `vgg.pth`, in place of the shipped heads, which are the same.
    Raises:
        UserError: a path that names no file; a file that is not what its name promises, is damaged, holds pickled
            objects, or is of another network.
        FetchError: the download fails.
    """
    path = _find(vgg_weights, download)
    if path is None:
        return None
    trunk = _read(path, SETTING)
    try:
        model = LPIPS(trunk)
    except ValueError as error:
        raise UserError(f"{path}: {error}: take torchvision's {VGG_FILE} ({VGG_URL})") from None
    if heads is not None:
        try:
            model = LPIPS(trunk, _read(_existing(heads, "the heads of LPIPS"), "the heads of LPIPS"))
        except ValueError as error:
            raise UserError(f"{heads}: {error}: take LPIPS's weights/v0.1/vgg.pth, or the shipped heads") from None
    return model.to(device).to(memory_format=image_memory_format(device))


def missing_weights_message(instead: str = "going on as with autoencoder.training.perceptual: none") -> str:
    """The one warning of a caller whom `load_lpips` gave None.

    Args:
        instead: what the caller does now.
    """
    return (
        f"the weights of VGG16, which LPIPS needs, are not on this machine: {SETTING} is not set, and there is no "
        f"{download_path()}; {instead}. Either set {SETTING} to a copy of {VGG_FILE}, or allow fetching it (528 MB) "
        "with --download"
    )


def download_path() -> Path:
    """Where torch keeps its copy, if it has one."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE


def _find(vgg_weights: str | Path | None, download: bool) -> Path | None:
    if vgg_weights is not None:
        return _existing(vgg_weights, SETTING)
    path = download_path()
    if not path.exists() and download:
        _download(path)
    return path if path.exists() else None


def _existing(given: str | Path, what: str) -> Path:
    path = Path(given).expanduser()
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{what}: {given}: {found}; correct the path, or leave it out")
    return path


def _download(target: Path) -> None:
    """Fetch the file; it gets its name once its content is what the name promises: other programs trust it."""
    say(f"fetching {VGG_URL} (528 MB) to {target.parent}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{target.parent}: cannot be made ({error.strerror}): set TORCH_HOME to a folder that can be written, or "
            f"{SETTING} to a copy of {VGG_FILE}"
        ) from error
    unchecked = target.with_name(f"unchecked-{target.name}")
    fetch(VGG_URL, unchecked, way_out=f"or copy {VGG_FILE} to this machine and set {SETTING} to its path")
    try:
        check_promise(unchecked)
    except UserError:
        unchecked.unlink()
        raise
    os.replace(unchecked, target)


def check_promise(path: Path) -> None:
    """Hold a file to the beginning of its sha256 where its name has one, as vgg16-397923af.pth does.

    Raises:
        UserError: it is another file, or a damaged one.
    """
    promise = _PROMISE.search(path.name)
    if promise is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(promise[1]):
        raise UserError(
            f"{path}: its sha256 begins with {digest[: len(promise[1])]}, and its name promises {promise[1]}: damaged, "
            f"or another file. Remove it and get it again, from {VGG_URL} or with --download"
        )


def _read(path: Path, what: str) -> Mapping[str, Tensor]:
    """The tensors of a file, once it was held to its name; nothing in it is run."""
    try:
        check_promise(path)
        state = load_pickle(path)
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read: {error.strerror or error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{what}: {path} is no dictionary of tensors: take the file as it was published")
    return state
