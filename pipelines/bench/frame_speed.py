"""Benchmark of whole predicted frames, one after another: rate, latency, and where the time goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Literal

import numpy as np
import torch

from pipelines.bench.autoencoder_speed import random_autoencoder
from pipelines.bench.measurement import Measurement
from pipelines.bench.workbench import Workbench
from pipelines.prediction.rollouts import FieldRollouts
from pipelines.predictor import VideoPredictor, choose_threads
from pipelines.runtime.context import computing_in
from pipelines.runtime.throughput import counted_flops, forward_flops, matmul_rate
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.fast_decoder import FastDecoder
from stage2_flow.conditioning import draw_frames
from stage2_flow.config import SamplingConfig
from stage2_flow.standardization import Standardization
from stage2_flow.vector_field import VectorField

# Frames that are given, and from which conditions are drawn.
GIVEN, PAST = 2, 16
# Frames before those that are measured, which pack weights or record graphs; and frames that are measured at least.
WARM_UP_FRAMES, LEAST_FRAMES = {"cpu": 1, "cuda": 5}, 2


def frame_measurements(bench: Workbench) -> Iterator[Measurement]:
    """Measure endless Euler rollouts with decoding, at the configuration's sizes, from random weights."""
    device, channels = bench.device, bench.latent_shape[0]
    predictor = VideoPredictor(
        autoencoder=random_autoencoder(bench),  # sets the seed
        vector_field=VectorField(bench.config.flow.model, channels).to(device).eval().requires_grad_(False),
        standardization=Standardization.identity(channels).to(device),
        sampling=SamplingConfig(),
        fps=25.0,
        device=device,
        trained_grid=bench.latent_shape[1:],
        fast_decoder=_fast_decoder(bench).to(device, memory_format=torch.channels_last),
    )
    for clips, nfe in bench.frames:
        choose_threads(predictor, bench.run_context, clips)
        with computing_in("fp32", device, predictor.threads):
            rate = matmul_rate(device)
        for decoder in ("full", "fast"):
            yield _measured(bench, predictor, clips, nfe, decoder, rate)


def _fast_decoder(bench: Workbench) -> FastDecoder:
    return FastDecoder(bench.config.decoder.model, bench.config.autoencoder.model).eval().requires_grad_(False)


def _measured(
    bench: Workbench, predictor: VideoPredictor, clips: int, nfe: int, decoder: Literal["full", "fast"], rate: float
) -> Measurement:
    """A row: frames per second, compared to those at the rate of large matrix products, without all other work."""
    device, shape = bench.device, bench.latent_shape
    options = SamplingConfig(solver="euler", nfe=nfe, past_horizon=PAST, compile=False, decoder=decoder)
    images = torch.zeros(clips, GIVEN, 3, *bench.config.dataset.frame_size, device=device)
    context = predictor.encode_videos(images)
    latents_of_clips = torch.cat([context, context[:, :1]], 1)
    draws = draw_frames(0, [(row, 0) for row in range(clips)], nfe, GIVEN, shape, PAST)
    rollouts = FieldRollouts(predictor.vector_field, device, predictor.threads)
    with (
        closing(predictor.stream(images, sampling=options)) as frames,
        closing(rollouts.stream(context, options, draws)) as latents,
    ):
        parts = (
            lambda: next(frames),
            lambda: next(latents),
            lambda: predictor.decode_predictions(latents_of_clips, images, sampling=options),
        )
        for _ in range(WARM_UP_FRAMES[device.type]):
            for part in parts:
                _seconds(part, device)
        seconds, started = [], time.perf_counter()
        while len(seconds) < LEAST_FRAMES or time.perf_counter() - started < bench.seconds / 2:
            seconds.append([_seconds(part, device) for part in parts])

    def decode() -> None:
        autoencoder = build_autoencoder(bench.config.autoencoder.model).eval()
        network = _fast_decoder(bench) if decoder == "fast" else autoencoder.decode_quantized
        network(torch.empty(1, *shape))

    frame, field, decoding = np.median(seconds, axis=0)
    late = np.percentile([whole for whole, _, _ in seconds], 95)
    flops = nfe * forward_flops(bench.config.flow.model, shape) + counted_flops(decode)
    allowed = rate / flops
    return Measurement(
        f"frames: {clips} clip{'s' if clips > 1 else ''}, {nfe} NFE, {decoder} decoder", clips / frame, "frames/s",
        f"{frame * 1e3:.3g} ms, 95 % below {late * 1e3:.3g} ms; field {field / frame:.0%}, decoder "
        f"{decoding / frame:.0%}, rest {max(0.0, 1 - (field + decoding) / frame):.0%}; {rate / 1e9:.0f} GFLOP/s allow "
        f"{allowed:.3g}/s",
        clips / frame / allowed,
    )  # fmt: skip


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
