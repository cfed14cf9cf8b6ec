"""The README's Python snippets run as they stand there, on a tiny run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

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
    cache = latent_cache.open("latents/shapes.zarr")
    np.testing.assert_array_equal(names["first_video"], cache.video(0))
    assert str(names["names"][0]) == cache.video_ids[0]
    assert cache.metadata.autoencoder["sha256"] in capsys.readouterr().out


def test_xarray(inside: None) -> None:
    names: dict = {"print": lambda *values: names.update(printed=values)}
    exec(snippet_with("import xarray"), names)
    names["split"].close()
    expected = latent_cache.open("latents/shapes.zarr").video("train_00003")
    np.testing.assert_array_equal(names["video"].values, expected)
    dims, shape, std = names["printed"]
    assert (dims, shape) == (("frame", "channel", "y", "x"), expected.shape)
    assert std == pytest.approx(expected.astype(np.float64).std(), rel=1e-4)


def test_dask(inside: None) -> None:
    names: dict = {"print": lambda *values: names.update(printed=values)}
    exec(snippet_with("import dask.array"), names)
    cache = latent_cache.open("latents/shapes.zarr")
    np.testing.assert_allclose(names["printed"], [cache.mean, cache.std], rtol=1e-5)


def test_checked_reading(inside: None) -> None:
    names: dict = {"print": lambda *values: names.update(printed=values)}
    exec(snippet_with('cache.video("test_00003")'), names)
    cache = latent_cache.open("latents/shapes.zarr", "test")
    np.testing.assert_array_equal(names["video"], cache.video(3))
    assert len(names["everything"]) == cache.frames == names["printed"][2]


def test_layout(inside: None) -> None:
    """The tree that is drawn is the one that is there, with its attributes."""
    (drawn,) = re.findall(r"```\n(latents/shapes\.zarr .*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    store = zarr.open_group("latents/shapes.zarr", mode="r")
    arrays = dict(re.findall(r"│   [├└]── (\w+) +\[([^]]*)\]", drawn))
    assert arrays.keys() == dict(store["train"].arrays()).keys()
    for name in ("latents", "codes"):
        assert ", ".join(store[f"train/{name}"].metadata.dimension_names) == arrays[name]
    assert set(re.findall(r"^[├└]── (\w+)", drawn, re.MULTILINE)) == set(store.group_keys())
    for attribute in re.findall(r"\w+", re.sub(r"\(.*?\)", "", drawn.splitlines()[0].partition("attributes:")[2])):
        assert attribute in store.attrs


def test_inspect_and_verify(inside: None, command, trained) -> None:
    """The commands of the section, as `make` calls them, on the tiny run."""
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## Direct Zarr inspection") : text.index("## Python API")]
    for words in re.findall(r'make inspect ARGS=("[^"]*"|\S+)', section):
        outcome = trained.run("inspect", *words.strip('"').split()).ok()
        assert "latents of tiny" in outcome.out
    assert Path("video.gif").stat().st_size > 0
    counts = re.findall(r"make verify N=(\d+)", section)
    assert counts
    for count in (*counts, "0"):
        assert "match their checksums" in trained.run("encode", "--verify", count).ok().out


def test_latent_cache(inside: None) -> None:
    names: dict = {}
    exec(snippet_with(".latents .codes .video_ids"), names)
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
        "noise": torch.zeros(2, *small),
        "indices": torch.zeros(2, 8, 2, dtype=torch.int64),
    }
    exec(snippet_with("VideoPredictor.from_run"), names)
    assert names["frames"].shape == (2, 19, 3, side, side)
    assert names["video"].shape == (2, 19, side, side, 3)
    assert names["several"].shape == (6, 19, 3, side, side)
    assert names["replayed"].shape == (2, 5, *small[1:])
    assert names["latents"].shape == (2, 19, *small[1:])
