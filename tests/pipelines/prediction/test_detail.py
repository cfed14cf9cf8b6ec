"""What the decoder loses of the given frames comes back where predicted frames show the same."""

import math

import torch

from pipelines.prediction.detail import BANDWIDTH, PRIOR, restore_detail


def frames(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_where_nothing_changes_the_loss_comes_back() -> None:
    given = frames(2, 1, 3, 5, 7).expand(-1, 4, -1, -1, -1)
    reconstructed = given * 0.9
    restored = restore_detail(reconstructed[:, :2], given, reconstructed)
    share = 4 / (4 + PRIOR)  # of four frames that look the same
    torch.testing.assert_close(restored, (0.9 + 0.1 * share) * given[:, :2])


def test_what_looks_like_no_given_frame_is_left() -> None:
    given, decoded = frames(1, 3, 3, 6, 6) * 0.2 - 0.7, frames(1, 2, 3, 6, 6, seed=1) * 0.2 + 0.7
    torch.testing.assert_close(restore_detail(decoded, given, given + 0.1), decoded, rtol=0, atol=1e-12)


def test_weights_are_those_of_the_formula() -> None:
    decoded = frames(1, 1, 3, 4, 5) * 0.05
    given, reconstructed = frames(1, 2, 3, 4, 5, seed=1), frames(1, 2, 3, 4, 5, seed=2) * 0.05
    restored = restore_detail(decoded, given, reconstructed)
    for y, x in [(0, 0), (1, 2), (3, 4)]:  # corners repeat the picture's edge
        rows, columns = ([min(max(at + k, 0), end - 1) for k in (-1, 0, 1)] for at, end in ((y, 4), (x, 5)))
        total, weights = torch.zeros(3, dtype=torch.float64), PRIOR
        for real, seen in zip(given[0], reconstructed[0], strict=True):
            square = sum(((decoded[0, 0] - seen)[:, r, c] ** 2).mean().item() for r in rows for c in columns) / 9
            weight = math.exp(-square / (2 * BANDWIDTH**2))
            total, weights = total + weight * (real - seen)[:, y, x], weights + weight
        torch.testing.assert_close(restored[0, 0, :, y, x], decoded[0, 0, :, y, x] + total / weights)
