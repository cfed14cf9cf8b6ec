"""Benchmarks of videos: decoding, beside PyAV alone, and the command `encode`, beside PyAV and the network alone."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import av
import numpy as np

from pipelines.bench.autoencoder_speed import encode_frames, encoder_threads, random_autoencoder
from pipelines.bench.measurement import Measurement
from pipelines.bench.workbench import VideoKind, Workbench
from pipelines.encoding.store_encoder import StoreEncoder
from pipelines.runtime.checkpoints import CheckpointFolder
from stage1_autoencoder.frame_encoder import FrameEncoder, exact_kernels
from stage1_autoencoder.videos import open_source, open_splits
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.source import VideoSource

# Encoded frames at most: longer measurements say nothing more.
MOST_FRAMES = {"cpu": 6000, "cuda": 40_000}


def decode_measurements(bench: Workbench) -> Iterator[Measurement]:
    """Measure each kind of video on all cores, in decoded frames (with a frame step, not all of them are used)."""
    cores = bench.cores
    for number, kind in enumerate(bench.videos):
        root = bench.folder / f"decode_{number}"
        paths = write_videos(root / "train", kind, kind.copies * cores)
        source = open_source(dataset_of(root, kind.image_size, kind.frame_step), root, "train")
        ours, *bare = bench.in_turn(
            lambda source=source: decode_source(source, cores),
            lambda paths=paths: decode_bare(paths, cores),
            lambda paths=paths: decode_bare(paths, 1),
        )
        frames = kind.frames * len(paths)
        kilobytes = sum(path.stat().st_size for path in paths) / frames / 1e3
        step = f", every {kind.frame_step}th" if kind.frame_step > 1 else ""
        yield Measurement(
            f"decode {kind.codec} {kind.width}x{kind.height} to {kind.image_size}{step}, {kilobytes:.2g} kB/frame",
            frames / ours, "frames/s", f"PyAV alone: {frames / min(bare):.0f} frames/s", min(bare) / ours, at_least=0.8,
        )  # fmt: skip
        shutil.rmtree(root)


def dataset_of(root: Path, image_size: int | list[int], frame_step: int = 1) -> DatasetConfig:
    """All videos of a folder as the training split."""
    return DatasetConfig(
        name="bench",
        source="videos",
        root=str(root),
        image_size=image_size,
        frame_step=frame_step,
        splits={"val": 0.0, "test": 0.0},
    )


def write_videos(folder: Path, kind: VideoKind, count: int) -> list[Path]:
    """Make one video and copies of it: a texture that the camera moves over, and noise."""
    folder.mkdir(parents=True)
    first = folder / ("00000.avi" if kind.codec == "mpeg4" else "00000.mp4")
    options = {"preset": "fast"} if kind.bit_rate is None else {"b": str(kind.bit_rate)}
    with av.open(str(first), "w") as container:
        stream = container.add_stream("libx264" if kind.codec == "h264" else kind.codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = kind.width, kind.height, "yuv420p"
        for picture in _pictures(kind):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    copies = [first.with_stem(f"{number:05d}") for number in range(1, count)]
    return [first, *(Path(shutil.copyfile(first, copy)) for copy in copies)]


def _pictures(kind: VideoKind) -> Iterator[np.ndarray]:
    generator, h, w = np.random.default_rng(0), kind.height, kind.width
    texture = np.full((2 * h, 2 * w, 3), 120, np.float32)
    for scale, strength in ((4, 12), (16, 30), (64, 50)):
        coarse = generator.standard_normal((2 * h // scale + 1, 2 * w // scale + 1, 3), np.float32)
        texture += strength * coarse.repeat(scale, 0).repeat(scale, 1)[: 2 * h, : 2 * w]
    # The same noise at another place in each frame: new noise takes longer than encoding.
    noise = kind.noise * generator.standard_normal((2 * h, 2 * w, 3), np.float32)
    for number in range(kind.frames):
        y, x = int(h / 2 * (1 + np.sin(number / 40))), int(w / 2 * (1 + np.cos(number / 50)))
        v, u = generator.integers(0, (h, w))
        yield np.clip(texture[y : y + h, x : x + w] + noise[v : v + h, u : u + w], 10, 245).astype(np.uint8)


def decode_source(source: VideoSource, threads: int) -> None:
    """Decode, crop and resize all videos, one per thread."""
    with ThreadPoolExecutor(threads) as pool:
        counts = list(pool.map(lambda index: sum(1 for _ in source.iterate(index)), range(len(source.videos))))
    assert counts == [video.frames for video in source.videos]


def decode_bare(paths: list[Path], videos: int) -> int:
    """Decode all frames and discard them; return their number.

    Args:
        videos: decoded at the same time, each by one thread; 1: one after another by the codec's own threads.
    """

    def decode(path: Path) -> int:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = 0 if videos == 1 else 1
            return sum(1 for _ in container.decode(stream))

    with ThreadPoolExecutor(videos) as pool:
        return sum(pool.map(decode, paths))


def encode_measurements(bench: Workbench) -> Iterator[Measurement]:
    """Measure with the configuration's autoencoder, on videos of the first two kinds."""
    for number, kind in enumerate(bench.videos[:2]):
        folder = bench.folder / f"encode_{number}"
        yield _encode_measurement(bench, kind, folder)
        shutil.rmtree(folder)


