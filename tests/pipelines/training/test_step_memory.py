"""The estimated memory of a training step is what the allocator measures."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from latent_cache import FlowBatch, SplitPlan, StoreMetadata, StoreWriter
from pipelines.config import RiverConfig, parse_config
from pipelines.runtime.throughput import forward_flops
from pipelines.runtime.train_state import TrainState
from pipelines.stages import describe
from pipelines.training.autoencoder_trainer import AutoencoderTrainer
from pipelines.training.refiner_trainer import ClipBatch, RefinerTrainer
from pipelines.training.step_memory import (
    LiveMemory,
    StepMemory,
    estimate_autoencoder_memory,
    estimate_flow_memory,
    estimate_refiner_memory,
)
from stage1_autoencoder.config import AutoencoderTrainingConfig, VQGANConfig
from stage1_autoencoder.families import build_autoencoder
from stage1_autoencoder.lpips import vgg16
from stage1_autoencoder.st_lpips import shift_tolerant_alexnet
from stage2_flow.config import FlowTrainingConfig, VectorFieldConfig
from stage2_flow.loss import draw_flow, flow_matching_loss
from stage2_flow.vector_field import VectorField

SHAPE = (4, 8, 8)
SMALL_VQGAN = {"channels": 8, "channel_multipliers": [1, 2], "blocks": 1, "norm_groups": 4, "codes": 64}
SMALL = {"width": 64, "depth": 1, "mid_depth": 1}
FEW_VALUES = {"batch_size": 1}  # of one place each: weights, gradients and the update are what counts


def two_steps(
    model: VectorFieldConfig, training: FlowTrainingConfig, shape: tuple[int, int, int], device: str = "cpu"
) -> None:
    """Two real updates."""
    field = VectorField(model, shape[0]).to(device)
    train_state = TrainState(field, training, field.boundary_parameters())
    rows, parts = training.batch_size, training.accumulate
    for _ in range(2):
        newest = (model.recent_frames * shape[0], *shape[1:])
        frames = [torch.randn(rows, *each, device=device) for each in (shape, newest, shape)]
        distance = torch.randint(1, 9, (rows,), device=device)
        draws = draw_flow(
            (rows, *shape), torch.Generator(device), device,
            past_noise=model.past_noise, past_frames=model.recent_frames + 1,
        )  # fmt: skip
        part_rows = rows // parts
        for part in range(parts):
            chosen = slice(part * part_rows, (part + 1) * part_rows)
            with torch.autocast(device, torch.bfloat16, enabled=training.precision == "bf16"):
                batch = FlowBatch(*(values[chosen] for values in (*frames, distance)))
                loss = flow_matching_loss(field, batch, draws.rows(chosen))
            (loss / parts).backward()
        norm = train_state.gradient_norm()
        train_state.update(0, 1.0, norm, norm.isfinite())


def two_steps_of_the_autoencoder(config: RiverConfig) -> None:
    """Two real updates."""
    shape = (config.autoencoder.training.batch_size, *config.dataset.frame_size, 3)
    pool = SimpleNamespace(lengths=np.array([10]), batch=lambda step, rows: np.zeros(shape, np.uint8))
    trainer = AutoencoderTrainer(config, torch.device("cpu"), pool)
    for step in range(2):
        trainer.train_step(step)


def two_steps_of_the_refiner(config: RiverConfig) -> None:
    """Two real updates."""
    training, model = config.refiner.training, config.autoencoder.model
    clips = training.batch_size, training.clip_frames
    pixels = torch.zeros(*clips, *config.dataset.frame_size, 3, dtype=torch.uint8)
    latents = torch.zeros(*clips, *model.latent_shape(config.dataset.frame_size))
    source = SimpleNamespace(batch=lambda step, rows: ClipBatch([], pixels, latents))
    autoencoder = build_autoencoder(model).eval().requires_grad_(False)
    trainer = RefinerTrainer(config, torch.device("cpu"), autoencoder, source)
    for step in range(2):
        trainer.train_step(step)


def allocated(folder: Path, run: Callable[[], None]) -> int:
    """Peak bytes of PyTorch's CPU allocator, from the events of the profiler.

    Memory that was allocated before is ignored when it is freed.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    file = folder / "trace.json"
    profiler.export_chrome_trace(str(file))
    held: dict[int, int] = {}
    now = peak = 0
    # In the order in which they were recorded: clocks of two cores may differ.
    for event in json.loads(file.read_text())["traceEvents"]:
        if event.get("name") != "[memory]":
            continue
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            held[address] = size
            now += size
        else:
            now -= held.pop(address, 0)
        peak = max(peak, now)
    return peak


CASES = [
    ({"head": "bn"}, {"precision": "bf16", "ema_decay": 0.9}),
    ({"recent_frames": 4, "past_noise": 0.5, "convolutions": True}, {}),
    ({"qk_norm": True, "reference": False}, {"accumulate": 4, "precision": "bf16"}),
]


