"""The benchmark: all of it in a tiny size, that both sides of each ratio do equal work, and its file."""

import itertools
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import nn

from latent_cache import FlowBatch
from pipelines.bench.autoencoder_speed import PLAIN_BATCH, autoencoder_measurements, encoder_threads, plain_twin
from pipelines.bench.benchmark import run_benchmark
from pipelines.bench.flow_speed import of_pytorch_layers, sampling_measurements
from pipelines.bench.measurement import Benchmark, Measurement
from pipelines.bench.video_speed import (
    dataset_of,
    decode_bare,
    decode_measurements,
    decode_source,
    encode_measurements,
    write_videos,
)
from pipelines.bench.workbench import VideoKind, Workbench
from pipelines.config import RiverConfig, parse_config
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import read_json
from stage1_autoencoder.config import VQGANConfig
from stage1_autoencoder.frame_encoder import EncodedFrames, FrameEncoder
from stage1_autoencoder.videos import open_source
from stage1_autoencoder.views import ViewTransform
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.config import VectorFieldConfig
from stage2_flow.loss import draw_flow, flow_matching_loss
from stage2_flow.vector_field import TransformerBlock, VectorField

CPU = torch.device("cpu")
SIDE = 16
FRAME_SIZE = (SIDE, 2 * SIDE)
AUTOENCODER = {
    "channels": 8, "channel_multipliers": [1, 2, 2], "blocks": 1, "attention_resolutions": [4], "resolution": 16,
    "codes": 64, "norm_groups": 4,
}  # fmt: skip
VIDEO = VideoKind("mpeg4", 64, 48, frames=20, copies=2, image_size=SIDE, frame_step=3, bit_rate=400_000)
TINY = {
    "seconds": 0, "store_bytes": 400_000, "encoded_seconds": 0, "rollouts": ((1, 2), (3, 1)), "frames": ((2, 1),),
    "videos": (VIDEO,),
}  # fmt: skip


def config_of(runs: Path, autoencoder: dict[str, object] = AUTOENCODER) -> RiverConfig:
    values = {
        "paths": {"runs": str(runs)},
        "dataset": {"name": "none", "source": "videos", "image_size": list(FRAME_SIZE)},
        "autoencoder": {"model": autoencoder},
        "flow": {
            "model": {"width": 16, "depth": 1, "mid_depth": 0, "heads": 2},
            "training": {"clip_frames": 10, "batch_size": 8},
        },
    }
    return parse_config(values, "a test")


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(config_of(tmp_path), RunContext(CPU), tmp_path, **TINY)


def test_everything_is_measured_and_written(tmp_path):
    config = config_of(tmp_path / "runs")
    benchmark = run_benchmark(config, RunContext(CPU), **TINY)
    rows = benchmark.measurements
    assert [row.name.partition(":")[0].split()[0] for row in rows] == [
        "load", *["flow"] * 4, *["sampling"] * 2, *["frames"] * 2, *["autoencoder"] * 3, "decode", "encode",
    ]  # fmt: skip
    for row in rows:
        assert 0 < row.value < math.inf, row
        assert 0 < row.ratio < math.inf, row
        assert row.reference
        assert row.name in row.line()
    assert read_json(config.run_path / "benchmark.json", Benchmark, "way out") == benchmark
    assert str(len(os.sched_getaffinity(0))) in benchmark.hardware


@pytest.mark.parametrize(
    ("row", "reached"),
    [
        (Measurement("a", 1.0, "ms"), None),
        (Measurement("a", 1.0, "ms", "b", 0.5, at_least=0.5), True),
        (Measurement("a", 1.0, "ms", "b", 0.5, at_least=0.6), False),
        (Measurement("a", 1.0, "ms", "b", 0.5, at_most=0.5), True),
        (Measurement("a", 1.0, "ms", "b", 0.5, at_most=0.4), False),
    ],
)
def test_a_required_range(row, reached, tmp_path):
    assert row.reached is reached
    assert ("NOT REACHED" in row.line()) == (reached is False)
    benchmark = Benchmark(date="2026-01-02", hardware="2 cores", software={"torch": "2"}, measurements=[row])
    assert Benchmark.model_validate_json(benchmark.model_dump_json()) == benchmark


