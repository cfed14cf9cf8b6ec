"""FLOPs against a formula by hand and the paper's figures; rates and memory against clocks and the kernel's counts."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.runtime.throughput import MATMUL_SIDE, forward_flops, matmul_rate, peak_memory, step_flops
from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import VectorField

CPU = torch.device("cpu")
SMALL = VectorFieldConfig(width=32, depth=2, mid_depth=1, heads=4)


def by_hand(config: VectorFieldConfig, shape: tuple[int, int, int]) -> int:
    """Multiplications with their additions, layer by layer, times two."""
    (c, h, w), d = shape, config.width
    places, tokens = h * w, h * w + 1
    blocks = 2 * config.depth + config.mid_depth
    frames = 2 + (config.recent_frames if config.reference else 0)
    products = places * frames * c * d  # the embedding
    products += 256 + 256 * d  # the distance's code
    products += blocks * tokens * (3 * d * d + d * d + 4 * d * d + 4 * d * d)  # q k v, output, both of the feed-forward
    products += blocks * 2 * tokens * tokens * d  # scores, and what they weigh
    products += config.depth * tokens * 2 * d * d  # merges
    products += places * d * d + places * 9 * d * c  # the head
    return 2 * products


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, (4, 8, 8)),
        ({"head": "bn"}, (8, 16, 16)),
        ({"reference": False}, (4, 8, 8)),
        ({"dropout": 0.0}, (4, 4, 6)),
        ({"qk_norm": True}, (4, 8, 8)),
        ({"recent_frames": 3}, (4, 8, 8)),
        ({"depth": 1, "mid_depth": 0}, (1, 2, 2)),
    ],
    ids=str,
)
def test_flops_are_those_counted_by_hand(changes, shape):
    config = SMALL.model_copy(update=changes)
    assert forward_flops(config, shape) == by_hand(config, shape)


@pytest.mark.parametrize(("shape", "gigaflops"), [((4, 8, 8), 12.8), ((8, 16, 16), 52.7)])
def test_the_papers_sizes(shape, gigaflops):
    assert forward_flops(VectorFieldConfig(), shape) / 1e9 == pytest.approx(gigaflops, abs=0.05)


def test_a_batch_costs_as_many_times_as_it_has_samples(monkeypatch):
    monkeypatch.setattr("stage2_flow.linear._onednn_is_faster", lambda: False)  # PyTorch doesn't count oneDNN's
    field, latents = VectorField(SMALL, 4).eval(), torch.randn(3, 4, 4, 4)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        field(latents, latents, latents, torch.tensor([1, 2, 3]), torch.rand(3))
    assert counter.get_total_flops() == 3 * forward_flops(SMALL, (4, 4, 4))


def test_a_step_has_three_forward_passes_a_sample():
    assert step_flops(SMALL, (4, 8, 8), 16) == 3 * 16 * by_hand(SMALL, (4, 8, 8))


def test_counting_takes_no_memory():
    """The weights alone would take 3 TB."""
    giant = VectorFieldConfig(width=2**16, depth=4, mid_depth=5)
    assert forward_flops(giant, (4, 8, 8)) == by_hand(giant, (4, 8, 8))


def test_the_best_of_the_products_counts(monkeypatch):
    monkeypatch.setitem(MATMUL_SIDE, "cpu", 32)
    times = iter([0.0, 3.0, 10.0, 12.0, 20.0, 24.0, 30.0, 33.0, 40.0, 43.0])  # the second takes 2 s, others longer
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert matmul_rate(CPU) == 2 * 32**3 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rate_is_measured(monkeypatch, dtype):
    monkeypatch.setitem(MATMUL_SIDE, "cpu", 64)
    assert 1e6 < matmul_rate(CPU, dtype) < 1e14


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_peak_memory_is_in_bytes_and_does_not_fall():
    held = torch.ones(16 * 2**20)  # 64 MiB, touched
    peak = peak_memory(CPU)
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert peak == pytest.approx(int(rows["VmHWM"].split()[0]) * 1024, rel=0.05)
    del held
    assert peak_memory(CPU) >= peak > 64 * 2**20