@pytest.mark.parametrize(("sizes", "settings"), CASES, ids=str)
def test_steps_dominated_by_activations(tmp_path, sizes, settings):
    model, training = VectorFieldConfig(**SMALL | sizes), FlowTrainingConfig(**{"batch_size": 8} | settings)
    memory = estimate_flow_memory(model, training, SHAPE)
    assert memory.total == pytest.approx(allocated(tmp_path, lambda: two_steps(model, training, SHAPE)), rel=0.03)
    assert memory.activations > memory.parameters


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16", "ema_decay": 0.9},
        {"optimizer": "muon", "grad_clip": 1.0},
        {"accumulate": 2, "batch_size": 2},
    ],
    ids=str,
)
def test_steps_dominated_by_weights(tmp_path, settings):
    model, training = VectorFieldConfig(width=128, depth=1, mid_depth=1), FlowTrainingConfig(**FEW_VALUES | settings)
    memory = estimate_flow_memory(model, training, (4, 1, 1))
    assert memory.total == pytest.approx(allocated(tmp_path, lambda: two_steps(model, training, (4, 1, 1))), rel=0.05)
    assert memory.activations < memory.parameters


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16", "ema_decay": 0.9, "optimizer": "muon"},
        {"accumulate": 2, "adversarial": {"weight": 0.5, "filters": 16, "layers": 2}},
    ],
    ids=str,
)
def test_steps_of_the_autoencoder_on_wide_frames(tmp_path, settings):
    """The rest are temporaries inside convolutions."""
    config = parse_config(
        {
            "dataset": {"name": "none", "source": "videos", "image_size": [24, 40]},
            "autoencoder": {
                "model": SMALL_VQGAN,
                "training": {"steps": 2, "batch_size": 4, "codebook_start": "uniform"} | settings,
            },
        },
        "a test",
    )
    memory = estimate_autoencoder_memory(config.autoencoder.model, config.autoencoder.training, (24, 40))
    assert memory.total == pytest.approx(allocated(tmp_path, lambda: two_steps_of_the_autoencoder(config)), rel=0.1)


def test_steps_of_the_refiner_on_wide_frames(tmp_path):
    config = parse_config(
        {
            "dataset": {"name": "none", "source": "videos", "image_size": [24, 40]},
            "autoencoder": {"model": SMALL_VQGAN},
            "refiner": {
                "model": {"groups": 2, "blocks": 3, "features": 16, "reduction": 4},
                "training": {"steps": 2, "batch_size": 2, "clip_frames": 4, "ema_decay": 0.9},
            },
        },
        "a test",
    )
    refiner, autoencoder = config.refiner, config.autoencoder.model
    memory = estimate_refiner_memory(refiner.model, refiner.training, autoencoder, (24, 40))
    assert memory.total == pytest.approx(allocated(tmp_path, lambda: two_steps_of_the_refiner(config)), rel=0.1)


def test_a_perceptual_network_takes_memory():
    """The weights, and feature maps of images and reconstructions."""
    model, training = VQGANConfig(**SMALL_VQGAN), AutoencoderTrainingConfig()
    plain, lpips, st_lpips = (
        estimate_autoencoder_memory(model, training.model_copy(update={"perceptual": name}), (24, 40))
        for name in ("none", "lpips", "st_lpips")
    )
    weights = sum(tensor.numel() for tensor in vgg16()[0].parameters())
    assert lpips.parameters - plain.parameters == pytest.approx(4 * weights, rel=1e-3)
    assert lpips.activations > plain.activations + 16 * 2 * 4 * 64 * 24 * 40
    assert lpips.optimizer == plain.optimizer
    weights = sum(tensor.numel() for tensor in shift_tolerant_alexnet().parameters())
    assert st_lpips.parameters - plain.parameters == pytest.approx(4 * weights, rel=1e-3)
    assert plain.activations < st_lpips.activations < lpips.activations


def test_the_parts_of_the_estimate():
    model = VectorFieldConfig(**SMALL, head="bn")
    field = VectorField(model, 4)
    weights = sum(value.nbytes for value in field.parameters())
    buffers = sum(value.nbytes for value in field.buffers())
    plain = estimate_flow_memory(model, FlowTrainingConfig(), SHAPE)
    assert plain.parameters == weights + buffers
    # Two moments, and a counter for each parameter.
    assert plain.optimizer == 2 * weights + 4 * len(list(field.parameters()))
    assert (plain.average, plain.latents) == (0, 0)
    full = estimate_flow_memory(model, FlowTrainingConfig(ema_decay=0.9, accumulate=2), SHAPE, latents_bytes=12345)
    assert (full.gradients, full.average, full.latents) == (weights, weights + buffers, 12345)
    muon = estimate_flow_memory(model, FlowTrainingConfig(optimizer="muon"), SHAPE)
    assert weights < muon.optimizer < 1.3 * weights  # one moment of the matrices, two of the rest


