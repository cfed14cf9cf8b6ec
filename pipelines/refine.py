"""Applying a refiner to predicted videos: frame by frame, each given the refined frame before."""

import torch
from torch import Tensor

from stage1_autoencoder.rcan import RCAN


@torch.inference_mode()
def refine_frames(refiner: RCAN, last_context: Tensor, decoded: Tensor) -> Tensor:
    """Refine the predicted frames of a batch of clips.

    The first frame's previous one is the real frame before the prediction, as it was given and not its
    reconstruction; from there on it is the refined frame before. Nothing is clamped on the way.

    Args:
        refiner: in eval mode, on the device of the frames.
        last_context: [b, 3, h, w] float in [-1, 1], the last real frame.
        decoded: [b, n, 3, h, w] float, the frames after it as the decoder gave them, not clamped.
    Returns:
        [b, n, 3, h, w] float32 in [-1, 1].
    """
    dtype = refiner.head.weight.dtype
    previous, refined = last_context.to(decoded.device, dtype), []
    for frame in decoded.to(dtype).unbind(1):
        previous = refiner(previous, frame)
        refined.append(previous.float().clamp(-1, 1))
    return torch.stack(refined, 1) if refined else decoded.float()
