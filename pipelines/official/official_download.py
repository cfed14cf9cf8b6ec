"""Fetching the weights that the authors of RIVER have on the public hub, when the user says --download."""

from pathlib import Path

from pipelines.config import RiverConfig
from pipelines.data.fetch import FetchError, announced_size, fetch
from pipelines.errors import UserError
from pipelines.official.weight_files import foreign_content
from pipelines.runtime.files import size_text
from pipelines.runtime.progress import say

HUB = "https://huggingface.co/cvg-unibe"
MODEL = "model.pth"
# By data set: the repository, and its autoencoder's file.
RELEASED = {
    "kth": ("river_kth_64", "vqvae.ckpt"),
    "bair_64": ("river_bair_64", "vqvae.ckpt"),
    "bair_256": ("river_bair_256", "vqvae.ckpt"),
    "clevrer": ("river_clevrer_128", "vqvae.pth"),
}


def download_model(config: RiverConfig) -> Path:
    """The main model of the configuration's data set; see `download`."""
    return download(config, _released(config)[0], MODEL)


def download_autoencoder(config: RiverConfig) -> Path:
    """The autoencoder of the configuration's data set; see `download`."""
    return download(config, *_released(config))


def download(config: RiverConfig, repository: str, name: str) -> Path:
    """A file of the hub, in `<data>/<dataset>/official/`; one that is there already is taken.

    Raises:
        FetchError: it cannot be fetched, and what has arrived is gone on from by the next call; something else than a
            checkpoint has arrived, and is removed.
    """
    folder = config.data_root / config.dataset.name / "official"
    target = folder / name
    way_out = f"get it by other means and name it with --{_option(name)} <file>"
    if target.is_file() and foreign_content(target) is None:
        say(f"import-official: {target} is there already ({size_text(target.stat().st_size)})")
        return target
    url = f"{HUB}/{repository}/resolve/main/{name}"
    folder.mkdir(parents=True, exist_ok=True)
    expected = announced_size(url)
    say(f"import-official: fetching {url}{f' ({size_text(expected)})' if expected else ''} -> {target}")
    fetch(url, target, way_out=way_out)
    other = foreign_content(target)
    if other is not None:
        target.unlink()  # or the next call would take it for the file
        raise FetchError(f"{url}: what came is {other} and no checkpoint: {way_out}")
    say(f"import-official: fetched {size_text(target.stat().st_size)}")
    return target


def _released(config: RiverConfig) -> tuple[str, str]:
    name = config.dataset.name
    if name not in RELEASED:
        raise UserError(
            f"--download: there are released weights for the data sets {', '.join(RELEASED)}, not for {name!r}: fetch "
            f"them with one of their configurations, and name them here, such as --model "
            f"{config.data_root}/{next(iter(RELEASED))}/official/{MODEL}"
        )
    return RELEASED[name]


def _option(name: str) -> str:
    return "model" if name == MODEL else "autoencoder"
