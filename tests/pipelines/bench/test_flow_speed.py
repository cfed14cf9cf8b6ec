"""What flow training is measured against computes the same, encodes the right frames, and what is measured is told."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import latent_cache
from latent_cache import FlowBatch, FlowIndices, StreamingSampler
from pipelines.bench import benchmark as bench
from pipelines.bench import flow_speed as bench_flow
from pipelines.bench import flow_speed as bench_flow_steps
from pipelines.bench.flow_speed import (
    BATCH,
    BUDGET_SHARE,
    POOL_FRAMES,
    FlowStep,
    encoded_batch,
    flow_measurements,
    of_pytorch_layers,
    random_batch,
    write_latents,
)
from pipelines.bench.measurement import Measurement
from pipelines.config import RiverConfig, parse_config
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.config import VQGANConfig
from stage1_autoencoder.vqgan import VQGAN
from stage2_flow.config import FlowTrainingConfig, VectorFieldConfig
from stage2_flow.loss import draw_flow, flow_matching_loss
from stage2_flow.vector_field import TransformerBlock, VectorField

CPU = torch.device("cpu")
SIDE, SHAPE = 16, (4, 4, 4)
AUTOENCODER = {
    "channels": 8, "channel_multipliers": [1, 2, 2], "blocks": 1, "attention_resolutions": [], "codes": 64,
    "norm_groups": 4,
}  # fmt: skip
FIELD = {"width": 32, "depth": 2, "mid_depth": 1, "heads": 4}
SMALL = VectorFieldConfig(**FIELD)


def configuration(autoencoder: dict[str, object] = AUTOENCODER, **training: object) -> RiverConfig:
    values = {
        "dataset": {"name": "none", "source": "videos", "image_size": SIDE},
        "autoencoder": {"model": autoencoder},
        "flow": {"model": FIELD, "training": {"clip_frames": 10} | training},
    }
    return parse_config(values, "a test")


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second after the one before."""
    clock = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small store that nothing waits for, one turn of everything."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(bench_flow_steps, "CHUNK_FRAMES", 64)
    monkeypatch.setattr(bench_flow, "SECONDS", 0.0)


@pytest.mark.parametrize("head", ["ln", "bn"])
def test_pytorchs_layers_compute_the_same(head):
    torch.manual_seed(0)
    field = VectorField(SMALL.model_copy(update={"head": head, "dropout": 0.0}), 4).double()
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.2)  # biases and norms are not at 0 and 1
    plain = of_pytorch_layers(field)
    layers = [module for module in plain.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    assert len(layers) == 2 * SMALL.depth + SMALL.mid_depth
    assert not any(isinstance(module, TransformerBlock) for module in plain.modules())
    batch = FlowBatch(*torch.randn(3, 5, *SHAPE, dtype=torch.float64), torch.arange(1, 6))
    draws = draw_flow((5, *SHAPE), torch.Generator().manual_seed(0), CPU, torch.float64)
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
    plain = of_pytorch_layers(VectorField(SMALL.model_copy(update={"dropout": 0.3}), 4))
    layer = plain.mid_blocks[0]
    assert [layer.dropout.p, layer.dropout1.p, layer.dropout2.p, layer.self_attn.dropout] == [0.3] * 4


def test_a_batch_in_the_loop_is_of_the_drawn_frames():
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(**AUTOENCODER)).eval()
    frames = torch.randint(0, 256, (6, SIDE, SIDE, 3), dtype=torch.uint8)
    drawn = FlowIndices(*(torch.tensor(row) for row in ([8, 5], [7, 4], [1, 3], [6, 1])))
    batch = encoded_batch(model.encode, frames, drawn, CPU)
    latents = model.encode(image_to_unit(frames))
    for given, rows in ((batch.target, [2, 5]), (batch.reference, [1, 4]), (batch.condition, [1, 3])):
        torch.testing.assert_close(given, latents[rows], rtol=1e-4, atol=1e-5)
        assert not given.requires_grad
    assert torch.equal(batch.distance, torch.tensor([6, 1]))


