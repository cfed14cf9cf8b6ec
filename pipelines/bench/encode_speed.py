"""Benchmark of the command `encode`: the whole of it, compared to decoding alone and encoding alone."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pipelines.bench.autoencoder_speed import encode_frames, encoder_threads, random_autoencoder
from pipelines.bench.decode_speed import dataset_of, decode_source, write_videos
from pipelines.bench.measurement import Measurement
from pipelines.bench.workbench import Workbench
from pipelines.encoding.store_encoder import StoreEncoder
from pipelines.runtime.checkpoints import CheckpointFolder
from stage1_autoencoder.frame_encoder import FrameEncoder, exact_kernels
from stage1_autoencoder.videos import open_splits

# Longer measurements say nothing more.
MOST_FRAMES = {"cpu": 6000, "cuda": 40_000}


def encode_measurements(bench: Workbench) -> Iterator[Measurement]:
    """Measure with the configuration's autoencoder, on videos of the first kind (the default: KTH's)."""
    config, device, folder, kind = bench.config, bench.device, bench.folder / "encode", bench.sizes.videos[0]
    autoencoder, threads, side = random_autoencoder(bench), encoder_threads(bench), config.dataset.image_size
    frame_encoder = FrameEncoder(autoencoder, device, side, precision=config.cache.precision)
    images = np.random.default_rng(0).integers(0, 256, (threads * frame_encoder.frames, side, side, 3), np.uint8)

    def encode(passes: int = 1) -> None:
        with exact_kernels(config.cache.precision):
            for _ in range(passes):
                encode_frames(frame_encoder, images, threads)

    (seconds,) = bench.in_turn(encode)
    affordable = min(bench.sizes.encoded_seconds / seconds * len(images), MOST_FRAMES[device.type])
    videos = max(2, int(affordable) // kind.frames)
    frames = videos * kind.frames
    write_videos(folder / "videos" / "train", kind, videos)
    config = config.model_copy(
        update={
            "dataset": dataset_of(folder / "videos", kind).model_copy(update={"image_size": side, "frame_step": 1}),
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
    whole, decoding, encoding = bench.in_turn(
        store_encoder.run,
        lambda: decode_source(splits["train"], bench.cores),
        lambda: encode(-(-frames // len(images))),
    )
    # Decoding and encoding share a CPU's cores; a GPU encodes while the CPU decodes.
    alone = max(decoding, encoding) if device.type == "cuda" else decoding + encoding
    yield Measurement(
        f"encode {frames} frames of {kind.width}x{kind.height} to {side}", frames / whole, "frames/s",
        f"decode alone {frames / decoding:.0f}/s, encode alone {frames / encoding:.0f}/s", whole / alone, at_most=1.15,
    )  # fmt: skip
