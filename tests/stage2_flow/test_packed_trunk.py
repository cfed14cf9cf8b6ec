"""The packed trunk is the field's, to the rounding of its precision."""

import pytest
import torch

from stage1_autoencoder.packing import can_pack
from stage2_flow.config import VectorFieldConfig
from stage2_flow.packed_trunk import PackedTrunk
from stage2_flow.vector_field import VectorField, time_embedding

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")


def test_the_official_output(official_field, regressor, fp32_rounding):
    names = ("input_latents", "reference_latents", "conditioning_latents", "index_distances")
    with torch.inference_mode():
        tokens = official_field.embed(*(regressor[name] for name in names))
        output = PackedTrunk(official_field, torch.float32)(tokens, regressor["temb"], 8, 8)
    assert (output - regressor["output_f64"]).abs().max() < fp32_rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [{"depth": 2}, {"head": "bn", "convolutions": True}, {"qk_norm": True, "mid_depth": 0}], ids=str
)
def test_a_packed_trunk_changes_only_roundings(sizes, dtype):
    if not can_pack(dtype):
        pytest.skip("no bf16 on this processor")
    torch.manual_seed(0)
    field = VectorField(VectorFieldConfig(**{"width": 32, "depth": 1, "mid_depth": 1, "heads": 4} | sizes), 2).eval()
    for name, parameter in field.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)  # also of the convolutions, which are zero in a fresh network
    packed, wide = PackedTrunk(field, dtype), VectorField(field.config, 2).double().eval()
    wide.load_state_dict(field.state_dict())
    for batch, height, width in ((1, 4, 6), (3, 4, 6), (2, 8, 8)):
        tokens, time_token = torch.randn(batch, height * width, 32), time_embedding(torch.rand(batch), 32)
        with torch.inference_mode():
            exact = wide.trunk(tokens.double(), time_token.double(), height, width)
            plain, ours = (trunk(tokens, time_token, height, width) for trunk in (field.trunk, packed))
        error = (ours - exact).abs().max()
        if dtype == torch.float32:
            assert error < 10 * (plain - exact).abs().max()
        else:
            # Some 20 sums of which each is rounded to 8 bits; errors add up like their root. Five times that.
            assert error < 5 * 20**0.5 * 2.0**-9 * exact.abs().max()
        assert ours.dtype == torch.float32
