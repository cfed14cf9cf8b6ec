"""How PyTorch multiplies float32 numbers: in full, or rounded to TF32. The settings hold for the whole process."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

# "ieee": in full. "none": as the process or the library has it by default.
_MATRICES = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
_CONVOLUTIONS = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.mkldnn.conv)


@contextmanager
def float32_products(*, matrices: bool, convolutions: bool) -> Iterator[None]:
    """Multiply float32 numbers in full or in TF32 inside; the settings before it are restored exactly.

    No other thread may be inside with other arguments: they would change each other's settings.

    Args:
        matrices, convolutions: whether these products are in full.
    """
    with _restored():
        # The older settings too: PyTorch compares both kinds, and refuses to compile where they contradict.
        torch.set_float32_matmul_precision("highest" if matrices else "high")
        torch.backends.cudnn.allow_tf32 = not convolutions
        if convolutions:
            for place in _CONVOLUTIONS:  # still "none", which may be TF32
                place.fp32_precision = "ieee"
        yield


@contextmanager
def exact_matrix_products() -> Iterator[None]:
    """Multiply float32 matrices in full inside. Where this is so already, threads do not disturb each other."""
    if all(place.fp32_precision in ("ieee", "none") for place in _MATRICES):
        yield
        return
    with _restored():
        torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def _restored() -> Iterator[None]:
    matmul_precision, cudnn_tf32 = "highest", True
    with suppress(RuntimeError):  # the newer settings were changed, and the older ones still have these defaults
        matmul_precision = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn_tf32 = torch.backends.cudnn.allow_tf32
    before = [(place, place.fp32_precision) for place in (*_MATRICES, *_CONVOLUTIONS)]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
        torch.backends.cudnn.allow_tf32 = cudnn_tf32
        for place, precision in before:
            place.fp32_precision = precision
