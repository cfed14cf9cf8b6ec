"""Benchmarks of encoding: the whole of it against decoding alone and encoding alone, on videos made for the purpose."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch

from pipelines.bench.measurement import Measurement, in_turn
from pipelines.config import RiverConfig
from pipelines.encoding.chunk_encoder import GPU_ENCODERS
from pipelines.encoding.store_checks import store_metadata
from pipelines.encoding.store_encoder import StoreEncoder
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.context import RunContext
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.frame_encoder import FrameEncoder, exact_kernels
from stage1_autoencoder.videos import open_source, open_splits
from stage1_autoencoder.videos.source import VideoSource
from stage1_autoencoder.views import ViewTransform

VIDEO_FRAMES, WIDTH, HEIGHT = 100, 160, 120  # KTH's size
# So many frames that a measurement takes seconds.
FRAMES = {"cpu": 6000, "cuda": 40_000}


def encode_measurements(config: RiverConfig, run_context: RunContext, folder: Path) -> Iterator[Measurement]:
    """Measure with the configuration's autoencoder, at random weights: speed does not depend on them."""
    device = run_context.device
    torch.manual_seed(0)
    autoencoder = build_autoencoder(config.autoencoder.model).to(device).eval().requires_grad_(False)
    side = config.dataset.image_size
    cores = len(os.sched_getaffinity(0))
    threads = cores if device.type == "cpu" else GPU_ENCODERS
    frames = _affordable_frames(FrameEncoder(autoencoder, device, side), side, threads)
    videos = max(2, frames // VIDEO_FRAMES)
    _write_videos(folder / "videos" / "train", videos)
    dataset = {"name": "bench", "source": "videos", "root": str(folder / "videos"), "splits": {"val": 0.0, "test": 0.0}}
    config = config.model_copy(
        update={
            "dataset": config.dataset.model_copy(update=dataset),
            "paths": config.paths.model_copy(update={"latents": str(folder), "runs": str(folder / "runs")}),
        }
    )
    splits = open_splits(config.dataset, folder)
    checkpoints = CheckpointFolder(folder / "autoencoder")
    state = {"model": config.autoencoder.model.model_dump(mode="json")}
    checkpoints.save(0, {"model": autoencoder.state_dict()}, state)
    metadata = store_metadata(config, autoencoder, splits)
    encoder = StoreEncoder(config, run_context, checkpoints.latest(), autoencoder, splits, metadata)
    source = open_source(config.dataset, folder, "train")

    def whole() -> None:
        encoder.run(overwrite=True)

    whole_seconds, decoding, encoding = in_turn(
        whole,
        lambda: _decode(source, cores),
        lambda: _encode(FrameEncoder(autoencoder, device, side), videos * VIDEO_FRAMES, side, threads),
        repeats=4,
    )
    count = videos * VIDEO_FRAMES
    alone = max(decoding, encoding) if device.type == "cuda" else decoding + encoding
    words = f"decode alone {count / decoding:.0f}/s, encode alone {count / encoding:.0f}/s"
    yield Measurement(
        f"encode {count} frames of {WIDTH}x{HEIGHT} to {side}", count / whole_seconds, "frames/s", words,
        whole_seconds / alone, at_most=1.15,
    )  # fmt: skip


def _affordable_frames(encoder: FrameEncoder, side: int, threads: int) -> int:
    """As many frames as the autoencoder encodes in some ten seconds."""
    few = 4 * threads * encoder.frames
    (seconds,) = in_turn(lambda: _encode(encoder, few, side, threads), repeats=2)
    return int(min(FRAMES[encoder.device.type], 10 * few / seconds))


def _write_videos(folder: Path, count: int) -> None:
    """Videos of a drifting pattern with some noise, MPEG-4 as KTH's are."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    x, y = np.arange(WIDTH)[None, :], np.arange(HEIGHT)[:, None]
    for number in range(count):
        with av.open(str(folder / f"{number:05d}.avi"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            phase = generator.random(2) * 100
            for frame in range(VIDEO_FRAMES):
                picture = 120 + 60 * np.sin((x + phase[0] + frame) / 9) + 40 * np.cos((y + phase[1] - frame) / 7)
                picture = np.repeat(picture[..., None], 3, 2) + generator.integers(0, 8, (HEIGHT, WIDTH, 3))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
            container.mux(stream.encode())


def _decode(source: VideoSource, threads: int) -> None:
    def drain(index: int) -> int:
        return sum(1 for _ in source.iterate(index))

    with ThreadPoolExecutor(threads) as pool:
        assert sum(pool.map(drain, range(len(source.videos)))) == sum(video.frames for video in source.videos)


def _encode(encoder: FrameEncoder, frames: int, side: int, threads: int) -> None:
    before = torch.get_num_threads()
    batch = np.random.default_rng(0).integers(0, 256, (encoder.frames, side, side, 3), np.uint8)
    views = [ViewTransform()] * encoder.frames

    def encode(_: int) -> None:
        encoded = encoder.encode(batch, views)
        encoded.latents.cpu(), encoded.codes.cpu()

    with exact_kernels(), ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(encode, range(-(-frames // encoder.frames))))
    torch.set_num_threads(before)
