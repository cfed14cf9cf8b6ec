"""The public Python API: predict videos with a trained run, and read stores of latents.

`import river_two_stage` is quick: each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipelines import __version__

if TYPE_CHECKING:
    from latent_cache import open as open_store
    from latent_cache import torch_dataset
    from pipelines.predictor import VideoPredictor, to_video

__all__ = ["VideoPredictor", "__version__", "open_store", "to_video", "torch_dataset"]

# Name -> its module, and its name there.
_PLACES = {
    "VideoPredictor": ("pipelines.predictor", "VideoPredictor"),
    "to_video": ("pipelines.predictor", "to_video"),
    "open_store": ("latent_cache", "open"),
    "torch_dataset": ("latent_cache", "torch_dataset"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, name_there = _PLACES[name]
    return getattr(import_module(module), name_there)


def __dir__() -> list[str]:
    return __all__
