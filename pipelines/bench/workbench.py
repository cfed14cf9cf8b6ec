"""What all benchmarks share: the amount of work, a temporary folder, and timing in turn."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.config import RiverConfig
from pipelines.runtime.context import RunContext


@dataclass(frozen=True)
class VideoKind:
    """Videos to decode.

    Attributes:
        frames: per video.
        copies: videos per core.
        image_size, frame_step: how the data set reads them.
        noise: standard deviation, in gray levels, of noise that no encoder can predict; with `bit_rate` it sets the
            bytes per frame, on which the decoding rate depends.
    """

    codec: str
    width: int
    height: int
    frames: int
    copies: int
    image_size: int
    frame_step: int = 1
    noise: float = 2.0
    bit_rate: int | None = None


@dataclass(frozen=True)
class Workbench:
    """What a benchmark works with. The amounts of work suit a real machine; tests pass small ones.

    Attributes:
        folder: temporary; removed after the benchmarks.
        seconds: that one comparison takes, unless two turns take longer.
        store_bytes: of the store of random latents, which has the configuration's latent shape. The default is the size
            of KTH's training split.
        encoded_seconds: time that the autoencoder needs for the frames of the encoding benchmark.
        rollouts: (clips, evaluations per frame) of the sampling benchmark.
        frames: likewise of the benchmark with decoding.
        videos: what is decoded.
    """

    config: RiverConfig
    run_context: RunContext
    folder: Path
    seconds: float = 6.0
    store_bytes: int = 150_000_000
    encoded_seconds: float = 10.0
    rollouts: tuple[tuple[int, int], ...] = ((1, 8), (64, 1))
    frames: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (1, 4), (1, 8), (64, 1))
    videos: tuple[VideoKind, ...] = (
        VideoKind("mpeg4", 160, 120, 480, 4, 64, noise=6.0, bit_rate=800_000),  # KTH: 4 kB per frame
        VideoKind("h264", 320, 240, 256, 4, 64),
        VideoKind("h264", 480, 320, 128, 4, 128, frame_step=5),  # CLEVRER, as its preset reads it
        VideoKind("h264", 1280, 720, 40, 2, 128),
    )

    @property
    def device(self) -> torch.device:
        return self.run_context.device

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the configuration's latents."""
        return self.config.autoencoder.model.latent_shape(self.config.dataset.frame_size)

    def in_turn(self, *functions: Callable[[], object]) -> list[float]:
        """Measure functions one after another, again and again, so that a disturbance hits all of them.

        At least two turns are made, because the first one warms up.

        Returns:
            The least seconds of each function.
        """
        least = [float("inf")] * len(functions)
        started, turns = time.perf_counter(), 0
        while turns < 2 or time.perf_counter() - started < self.seconds:
            turns += 1
            for number, function in enumerate(functions):
                start = time.perf_counter()
                function()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                least[number] = min(least[number], time.perf_counter() - start)
        return least