def test_the_loop_encodes_three_frames_a_sample_and_the_cached_step_none(monkeypatch, few):
    encoded, steps = [], []
    encode, step = VQGAN.encode, FlowStep.__call__
    monkeypatch.setattr(VQGAN, "encode", lambda self, images: encoded.append(images) or encode(self, images))
    monkeypatch.setattr(FlowStep, "__call__", lambda self, batch: steps.append(len(encoded)) or step(self, batch))
    measurements = flow_measurements(configuration(batch_size=BATCH), CPU)
    next(measurements)
    measurements.close()
    # Warm-up and the cached step, then the step in the loop, and the one that encodes as the public code does.
    assert steps == [0, 0, 1, 1]
    assert [images.shape for images in encoded] == [(3 * BATCH, 3, SIDE, SIDE)]
    assert not encoded[0].requires_grad
    assert len(encoded[0].flatten(1).unique(dim=0)) > 3 * BATCH // 4  # of a pool of 64
    assert POOL_FRAMES > 3 * BATCH


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_updates_field_and_average(precision):
    torch.manual_seed(0)
    seen: list[torch.dtype] = []
    step = FlowStep(SMALL, FlowTrainingConfig(ema_decay=0.9, learning_rate=1e-3), SHAPE, CPU, precision)
    step.field.mid_blocks[0].linear1.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    before = {name: value.clone() for name, value in step.field.named_parameters()}
    batch = random_batch(BATCH, SHAPE, CPU)
    losses = [step(batch) for _ in range(40)]
    assert set(seen) == {torch.float32 if precision == "fp32" else torch.bfloat16}
    assert torch.stack(losses[-5:]).mean() < 0.9 * torch.stack(losses[:5]).mean()
    moved = [not torch.equal(before[name], value) for name, value in step.field.named_parameters()]
    assert all(moved)
    averaged = dict(step.train_state.best_model.named_parameters())
    assert step.train_state.best_model is not step.field
    assert all(not torch.equal(averaged[name], before[name]) for name in before)


def test_the_store_is_larger_than_what_streams_it(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    for shape in ((4, 8, 8), (8, 2, 2)):  # the paper's, and one of other channels
        cache = latent_cache.open(write_latents(tmp_path / f"{shape[0]}.zarr", shape))
        assert cache.latent_shape == shape
        assert cache.frames == bench_flow_steps.CHUNK_FRAMES * bench_flow_steps.CHUNKS
        budget = cache.nbytes // BUDGET_SHARE
        sampler = StreamingSampler(cache, CPU, 0, BATCH, 400, budget)
        assert sampler.plan.nbytes <= budget
        assert sampler.plan.windows_per_epoch > 4
        sampler.close()


@pytest.mark.usefixtures("ticks")
def test_turns_end_with_the_time_and_the_least_counts(monkeypatch):
    monkeypatch.setattr(bench_flow, "SECONDS", 7.0)
    calls = []

    def slow() -> None:
        calls.append("slow")
        if len(calls) != 3:
            bench.time.perf_counter()

    # A turn takes 2 ticks for each function and one for each call but the third, which is slow's second.
    least = bench_flow._turns(CPU, slow, lambda: calls.append("fast"))
    assert least == [1.0, 1.0]
    assert calls == ["slow", "fast"] * 2
    monkeypatch.setattr(bench_flow, "SECONDS", 1e9)
    monkeypatch.setattr(bench_flow, "MOST_TURNS", 4)
    calls.clear()
    bench_flow._turns(CPU, lambda: calls.append("one"))
    assert len(calls) == 4


def test_what_a_batch_waits_for_is_a_share_of_the_step(monkeypatch):
    now = 0.0
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)

    class Slow:
        legal_targets, batch_size, batches = 100, 16, 0

        def batch(self, step: int) -> Tensor:
            nonlocal now
            assert step == self.batches
            self.batches += 1
            now += 0.5
            return torch.zeros(())

    sampler = Slow()
    share, words = bench_flow._share(None, sampler, None, CPU, 1.5)
    assert (share, sampler.batches) == (0.25, 6)
    assert words == "500000 us a batch of 16"