def test_in_turn_alternates_until_the_time_is_up(bench, monkeypatch):
    now, calls = 0.0, []

    def takes(name: str, *seconds: float) -> Callable[[], None]:
        turns = iter(seconds)

        def run() -> None:
            nonlocal now
            calls.append(name)
            now += next(turns)

        return run

    monkeypatch.setattr("time.perf_counter", lambda: now)
    least = replace(bench, seconds=15.0).in_turn(takes("a", 4, 4, 6), takes("b", 2, 2, 2))
    assert calls == ["a", "b"] * 3  # 6, 6 and 8 seconds: the first two turns are not enough
    assert least == [4.0, 2.0]
    calls.clear()
    assert bench.in_turn(takes("a", 5, 4)) == [4.0]
    assert calls == ["a", "a"]  # the first one warms up


def test_the_plain_autoencoder_computes_the_same():
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(**AUTOENCODER)).double().eval().requires_grad_(False)
    images = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = model.encode(images)
    plain = plain_twin(model)
    torch.testing.assert_close(plain.encode(images), latents, rtol=0, atol=1e-10)
    torch.testing.assert_close(plain.decode(latents), model.decode(latents), rtol=0, atol=1e-10)
    blocks = {type(module).__name__ for module in plain.modules()}
    assert {"PlainBlock", "PlainAttention"} < blocks
    assert not {"ResnetBlock", "AttnBlock"} & blocks


def test_both_autoencoders_encode_and_decode_equally_many_frames(bench, monkeypatch):
    frames = {"encode": {}, "decode": {}}  # by network

    def count(name: str) -> None:
        function, counts = getattr(VQGAN, name), frames[name]

        def counted(network: VQGAN, batch: torch.Tensor) -> torch.Tensor:
            counts[network] = counts.get(network, 0) + len(batch)
            return function(network, batch)

        monkeypatch.setattr(VQGAN, name, counted)

    count("encode"), count("decode")
    assert len(list(autoencoder_measurements(bench))) == 3
    # In whole batches, because half a batch takes as long, and equally many per thread.
    size = FrameEncoder(VQGAN(VQGANConfig(**AUTOENCODER)), CPU, FRAME_SIZE).frames * encoder_threads(bench)
    both = 2 * math.lcm(size, PLAIN_BATCH["cpu"])  # two turns
    # Ours has one network per precision, the plain one encodes in both.
    assert sorted(frames["encode"].values()) == [both, both, 2 * both]
    assert sorted(frames["decode"].values()) == [both, both]


