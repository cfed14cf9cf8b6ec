"""Features that are computed once, until a video, the network or the file changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.evaluation.measures.feature_cache import FeatureCache

VIDEOS = torch.rand(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Means:
    """Means of videos, which counts how many it was asked for."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, videos: Tensor) -> Tensor:
        self.seen += len(videos)
        return videos.mean((2, 3, 4))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "toy.features.sqlite"


def test_only_what_is_new_is_computed(path: Path):
    means = Means()
    first = FeatureCache(path).features("a", VIDEOS[:3], means)
    assert torch.equal(first, VIDEOS[:3].mean((2, 3, 4)))
    assert torch.equal(FeatureCache(path).features("a", VIDEOS.flip(0), means), VIDEOS.flip(0).mean((2, 3, 4)))
    assert means.seen == 5
    changed = VIDEOS.clone()
    changed[1, 0, 0, 0, 0] += 1e-6
    FeatureCache(path).features("a", changed, means)
    assert means.seen == 6
    FeatureCache(path).features("b", VIDEOS, means)
    assert means.seen == 11
    FeatureCache(path).features("a", VIDEOS.unflatten(1, (1, 2))[:, 0].double(), lambda x: means(x.float()))
    assert means.seen == 16


@pytest.mark.parametrize("part", ["features", "file"])
def test_damaged_features_are_computed_again(path: Path, part: str):
    expected = FeatureCache(path).features("a", VIDEOS, Means())
    content = path.read_bytes()
    place = content.index(expected[2].numpy().tobytes()) if part == "features" else 0
    path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
    for computed in (1 if part == "features" else 5, 0):
        means = Means()
        assert torch.equal(FeatureCache(path).features("a", VIDEOS, means), expected)
        assert means.seen == computed


def test_where_nothing_can_be_kept(tmp_path: Path):
    for path in (tmp_path / "no folder" / "toy.sqlite", tmp_path):
        means = Means()
        for _ in range(2):
            assert torch.equal(FeatureCache(path).features("a", VIDEOS, means), VIDEOS.mean((2, 3, 4)))
        assert means.seen == 10
    assert not [*tmp_path.iterdir()]