def by_name(rows: list[Measurement]) -> dict[str, Measurement]:
    return {row.name.removeprefix("flow: "): row for row in rows}


@pytest.mark.usefixtures("ticks", "few")
def test_rows_and_what_is_wanted_of_them(monkeypatch):
    monkeypatch.setattr(bench_flow, "matmul_rate", lambda device: 1e9)
    rows = list(flow_measurements(configuration(batch_size=8, optimizer="muon"), CPU))
    assert all(row.name.startswith("flow: ") for row in rows)
    found = by_name(rows)
    assert list(found) == [
        "step from the cache, batch 16, fp32",
        "the same",
        "samples/s of it",
        "the model's FLOP/s in it",
        "memory of this process so far",
        "field there and back, batch 16, fp32",
        "waiting for data, resident",
        "waiting for data, streamed, 0 MB through 0 MB",
        "step, batch 16, bf16",
    ]
    wanted = [(row.at_least, row.at_most) for row in rows]
    free = (None, None)
    assert wanted == [(1.5, None), free, free, free, free, (1.0, None), (None, 0.01), (None, 0.05), free]
    step, public, samples, flops, memory, field, resident, _, bf16 = rows
    # Everything took one tick.
    assert (step.value, step.ratio, samples.value) == (1, 1, 16)
    assert step.reference == "its 3 frames a sample encoded in it: 1/s"
    assert (public.ratio, public.reference) == (1, "encoded as the public code does: 1/s")
    expected = bench_flow.step_flops(SMALL, SHAPE, BATCH)
    assert flops.value == expected / 1e12
    assert flops.ratio == expected / 1e9
    assert 0.1 < memory.value < 100
    assert (field.value, field.ratio, field.reference) == (16, 1, "of nn.TransformerEncoderLayer: 16/s")
    assert 0 < resident.ratio < 1
    assert resident.value == 100 * resident.ratio
    assert resident.reference.endswith(" us a batch of 8")
    assert (bf16.value, bf16.ratio) == (1, 1)
    assert all(bench.line(row) for row in rows)


@pytest.mark.usefixtures("ticks", "few")
def test_nothing_is_demanded_of_the_cache_with_another_family():
    family = {"architecture": "vqvae", "channels": 8, "norm_groups": 4}
    step = next(flow_measurements(configuration(family), CPU))
    assert (step.ratio, step.at_least) == (1, None)


def test_bench_measures_the_flow(monkeypatch, tmp_path: Path):
    """Between the store and the autoencoder."""
    order = []
    for module, name in (
        ("bench_store", "store"), ("bench_flow", "flow"), ("bench_sampling", "sampling"),
        ("bench_autoencoder", "autoencoder"), ("bench_decode", "decode"), ("bench_encode", "encode"),
    ):  # fmt: skip
        row = Measurement(name, 1.0, "x")
        monkeypatch.setattr(
            f"pipelines.{module}.{name}_measurements", lambda *_, row=row: order.append(row.name) or iter([row])
        )
    values = configuration().model_dump() | {"paths": {"runs": str(tmp_path)}}
    run_context = bench.RunContext(CPU)
    assert [row.name for row in bench.bench(parse_config(values, "a test"), run_context)] == order
    assert order == ["store", "flow", "sampling", "autoencoder", "decode", "encode"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_steps_on_a_gpu(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(bench_flow, "GPU_STEPS", ((16, 8, 5.0, None),))
    rows = list(bench_flow._gpu_steps(FlowTrainingConfig(), device))
    assert [row.name for row in rows] == [
        "flow: bf16, compiled, batch 16, 65 tokens", "flow: bf16, compiled, batch 16, 65 tokens: MFU",
    ]  # fmt: skip
