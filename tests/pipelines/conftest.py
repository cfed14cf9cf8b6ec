"""Encoding at its smallest: videos of noise that count how they are read, a random autoencoder, and all between."""

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from latent_cache import ChunkWriter
from pipelines.config import RiverConfig, parse_config
from pipelines.encoding.store_encoder import SplitSummary, StoreEncoder
from pipelines.runtime.checkpoints import Checkpoint
from pipelines.runtime.context import RunContext
from stage1_autoencoder.config import VQGANConfig
from stage1_autoencoder.frame_encoder import PASS_PIXELS
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.source import BrokenVideoError, VideoInfo, VideoSource
from stage1_autoencoder.vqgan import VQGAN

SIDE = 16
MODEL = {
    "channels": 8,
    "channel_multipliers": [1, 2, 2],
    "blocks": 1,
    "decoder_blocks": 1,
    "attention_resolutions": [],
    "codes": 64,
    "norm_groups": 4,
}


class NoiseSource(VideoSource):
    """Videos whose frames are functions of (content of the video, frame number).

    Attributes:
        content: by id, what a video shows; its id unless said otherwise.
        seconds: by id, how long a frame takes to decode.
        ends: by id, the frame at which decoding fails.
        passes: (id, start, stop) of each decoding that was begun.
    """

    def __init__(self, lengths: Mapping[str, int], **content: str) -> None:
        self.dataset = DatasetConfig(name="noise", source="videos", image_size=SIDE)
        self.content = {video: content.get(video, video) for video in lengths}
        self.videos = [VideoInfo(name, frames, 10.0, f"of {self.content[name]}") for name, frames in lengths.items()]
        self.skipped = []
        self.seconds: dict[str, float] = {}
        self.ends: dict[str, int] = {}
        self.passes: list[tuple[str, int, int]] = []
        self.lock = threading.Lock()

    def iterate(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        start, stop = self.check_range(index, start, stop)
        video = self.videos[index].id
        with self.lock:
            self.passes.append((video, start, stop))
        for number in range(start, stop):
            time.sleep(self.seconds.get(video, 0))
            if number >= self.ends.get(video, stop):
                raise BrokenVideoError(video, f"frame {number} is noise")
            yield self.frame(video, number)

    def frame(self, video: str, number: int) -> np.ndarray:
        """[SIDE, SIDE, 3] uint8: blocks of 4 pixels, so that frames survive the autoencoder in part."""
        generator = np.random.default_rng([*self.content[video].encode(), number])
        blocks = generator.integers(0, 256, (SIDE // 4, SIDE // 4, 3), dtype=np.uint8)
        return blocks.repeat(4, axis=0).repeat(4, axis=1)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.Lock())


def random_autoencoder() -> VQGAN:
    """Random weights, and a codebook that is spread as the latents are, so that many codes are used."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VQGAN(VQGANConfig(**MODEL)).eval().requires_grad_(False)
        images = torch.rand(16, 3, SIDE, SIDE) * 2 - 1
        latents = model.encode(images)
        spread = latents.std((0, 2, 3)) * torch.randn(MODEL["codes"], 4) + latents.mean((0, 2, 3))
        model.quantizer.embedding.weight.copy_(spread)
    return model


@dataclass
class EncodingKit:
    """Encodes sources of noise into a store.

    Attributes:
        store: where it is.
        splits: what is encoded.
        added: which of these videos are appended to the complete store.
    """

    folder: Path
    splits: dict[str, NoiseSource] = field(
        default_factory=lambda: {
            "train": NoiseSource({"a": 7, "b": 13, "c": 1, "d": 22, "e": 5}),
            "val": NoiseSource({"v": 9, "w": 4}),
        }
    )
    model: VQGAN = field(default_factory=random_autoencoder)
    run_context: RunContext = field(default_factory=lambda: RunContext(torch.device("cpu")))
    added: dict[str, set[str]] = field(default_factory=dict)
    Source = NoiseSource

    def config(self, **cache: Any) -> RiverConfig:
        """The configuration; `cache` has settings of the store."""
        return parse_config(
            {
                "paths": {name: str(self.folder / name) for name in ("data", "latents", "runs")},
                "dataset": {"name": "noise", "source": "videos", "image_size": SIDE},
                "autoencoder": {"model": MODEL},
                "cache": {"chunk_frames": 10} | cache,
            },
            "a test",
        )

    @property
    def store(self) -> Path:
        return self.config().store_path

    def encoder(self, overwrite: bool = False, **cache: Any) -> StoreEncoder:
        """The encoder of the store; `cache` has its settings."""
        checkpoint = Checkpoint(self.folder / "none", {"step": 0})
        context = replace(self.run_context, overwrite=overwrite)
        return StoreEncoder(self.config(**cache), context, checkpoint, self.model, self.splits, self.added)

    def encode(self, overwrite: bool = False, **cache: Any) -> dict[str, SplitSummary]:
        """Encode what is pending; the summaries by split."""
        return {summary.split: summary for summary in self.encoder(overwrite, **cache).run()}

    def interrupt(self, after: int, **cache: Any) -> None:
        """Encode until `after` chunks are written, then fail."""
        write, calls, lock = ChunkWriter.write, [], threading.Lock()

        def fails(*arguments: Any) -> Any:
            with lock:
                calls.append(arguments)
                if len(calls) > after:
                    raise OSError(5, "Input/output error")
            return write(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ChunkWriter, "write", fails)
            with pytest.raises(OSError, match="Input/output error"):
                self.encode(**cache)

    def files(self) -> dict[str, bytes]:
        """All files of the store."""
        files = sorted(file for file in self.store.rglob("*") if file.is_file())
        return {str(file.relative_to(self.store)): file.read_bytes() for file in files}

    def another(self, name: str) -> "EncodingKit":
        """The same videos and autoencoder, another folder."""
        return EncodingKit(self.folder / name, self.splits, self.model, self.run_context)


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncodingKit:
    monkeypatch.setattr("pipelines.encoding.store_encoder.PSNR_STRIDE", 8)
    set_network_batch(monkeypatch, 8)
    return EncodingKit(tmp_path / "kit")


def set_network_batch(monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    """How many frames of the kit the network sees at once."""
    monkeypatch.setitem(PASS_PIXELS, "cpu", frames * SIDE**2)


@pytest.fixture
def network_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set how many frames of the kit the network sees at once."""
    return lambda frames: set_network_batch(monkeypatch, frames)


@pytest.fixture(scope="session")
def story() -> ModuleType:
    """What the end-to-end tests have in their conftest: places, runs of the command line, videos."""
    file = Path(__file__).parents[1] / "end_to_end" / "conftest.py"
    specification = importlib.util.spec_from_file_location("story_of_pipelines", file)
    module = importlib.util.module_from_spec(specification)
    sys.modules["story_of_pipelines"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module
