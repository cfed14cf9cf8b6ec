"""The README's Python snippets run as they stand there, on a tiny run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import latent_cache

README = Path(__file__).parents[2] / "README.md"


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def snippet_with(text: str) -> str:
    found = [snippet for snippet in snippets() if text in snippet]
    assert len(found) == 1, f"{len(found)} snippets of the README have {text!r}"
    return found[0]


@pytest.fixture
def inside(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder in which a reader of the README would be, with a run and a store named `shapes`."""
    for name, there in (("latents/shapes.zarr", trained.store), ("runs/shapes", trained.runs)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(there)
    monkeypatch.chdir(tmp_path)


def test_plain_zarr(inside: None, capsys) -> None:
    names: dict = {}
    exec(snippet_with("zarr.open_group"), names)
    assert names["first_video"].shape[1:] == names["latents"].shape[1:]
    assert len(names["first_video"]) == names["offset"][1]
    assert str(names["names"][0]).startswith("train_")
    assert "sha256" in capsys.readouterr().out


def test_dask(inside: None) -> None:
    names: dict = {"print": lambda values: names.update(printed=values)}
    exec(snippet_with("import dask.array"), names)
    assert names["printed"].shape == (names["latents"].shape[1],)
    assert np.isfinite(names["printed"]).all()


def test_latent_cache(inside: None) -> None:
    names: dict = {}
    exec(snippet_with("import latent_cache"), names)
    for attribute in ("latents", "codes", "video_ids", "offsets", "mean", "std", "fingerprint"):
        assert hasattr(names["cache"], attribute)


def test_predictor(inside: None, trained) -> None:
    cache = latent_cache.open(trained.store, "train")
    small = (2, *cache.latent_shape)
    side = small[-1] * cache.metadata.autoencoder["downsampling"]
    names = {
        "images": torch.zeros(2, 3, 3, side, side),
        "context": torch.zeros(2, 3, *small[1:]),
        "pixels": torch.zeros(2, 3, side, side),
        "z": torch.zeros(small),
        **{name: torch.zeros(small) for name in ("x_t", "reference", "condition")},
        "distance": torch.ones(2, dtype=torch.int64),
        "t": torch.zeros(2),
    }
    exec(snippet_with("VideoPredictor.from_run"), names)
    assert names["frames"].shape == (2, 19, 3, side, side)
    assert names["video"].shape == (2, 19, side, side, 3)
    assert names["latents"].shape == (2, 19, *small[1:])