def test_sum_and_words():
    memory = StepMemory(
        parameters=392_300_000, gradients=0, optimizer=785 * 10**6, average=0, activations=10**9, latents=22 * 10**6
    )
    assert memory.total == 2_199_300_000
    words = "2.2 GB: parameters 392.3 MB, optimizer 785.0 MB, activations 1.0 GB, latents 22.0 MB"
    assert memory.describe() == words


def test_the_estimate_allocates_nothing():
    """A field of 40 GB."""
    giant = VectorFieldConfig(width=8192, depth=4, mid_depth=4)
    assert estimate_flow_memory(giant, FlowTrainingConfig(), SHAPE).parameters > 3 * 10**10


def test_following_memory():
    """4000 bytes each; earlier tensors, views and in-place operations take none."""
    before = torch.zeros(1000)
    with LiveMemory("cpu") as memory:
        first = torch.zeros(1000)
        second = first + before
        assert memory.now == memory.peak == 8000
        view = second.view(10, 100)[1:]
        view.mul_(2)
        assert memory.now == 8000
        del first
        assert (memory.now, memory.peak) == (4000, 8000)
        del second
        assert memory.now == 4000  # the view holds it
        third = view.sum(0, keepdim=True)
        assert (memory.now, memory.peak) == (4400, 8000)
        memory.restart()
        del view
        fourth = torch.zeros(10)
        assert (memory.now, memory.peak) == (440, 4400)
        assert memory.at_peak([third, fourth, None, before]) == 400


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(ValueError, match="'cuda'"):
        estimate_flow_memory(VectorFieldConfig(**SMALL), FlowTrainingConfig(), SHAPE, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("settings", [{"precision": "fp32"}, {"precision": "bf16", "ema_decay": 0.9}], ids=str)
def test_a_step_on_a_gpu_takes_what_was_computed(settings):
    model, training = VectorFieldConfig(depth=1, mid_depth=1), FlowTrainingConfig(**settings)
    memory = estimate_flow_memory(model, training, SHAPE, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    two_steps(model, training, SHAPE, "cuda")
    assert memory.total == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)


def test_a_dry_run_tells_costs(tmp_path, monkeypatch):
    """With a store its latents are in the sum."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    paths = {name: str(tmp_path / name) for name in ("data", "latents", "runs")}

    def lines(**cache: object) -> list[str]:
        values = {
            "paths": paths,
            "dataset": {"name": "none", "source": "videos", "image_size": [24, 40]},
            "autoencoder": {"model": SMALL_VQGAN},
            "flow": {"model": SMALL, "training": {"batch_size": 8, "precision": "bf16"}},
            "refiner": {"training": {"batch_size": 2, "clip_frames": 3}},
            "cache": cache,
        }
        return describe(parse_config(values, "a test"), torch.device("cpu")).splitlines()

    found = lines()
    autoencoder, flow = (
        next(number for number, line in enumerate(found) if line.startswith(f"{name} "))
        for name in ("autoencoder", "flow")
    )
    assert "40x24 -> latents 4x12x20" in found[autoencoder]
    sizes = VQGANConfig(**SMALL_VQGAN)
    memory = estimate_autoencoder_memory(sizes, AutoencoderTrainingConfig(), (24, 40))
    assert found[autoencoder + 1].endswith(f" 16 frames on cpu, fp32, not compiled: {memory.describe()}")
    assert "pool_memory" in found[autoencoder + 2]
    flops = 3 * 8 * forward_flops(VectorFieldConfig(**SMALL), (4, 12, 20))
    assert found[flow + 1].strip() == f"{flops / 1e9:.0f} GFLOP per training step of 8 samples"
    training = FlowTrainingConfig(batch_size=8, precision="bf16")
    memory = estimate_flow_memory(VectorFieldConfig(**SMALL), training, (4, 12, 20))
    assert found[flow + 2].strip().endswith(f" cpu, bf16, not compiled: {memory.describe()}")
    assert "latents" in found[flow + 3]  # whose size only a store tells
    assert "cache.residency auto" in found[flow + 4]
    assert found[flow + 5].startswith("sampler ")
    assert found[flow + 6].startswith("decoder ")
    assert found[flow + 7].startswith("refiner ")
    assert " 2 clips of 3 frames on cpu, fp32, not compiled: " in found[flow + 8]

    plan = SplitPlan(["a"], ["identity"], [10], (4, 12, 20), 10)
    metadata = StoreMetadata("none", 25.0, {}, {"sha256": "0"}, {})
    with StoreWriter.open(tmp_path / "latents" / "none.zarr", metadata, {"train": plan}, codes=False) as writer:
        for part in writer.pending("train"):
            writer.write_chunk("train", part, torch.randn(10, 4, 12, 20).numpy(), None)
        writer.finish()
    found = lines(residency="host")
    assert found[flow + 2].endswith(", latents 19.2 kB")
    assert found[flow + 3].startswith("sampler ")
    memory = estimate_flow_memory(VectorFieldConfig(**SMALL), training, (4, 12, 20), latents_bytes=10 * 4 * 240 * 2)
    assert memory.describe() in found[flow + 2]
