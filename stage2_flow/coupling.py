"""Which noise belongs to which target of a batch: an exchange between rows that straightens the paths."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Rows exchange noise only within blocks of so many neighbours: 2^3 rows in 3 rounds.
BLOCK_ROWS = 8
# What the distance of two rows' references costs, see `couple`. At 0.5 a third to a half of the rows of a batch of
# videos exchange their noise, and with much more none do, since the frames of two videos are far apart.
CONDITION_WEIGHT = 0.5


def couple(noise: Tensor, target: Tensor, reference: Tensor, weight: float = CONDITION_WEIGHT) -> Tensor:
    """Exchange the noise of rows in pairs where that brings it closer to what is new in their targets.

    Independent draws make paths that cross, and a field that bends to serve them all. Optimal transport within a batch
    straightens it (Tong et al. 2024), but for a conditional field noise must not tell about the condition, else it
    never learns the noise that sampling begins from, which is N(0, I) whatever the condition. So it costs something to
    move noise to a row of another condition (C^2OT: Cheng & Schwing 2025, The Curse of Conditions):

        cost of noise e_j in row i = |e_j - (z_i - r_i)|^2 + w |r_i - r_j|^2 / sqrt(d)

    Two things are ours. C^2OT has z_i for z_i - r_i. Among rows of one reference that is the same choice, since r_i
    shifts all of them alike. Between rows of different references it isn't: most of what tells two targets of a video
    model apart is the frame before them, and noise that follows that difference is the very thing to avoid. And the
    sqrt(d): a gain is a sum of d products that grows as sqrt(d), so that one w suits latents of any size.

    Where C^2OT solves an assignment on the host, here row i meets i XOR 1, i XOR 2 and i XOR 4 in turn, and they swap
    what noise they have if that lowers the cost, with j the row that it lies in. Nothing waits for the device, the
    work grows as b, and a block of 8 rows depends on no other: processes and parts of a batch may share the rows out
    in multiples of 8.

    Args:
        noise: [b, ...] float, drawn from N(0, I) independently for each row.
        target: like noise, the latents z that the paths lead to.
        reference: like noise, the frame r before the target, which the field is conditioned on. (For a field without
            a reference: its condition.)
        weight: w, at least 0; 0 lets all rows exchange their noise, as if the conditions were alike.
    Returns:
        Like noise: the same rows, bit for bit, in another order.
    """
    rows, shape = noise.shape[0], noise.shape
    # fp32 whatever comes in: in bf16 the gain would drown in its own rounding. (float64 stays float64.)
    dtype = torch.promote_types(noise.dtype, torch.float32)
    reference = reference.to(dtype)
    news = target.to(dtype) - reference
    padding = (0, 0, 0, -rows % BLOCK_ROWS)
    noise, news, reference = (F.pad(x.flatten(1), padding) for x in (noise, news, reference))
    present = torch.arange(noise.shape[0], device=noise.device) < rows
    price_of_distance = 2 * weight / math.sqrt(noise.shape[1])  # 2: both rows' noise moves
    for stride in (1, 2, 4):
        # Row i and row i XOR stride are the two of a pair.
        e, x, r = (rearrange(v, "(b pair i) d -> pair b i d", pair=2, i=stride) for v in (noise, news, reference))
        # |e_0 - x_0|^2 + |e_1 - x_1|^2 - |e_1 - x_0|^2 - |e_0 - x_1|^2 = -2 <e_0 - e_1, x_0 - x_1>: no large terms
        # cancel, and both rows go by the one number, so that no noise is doubled or lost.
        gain = -2 * ((e[0].to(dtype) - e[1].to(dtype)) * (x[0] - x[1])).sum(dim=-1)
        price = price_of_distance * (r[0] - r[1]).square().sum(dim=-1)
        swap = (gain > price) & rearrange(present, "(b pair i) -> pair b i", pair=2, i=stride).all(dim=0)
        e = torch.where(swap[..., None], e.flip(0), e)
        noise = rearrange(e, "pair b i d -> (b pair i) d")
    return noise[:rows].reshape(shape)
