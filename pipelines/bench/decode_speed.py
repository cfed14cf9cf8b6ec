"""Benchmarks of decoding: frames as they are trained on, against PyAV that decodes the same files and does no more."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np

from pipelines.bench.measurement import Measurement, in_turn
from stage1_autoencoder.videos import open_source
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.source import VideoSource

REPEATS = 6


@dataclass(frozen=True)
class Kind:
    """Videos to decode.

    Attributes:
        noise: standard deviation of what no encoder can predict, in levels; with `options` it sets the bit rate.
        frames: of each video.
        videos: of which are decoded, for each core.
    """

    codec: str
    width: int
    height: int
    frames: int
    videos: int
    image_size: int
    frame_step: int = 1
    noise: float = 2.0
    options: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        step = f", every {self.frame_step}th" if self.frame_step > 1 else ""
        return f"decode {self.codec} {self.width}x{self.height} to {self.image_size}{step}"


KINDS = (
    # KTH: 483 frames a video on average. How long a frame takes to decode, and so the ratio, depends on its bytes.
    Kind("mpeg4", 160, 120, 480, 4, 64, noise=6.0, options={"b": "800000"}),
    Kind("mpeg4", 160, 120, 480, 4, 64, options={"b": "160000"}),
    Kind("h264", 480, 320, 128, 4, 128, frame_step=5),  # CLEVRER, as its preset reads it
    Kind("h264", 480, 320, 128, 4, 128),
    Kind("h264", 1280, 720, 40, 2, 128),
)


def decode_measurements(folder: Path) -> Iterator[Measurement]:
    """Measure on all cores, on videos made in `folder`."""
    cores = len(os.sched_getaffinity(0))
    for number, kind in enumerate(KINDS):
        root = folder / f"decode_{number}"
        paths = write_videos(root / "train", kind, kind.videos * cores)
        yield measure(root, paths, kind, cores)
        shutil.rmtree(root)


def measure(root: Path, paths: list[Path], kind: Kind, cores: int) -> Measurement:
    """One row: the rate at which a source's frames come, in frames that were decoded for them."""
    source = open_source(_dataset(root, kind), root, "train")
    modes = {
        "a thread a video": lambda: bare_in_parallel(paths, cores),
        "threads of the codec": lambda: bare_with_threads(paths),
    }
    ours, *bare = in_turn(lambda: drain(source, cores), *modes.values(), repeats=REPEATS)
    frames, best = kind.frames * len(paths), min(bare)
    mode = list(modes)[bare.index(best)]
    kilobytes = sum(path.stat().st_size for path in paths) / frames / 1e3
    return Measurement(
        f"{kind.words} ({kilobytes:.1f} kB a frame)", frames / ours, "frames/s",
        f"PyAV alone ({mode}): {frames / best:.0f}/s", best / ours, at_least=0.8,
    )  # fmt: skip


def _dataset(root: Path, kind: Kind) -> DatasetConfig:
    return DatasetConfig(
        name="bench",
        source="videos",
        root=str(root),
        image_size=kind.image_size,
        frame_step=kind.frame_step,
        splits={"val": 0.0, "test": 0.0},
    )


def write_videos(folder: Path, kind: Kind, count: int) -> list[Path]:
    """Make one video, and copies of it: a texture that the camera moves over, coarse and fine, and some noise."""
    folder.mkdir(parents=True)
    first = folder / ("00000.avi" if kind.codec == "mpeg4" else "00000.mp4")
    codec = "libx264" if kind.codec == "h264" else kind.codec
    options = kind.options or {"preset": "fast"}
    with av.open(str(first), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = kind.width, kind.height, "yuv420p"
        for picture in _pictures(kind):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    copies = [first.with_stem(f"{number:05d}") for number in range(1, count)]
    return [first, *(Path(shutil.copyfile(first, copy)) for copy in copies)]


def _pictures(kind: Kind) -> Iterator[np.ndarray]:
    generator, h, w = np.random.default_rng(0), kind.height, kind.width
    texture = np.full((2 * h, 2 * w, 3), 120, np.float32)
    for scale, strength in ((4, 12), (16, 30), (64, 50)):
        coarse = generator.standard_normal((2 * h // scale + 1, 2 * w // scale + 1, 3), np.float32)
        texture += strength * coarse.repeat(scale, 0).repeat(scale, 1)[: 2 * h, : 2 * w]
    # Noise of a few frames, again and again at other places: drawing it anew takes longer than encoding.
    noise = kind.noise * generator.standard_normal((2 * h, 2 * w, 3), np.float32)
    for number in range(kind.frames):
        y, x = int(h / 2 * (1 + np.sin(number / 40))), int(w / 2 * (1 + np.cos(number / 50)))
        v, u = generator.integers(0, (h, w))
        yield np.clip(texture[y : y + h, x : x + w] + noise[v : v + h, u : u + w], 10, 245).astype(np.uint8)


def drain(source: VideoSource, threads: int) -> None:
    """Decode, crop and resize all videos, one thread a video."""
    with ThreadPoolExecutor(threads) as pool:
        counts = list(pool.map(lambda index: sum(1 for _ in source.iterate(index)), range(len(source.videos))))
    assert counts == [video.frames for video in source.videos]


def bare_in_parallel(paths: list[Path], threads: int) -> int:
    """Decode all videos and do nothing with them, one thread a video; the number of frames."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda path: _bare(path, threads=1), paths))


def bare_with_threads(paths: list[Path]) -> int:
    """Decode video after video, each with the codec's own threads on all cores; the number of frames."""
    return sum(_bare(path, threads=0) for path in paths)


def _bare(path: Path, threads: int) -> int:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        return sum(1 for _ in container.decode(stream))