def _encode_measurement(bench: Workbench, kind: VideoKind, folder: Path) -> Measurement:
    """Compare `encode` to what nothing can spare: PyAV decodes all frames, and the network encodes them."""
    config, device = bench.config, bench.device
    autoencoder, threads, frame_size = random_autoencoder(bench), encoder_threads(bench), config.dataset.frame_size
    frame_encoder = FrameEncoder(autoencoder, device, frame_size, precision=config.cache.precision)
    images = np.random.default_rng(0).integers(0, 256, (threads * frame_encoder.frames, *frame_size, 3), np.uint8)

    def encode(passes: int = 1) -> None:
        with exact_kernels(config.cache.precision):
            for _ in range(passes):
                encode_frames(frame_encoder, images, threads)

    (seconds,) = bench.in_turn(encode)
    affordable = min(bench.encoded_seconds / seconds * len(images), MOST_FRAMES[device.type])
    videos = max(2, int(affordable) // kind.frames)
    frames = videos * kind.frames
    paths = write_videos(folder / "videos" / "train", kind, videos)
    config = config.model_copy(
        update={
            "dataset": dataset_of(folder / "videos", config.dataset.image_size),
            "paths": config.paths.model_copy(update={"latents": str(folder), "runs": str(folder / "runs")}),
            "cache": config.cache.model_copy(update={"views": ("identity",), "compile": False}),
        }
    )
    splits = open_splits(config.dataset, folder)
    checkpoints = CheckpointFolder(folder / "autoencoder")
    state = {"model": config.autoencoder.model.model_dump(mode="json")}
    checkpoints.save(0, {"model": autoencoder.state_dict()}, state)
    run_context = replace(bench.run_context, overwrite=True)
    store_encoder = StoreEncoder(config, run_context, checkpoints.latest(), autoencoder, splits)
    whole, bare, decoding, network = bench.in_turn(
        store_encoder.run,
        lambda: decode_bare(paths, bench.cores),
        lambda: decode_source(splits["train"], bench.cores),
        lambda: encode(-(-frames // len(images))),
    )
    # Decoding and encoding share a CPU's cores; a GPU encodes while the CPU decodes.
    least = max(bare, network) if device.type == "cuda" else bare + network
    height, width = frame_size
    return Measurement(
        f"encode {frames} frames of {kind.codec} {kind.width}x{kind.height} to {width}x{height}", frames / whole,
        "frames/s", f"PyAV alone: {frames / bare:.0f}/s, with crop and resize {frames / decoding:.0f}/s; network alone "
        f"{frames / network:.0f}/s", least / whole, at_least=0.8,
    )  # fmt: skip
