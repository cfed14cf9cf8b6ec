"""Packed convolutions agree with plain ones, for every shape and layout of their inputs."""

import pytest
import torch
from torch import nn

from stage1_autoencoder.packing import PackedConv2d, can_pack, with_packed_convolutions

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.Conv2d(4, 6, 1),
     nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2), nn.Conv2d(4, 64, 3, padding=1)],
    ids=str,
)  # fmt: skip
def test_packed_convolutions_of_any_kind_and_shape(layer):
    packed = with_packed_convolutions(nn.Sequential(layer), torch.float32)
    assert isinstance(packed[0], PackedConv2d)
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for shape in ((2, 4, 9, 9), (1, 4, 9, 9), (17, 4, 32, 32), (1, 4, 64, 8), (2, 4, 9, 9)):
            x = torch.randn(shape, generator=generator)
            for laid_out in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:1].expand(shape)):
                # 36 products of values up to 4
                torch.testing.assert_close(packed(laid_out), layer(laid_out), rtol=0, atol=36 * 2.0**-20)


def test_shared_parts_and_other_padding_are_not_packed():
    shared = nn.Sequential(nn.Conv2d(3, 3, 1))
    reflected = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
    copied = with_packed_convolutions(nn.Sequential(nn.Conv2d(3, 3, 1), reflected, shared), torch.float32, [shared])
    assert [type(copied[0]), type(copied[1]), type(shared[0])] == [PackedConv2d, nn.Conv2d, nn.Conv2d]
    assert copied[2] is shared
