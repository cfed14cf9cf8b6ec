"""Raw latents to final ones and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage2_flow.standardization import Standardization


def test_final_latents_have_mean_0_and_deviation_1():
    noise = torch.randn(1000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scale, offset = torch.tensor([[2.0, 9.0, 0.1], [5.0, -1.0, 0.0]])
    raw = noise * scale[:, None, None] + offset[:, None, None]
    standardization = Standardization(mean=raw.mean(dim=(0, 2, 3)), std=raw.std(dim=(0, 2, 3)))
    final = standardization.to_final(raw)
    # (raw - mean) / std cancels up to mean / std = 2.5 times eps.
    torch.testing.assert_close(final.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(final.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    channels=st.integers(1, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_there_and_back_is_the_same_in_fp32_or_better(lead, channels, dtype):
    raw = torch.randn(*lead, channels, 3, 2).to(dtype)
    standardization = Standardization(mean=torch.randn(channels), std=torch.rand(channels) + 0.5)
    final = standardization.to_final(raw)
    assert final.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(standardization.to_raw(final), raw.to(final.dtype), rtol=1e-5, atol=1e-5)
    identity = Standardization.identity(channels)
    assert torch.equal(identity.to_final(raw), raw.to(final.dtype))
    assert torch.equal(identity.to("cpu").to_raw(raw), raw.to(final.dtype))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(2), torch.ones(3), r"\[2\].*\[3\]"),
        (torch.zeros(2), torch.tensor([1.0, 0.0]), r"std .*\[1.0, 0.0\]"),
        (torch.tensor([0.0, float("nan")]), torch.ones(2), "mean .*nan"),
    ],
)
def test_refuses_unusable_statistics(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Standardization(mean=mean, std=std)
