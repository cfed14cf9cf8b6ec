"""What the autoencoder loses of the given frames, put back into predicted frames that show the same.

A background's texture does not fit into latents, and a new person's background even less; but the given frames have it.
Kernel regression (Nadaraya 1964, Watson 1964): at each pixel, the mean of the given frames' losses there, weighted by
how much their reconstructions look like the predicted frame around that pixel. Nothing is trained.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Root mean square difference of two decoded neighborhoods, in [-1, 1] units, at which a weight falls to exp(-1/2), and
# the neighborhoods' side. Chosen on validation clips of KTH's layout (docs/quality.md).
BANDWIDTH = 0.05
SIDE = 3
# The weight of "nothing is lost": a pixel that looks like no given frame is left as it is.
PRIOR = 0.1


@torch.inference_mode()
def restore_detail(decoded: Tensor, given: Tensor, reconstructed: Tensor) -> Tensor:
    """Add what was lost of the given frames, where the decoded frames look like their reconstructions.

    Args:
        decoded: [b, n, c, h, w] float in [-1, 1], predicted frames.
        given: [b, k, c, h, w] float in [-1, 1], the real frames before them, k >= 1.
        reconstructed: [b, k, c, h, w] float in [-1, 1], what the decoder makes of them.
    Returns:
        [b, n, c, h, w] float in [-1, 1].
    """
    lost, weights = torch.zeros_like(decoded), torch.full_like(decoded[:, :, :1], PRIOR)
    for real, reconstruction in zip(given.unbind(1), reconstructed.unbind(1), strict=True):
        difference = (decoded - reconstruction[:, None]).square().mean(2)
        around = F.avg_pool2d(F.pad(difference, [SIDE // 2] * 4, mode="replicate"), SIDE, stride=1)
        weight = torch.exp(around / (-2 * BANDWIDTH**2))[:, :, None]
        lost += weight * (real - reconstruction)[:, None]
        weights += weight
    return (decoded + lost / weights).clamp(-1, 1)