def test_encode_is_compared_at_equal_work(bench, monkeypatch):
    frames: dict[FrameEncoder, int] = {}
    encode = FrameEncoder.encode

    def counted(encoder: FrameEncoder, images: np.ndarray, views: list[ViewTransform]) -> EncodedFrames:
        frames[encoder] = frames.get(encoder, 0) + len(images)
        return encode(encoder, images, views)

    monkeypatch.setattr(FrameEncoder, "encode", counted)
    monkeypatch.setattr("pipelines.bench.workbench.time.perf_counter", itertools.count().__next__)
    (row,) = encode_measurements(bench)
    count = int(re.search(r"encode (\d+) frames", row.name).group(1))
    alone, *whole = frames.values()
    at_once = next(iter(frames)).frames * encoder_threads(bench)
    assert count == 2 * VIDEO.frames
    assert sum(whole) == 2 * count  # two turns
    assert alone == 2 * at_once + 2 * at_once * -(-count // at_once)  # to find out the rate, then the same frames
    # Every measurement took one tick: the whole as long as PyAV alone, and as the network alone.
    assert row.value == count
    assert row.ratio == 2.0


def test_encode_is_measured_for_two_kinds_of_videos(bench):
    other = replace(VIDEO, width=80, height=60)
    rows = list(encode_measurements(replace(bench, videos=(VIDEO, other, VIDEO))))
    assert ["64x48" in row.name for row in rows] == [True, False]
    assert ["80x60" in row.name for row in rows] == [False, True]


def test_no_plain_twin_of_another_family(tmp_path):
    family = {"architecture": "vqvae", "channels": 8, "norm_groups": 4}
    bench = Workbench(config_of(tmp_path, family), RunContext(CPU), tmp_path, **TINY)
    assert list(autoencoder_measurements(bench)) == []


@pytest.mark.parametrize("head", ["ln", "bn"])
def test_pytorchs_layers_compute_the_same(head):
    torch.manual_seed(0)
    model = VectorFieldConfig(width=32, depth=2, mid_depth=1, heads=4, head=head, dropout=0.0)
    field = VectorField(model, 4).double()
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.2)  # biases and norms are not at 0 and 1
    plain = of_pytorch_layers(field)
    layers = [module for module in plain.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    assert len(layers) == 2 * model.depth + model.mid_depth
    assert not any(isinstance(module, TransformerBlock) for module in plain.modules())
    batch = FlowBatch(*torch.randn(3, 5, 4, 4, 4, dtype=torch.float64), torch.arange(1, 6))
    draws = draw_flow((5, 4, 4, 4), torch.Generator().manual_seed(0), CPU, torch.float64)
    losses = []
    for network in (field, plain):
        assert network.training
        losses.append(flow_matching_loss(network, batch, draws))
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    theirs = dict(plain.named_parameters())
    assert theirs.keys() == {name for name, _ in field.named_parameters()}
    for name, parameter in field.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)
        assert theirs[name] is not parameter


def test_pytorchs_layers_drop_as_much():
    plain = of_pytorch_layers(VectorField(VectorFieldConfig(width=32, depth=1, mid_depth=1, heads=4, dropout=0.3), 4))
    layer = plain.mid_blocks[0]
    assert [layer.dropout.p, layer.dropout1.p, layer.dropout2.p, layer.self_attn.dropout] == [0.3] * 4


def test_both_predictions_evaluate_the_field_equally_often(bench, monkeypatch):
    evaluations = []
    head = VectorField.to_velocity
    monkeypatch.setattr(
        VectorField, "to_velocity", lambda field, *rest: evaluations.append(field) or head(field, *rest)
    )
    rows = list(sampling_measurements(bench))
    assert len(rows) == len(bench.rollouts)
    ours, plain = (sum(1 for field in evaluations if field is one) for one in dict.fromkeys(evaluations))
    assert ours == plain == 2 * sum(nfe for _, nfe in bench.rollouts)  # two turns


@pytest.mark.parametrize("kind", [VIDEO, replace(VIDEO, codec="h264", bit_rate=None)], ids=["mpeg4", "h264"])
def test_all_sides_decode_every_frame_of_moving_videos(kind, tmp_path):
    paths = write_videos(tmp_path / "train", kind, 3)
    with av.open(str(paths[0])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.codec.canonical_name, stream.width, stream.height) == (kind.codec, 64, 48)
    source = open_source(dataset_of(tmp_path, kind.image_size, kind.frame_step), tmp_path, "train")
    assert [video.frames for video in source.videos] == [7] * 3
    frames = source.read(0).astype(int)
    assert abs(frames[1:] - frames[:-1]).mean() > 2
    assert frames.std() > 20
    assert decode_bare(paths, 2) == decode_bare(paths, 1) == 60
    decode_source(source, 2)


def test_videos_are_removed_after_decoding(bench):
    assert len(list(decode_measurements(bench))) == 1
    assert not list(bench.folder.iterdir())
