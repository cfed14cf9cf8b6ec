"""FLOP of a training step, the rate of large matrix products on this machine, and peak memory."""

import sys
import time
from collections.abc import Callable

import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stage2_flow.config import VectorFieldConfig
from stage2_flow.linear import linear
from stage2_flow.vector_field import VectorField

# The backward pass has two products per product of the forward pass: 6ND in all, 2ND forward (Kaplan et al. 2020).
STEP_FORWARDS = 3
# Sides of the matrices: large enough for full speed; 2 GFLOP on a CPU, 1.1 TFLOP on a GPU.
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
MATMUL_REPEATS = 5


def forward_flops(config: VectorFieldConfig, latent_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of the vector field's matrix products and convolutions for one sample.

    A multiply-add counts as two; elementwise operations (norms, GELU, softmax) are not counted.

    Args:
        config: sizes of the field.
        latent_shape: (c, h, w).
    """

    def evaluate() -> None:
        field = VectorField(config, latent_shape[0]).eval()
        latents = torch.empty(1, *latent_shape)
        reference = latents.repeat(1, config.recent_frames, 1, 1)
        field(latents, reference, latents, torch.ones(1, dtype=torch.int64), torch.empty(1))

    return counted_flops(evaluate)


def counted_flops(work: Callable[[], object]) -> int:
    """Floating-point operations as in `forward_flops` of work that builds its network and inputs; none is done."""
    # The counter knows plain attention on every device; the other kernels compute the same products.
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def step_flops(config: VectorFieldConfig, latent_shape: tuple[int, int, int], batch_size: int) -> int:
    """Floating-point operations of the model in a training step: three times the forward pass (the 6ND convention).

    Recomputation to save memory and the optimizer are not counted.
    """
    return STEP_FORWARDS * batch_size * forward_flops(config, latent_shape)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of products of large square matrices, measured now: the best of a few.

    Model FLOP utilization (MFU) is relative to this rate, not to the data sheet: it is what the machine gives now, with
    other load included. Takes about 0.2 s on a CPU, 30 ms per product.

    Args:
        device: a CPU uses torch's threads.
        dtype: of the matrices. float32 on a GPU follows the process's setting (TF32 or not).
    """
    side = MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    linear(left, right)  # the first one loads kernels
    seconds = min(_seconds_of_product(left, right) for _ in range(MATMUL_REPEATS))
    return 2 * side**3 / seconds


@torch.no_grad()
def _seconds_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    if not left.is_cuda:
        started = time.perf_counter()
        linear(left, right)
        return time.perf_counter() - started
    with torch.cuda.device(left.device):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        linear(left, right)
        ended.record()
        ended.synchronize()
    return started.elapsed_time(ended) / 1000


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: of tensors on a GPU, or resident memory on a CPU.

    On a CPU loaded libraries (some 400 MB) count. On a GPU `torch.cuda.reset_peak_memory_stats` resets it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # POSIX only

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024  # Linux counts KiB
