"""Settings of float32 products: what is computed inside, and that everything is as before afterwards."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stage1_autoencoder.precision import exact_matrix_products, float32_products
from stage1_autoencoder.quantizer import VectorQuantizer

BACKENDS = torch.backends
PLACES = (
    BACKENDS, BACKENDS.cuda.matmul, BACKENDS.cudnn, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn,
    BACKENDS.mkldnn, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv,
)  # fmt: skip
EXACT = {"ieee", "none"}


def older(setting: Callable[[], object]) -> object:
    """A setting of the older kind; PyTorch refuses to tell those that contradict a newer one."""
    try:
        return setting()
    except RuntimeError:
        return "contradicts"


def settings() -> list[object]:
    return [
        older(torch.get_float32_matmul_precision),
        older(lambda: BACKENDS.cudnn.allow_tf32),
        *(place.fp32_precision for place in PLACES),
    ]


def change(place: object, precision: str) -> Callable[[], None]:
    return lambda: setattr(place, "fp32_precision", precision)


SURROUNDINGS = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no TF32 in cuDNN": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "all TF32": change(BACKENDS, "tf32"),
    "TF32 in CUDA's matrices": change(BACKENDS.cuda.matmul, "tf32"),
    "bf16 in oneDNN's matrices": change(BACKENDS.mkldnn.matmul, "bf16"),
    "bf16 in oneDNN's convolutions": change(BACKENDS.mkldnn.conv, "bf16"),
    "no TF32 in cuDNN's convolutions": change(BACKENDS.cudnn.conv, "ieee"),
}


@pytest.fixture(params=SURROUNDINGS)
def around(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a process may have set before."""
    with float32_products(matrices=True, convolutions=True):  # restores whatever the test leaves
        for place in PLACES:
            place.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        BACKENDS.cudnn.allow_tf32 = True
        SURROUNDINGS[request.param]()
        yield request.param
        BACKENDS.fp32_precision = "none"


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("matrices", [True, False])
def test_products_are_as_asked_and_settings_as_before(around, matrices, convolutions):
    before = settings()
    with float32_products(matrices=matrices, convolutions=convolutions):
        assert (BACKENDS.cuda.matmul.fp32_precision == "tf32") != matrices
        assert (BACKENDS.cudnn.conv.fp32_precision == "tf32") != convolutions
        assert torch.get_float32_matmul_precision() == ("highest" if matrices else "high")  # no contradiction
        assert BACKENDS.cudnn.allow_tf32 != convolutions
        if matrices:
            assert BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
        if convolutions:
            assert BACKENDS.mkldnn.conv.fp32_precision == "ieee"
    assert settings() == before


def test_exact_matrix_products_leave_convolutions_alone(around):
    before = settings()
    convolutions = BACKENDS.cudnn.conv.fp32_precision, BACKENDS.mkldnn.conv.fp32_precision
    with exact_matrix_products():
        assert {BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision} <= EXACT
        assert (BACKENDS.cudnn.conv.fp32_precision, BACKENDS.mkldnn.conv.fp32_precision) == convolutions
    assert settings() == before


class MatrixProducts(TorchDispatchMode):
    """Notes the settings and dtypes that matrices are multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            precision = [place.fp32_precision for place in (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul)]
            self.seen.append((*precision, args[-1].dtype))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_nearest_codes_are_searched_in_full(around, autocast):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes=256, dimensions=8)
    latents = torch.randn(4, 8, 6, 6)
    expected = torch.cdist(latents.double().permute(0, 2, 3, 1).flatten(0, 2), quantizer.codebook.double()).argmin(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), MatrixProducts() as products:
        codes = quantizer.nearest(latents)
        quantizer.rounded(latents, codes, torch.float16)
        quantizer(latents)
    assert torch.equal(codes.flatten(), expected)
    assert len(products.seen) >= 3
    assert all({*precision} <= EXACT and dtype == torch.float32 for *precision, dtype in products.seen)
