"""What the autoencoder is measured against is the same network, and what is measured is told."""

import pytest
import torch

from pipelines.bench import autoencoder_speed as bench_autoencoder
from pipelines.bench import benchmark as bench
from pipelines.bench.autoencoder_speed import autoencoder_measurements, plain_codes, plain_decode, plain_encode
from pipelines.config import RiverConfig, parse_config
from stage1_autoencoder.config import VQGANConfig
from stage1_autoencoder.vqgan import VQGAN

CPU = torch.device("cpu")
MODEL = {
    "channels": 8, "channel_multipliers": [1, 2, 2], "blocks": 2, "attention_resolutions": [16], "resolution": 32,
    "codes": 64, "norm_groups": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(VQGANConfig(**MODEL)).double().eval().requires_grad_(False)


def configuration(model: dict) -> RiverConfig:
    dataset = {"name": "none", "source": "videos", "image_size": 32}
    return parse_config({"dataset": dataset, "autoencoder": {"model": model}}, "a test")


def test_the_plain_network_computes_the_same(model):
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = model.encode(images)
    torch.testing.assert_close(plain_encode(model, images), latents, rtol=0, atol=1e-10)
    assert torch.equal(plain_codes(model, latents), model.quantizer.nearest(latents).flatten())
    torch.testing.assert_close(plain_decode(model, latents), model.decode(latents), rtol=0, atol=1e-10)


def test_three_rows_with_their_references(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(bench_autoencoder, "SECONDS", 0.0)
    monkeypatch.setattr(bench_autoencoder, "_threads", lambda device: 2)
    monkeypatch.setattr(
        "stage1_autoencoder.frame_encoder.PASS_PIXELS", {"cpu": bench_autoencoder.PLAIN_BATCH["cpu"] * 32**2}
    )
    rows = list(autoencoder_measurements(configuration(MODEL), CPU))
    assert [row.name.removeprefix("autoencoder: ") for row in rows] == ["encode, fp32", "encode, bf16", "decode, fp32"]
    for row in rows:
        # Every measurement took one tick of the clock, for two batches of either way.
        assert row.value == 2 * bench_autoencoder.PLAIN_BATCH["cpu"]
        assert (row.unit, row.ratio) == ("frames/s", 1.0)
        assert row.reference == "the same network, plainly: 8.0/s"
    assert [row.at_least for row in rows] == [1.3, None, None]


def test_another_family_has_no_plain_twin():
    family = {"architecture": "vqvae", "channels": 8, "norm_groups": 4}
    assert list(autoencoder_measurements(configuration(family), CPU)) == []


def test_both_ways_encode_equally_many_frames(monkeypatch, model):
    """In whole batches, and in as many for one thread as for the other: half a batch takes as long as a whole one."""
    ours, plainly = [], []
    encode, plain = bench_autoencoder.FrameEncoder.encode, bench_autoencoder.plain_encode

    def counted(self, frames, views):
        ours.append(len(frames))
        return encode(self, frames, views)

    def counted_plainly(model, images):
        plainly.append(len(images))
        return plain(model, images)

    monkeypatch.setattr(bench_autoencoder.FrameEncoder, "encode", counted)
    monkeypatch.setattr(bench_autoencoder, "plain_encode", counted_plainly)
    monkeypatch.setattr(bench_autoencoder, "SECONDS", 0.0)
    monkeypatch.setattr(bench_autoencoder, "_threads", lambda device: 2)
    monkeypatch.setattr("stage1_autoencoder.frame_encoder.PASS_PIXELS", {"cpu": 3 * 32**2})
    list(autoencoder_measurements(configuration(MODEL), CPU))
    batch, measurements = bench_autoencoder.PLAIN_BATCH["cpu"], 2 * bench_autoencoder.REPEATS
    assert plainly == [batch] * (2 + 3 * measurements)  # two to find out how long one takes
    assert ours == [3] * 4 * measurements
