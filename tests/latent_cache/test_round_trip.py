"""What is written is what is read, by us and by everybody else who reads Zarr."""

import tempfile
from dataclasses import replace
from pathlib import Path

import dask.array
import fsspec
import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import latent_cache
from latent_cache import StoreError, StoreMetadata, StoreWriter


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    chunk_frames=st.integers(1, 12),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_ragged_videos_come_back(lengths, chunk_frames, dtype):
    generator = np.random.default_rng(0)
    names = [f"v{row}" for row in range(len(lengths))]
    plan = latent_cache.SplitPlan(names, ["identity"] * len(names), lengths, (2, 3, 4), chunk_frames)
    metadata = StoreMetadata("toys", 25.0, {}, {"sha256": "3f9a"}, {})
    latents = generator.normal(size=(plan.frames, 2, 3, 4)).astype(dtype)
    codes = generator.integers(0, 65536, (plan.frames, 3, 4))
    with tempfile.TemporaryDirectory() as folder:
        with StoreWriter.open(Path(folder, "a.zarr"), metadata, {"train": plan}, codes=True, dtype=dtype) as writer:
            for chunk in writer.pending("train"):
                rows = slice(chunk.start, chunk.stop)
                writer.write_chunk("train", chunk, latents[rows], codes[rows])
            writer.finish()
        cache = latent_cache.open(Path(folder, "a.zarr"))
        loaded = cache.load()
        assert loaded.dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(loaded.numpy(), latents)
        np.testing.assert_array_equal(cache.codes[:], codes)
        np.testing.assert_array_equal(cache.lengths, lengths)
        assert cache.video_ids == names
        for row, name in enumerate(names):
            rows = slice(plan.offsets[row], plan.offsets[row + 1])
            np.testing.assert_array_equal(cache.video(name), latents[rows])
            np.testing.assert_array_equal(cache.video_codes(row), codes[rows])


def test_layout_is_the_documented_one(kit, tmp_path):
    path = kit.build(tmp_path / "toys.zarr")
    group = zarr.open_group(path, mode="r")
    assert dict(group.attrs) == {
        "format": "river-latents",
        "format_version": 1,
        "dataset": "toys",
        "fps": 25.0,
        "preprocessing": {"image_size": 24, "resize": "area"},
        "autoencoder": {"architecture": "vqgan", "sha256": "3f9a", "downsampling": 8},
        "software": {"zarr": "3"},
        "splits": ["train", "test"],
        "notes": {},
        "complete": True,
    }
    assert group.metadata.consolidated_metadata is None
    latents, codes = group["train/latents"], group["train/codes"]
    assert [codec.to_dict()["name"] for codec in latents.metadata.codecs] == ["bytes", "crc32c"]
    assert [codec.to_dict()["name"] for codec in codes.metadata.codecs] == ["bytes", "zstd"]
    assert (latents.dtype, latents.chunks, latents.shards) == (np.float16, (4, 2, 3, 4), None)
    assert np.isnan(latents.fill_value)
    assert (codes.dtype, codes.chunks) == (np.uint16, (4, 3, 4))
    dimensions = {name: array.metadata.dimension_names for name, array in group["train"].arrays()}
    assert dimensions == {
        "latents": ("frame", "channel", "y", "x"),
        "codes": ("frame", "y", "x"),
        "video_offset": ("video_boundary",),
        "video_id": ("video",),
        "video_view": ("video",),
        "video_fingerprint": ("video",),
    }
    assert group["train/video_offset"].dtype == np.int64
    assert not (path / ".encoding").exists()


def test_statistics_are_those_of_the_stored_training_split_in_every_split(kit, tmp_path):
    plans = {"train": kit.plan([30, 11]), "val": kit.plan([5], names=["other"])}
    path = kit.build(tmp_path / "toys.zarr", plans)
    exact = zarr.open_array(path / "train" / "latents", mode="r")[:].astype(np.float64)
    for split in plans:
        attrs = zarr.open_array(path / split / "latents", mode="r").attrs
        np.testing.assert_allclose(attrs["mean"], exact.mean(axis=(0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(attrs["std"], exact.std(axis=(0, 2, 3)), rtol=1e-12)
        cache = latent_cache.open(path, split)
        assert cache.mean.dtype == cache.std.dtype == np.float32
        np.testing.assert_array_equal(cache.std, np.float32(attrs["std"]))


def test_a_constant_channel_has_deviation_zero(kit, tmp_path):
    plan = kit.plan([9])
    with StoreWriter.open(tmp_path / "a.zarr", kit.metadata, {"train": plan}, codes=False) as writer:
        for chunk in writer.pending("train"):
            writer.write_chunk("train", chunk, np.full((chunk.frames, *kit.shape), 0.1), None)
        writer.finish()
    cache = latent_cache.open(tmp_path / "a.zarr")
    assert cache.codes is None
    np.testing.assert_array_equal(cache.std, 0)
    with pytest.raises(StoreError, match=r"no codes: encode again with cache\.codes=true"):
        cache.video_codes(0)


def test_other_programs_can_open_it(kit, tmp_path):
    path = kit.build(tmp_path / "toys.zarr")
    expected = kit.expected(kit.plan([3, 7, 2, 1, 9])).astype(np.float16)
    np.testing.assert_array_equal(zarr.open(path, mode="r")["train/latents"][:], expected)
    np.testing.assert_array_equal(dask.array.from_zarr(str(path), component="train/latents").compute(), expected)
    with xarray.open_zarr(path, group="train", consolidated=False) as dataset:
        assert dataset["latents"].dims == ("frame", "channel", "y", "x")
        assert dataset["codes"].dims == ("frame", "y", "x")
        np.testing.assert_array_equal(dataset["latents"].values, expected)
        assert list(dataset["video_id"].values) == [f"clip-{row:02d}" for row in range(5)]


def test_a_store_behind_a_url(kit, tmp_path):
    path = kit.build(tmp_path / "toys.zarr")
    memory = fsspec.filesystem("memory")
    memory.put(str(path), "/copies/toys.zarr", recursive=True)
    try:
        cache = latent_cache.open("memory://copies/toys.zarr", split="test")
        local = latent_cache.open(path.as_uri(), split="test")
        assert torch.equal(cache.load(), local.load())
        assert cache.fingerprint == local.fingerprint
        assert latent_cache.splits("memory://copies/toys.zarr") == ["train", "test"]
        memory.rm("/copies/toys.zarr/test/latents/c/1/0/0/0")
        with pytest.raises(latent_cache.CorruptStoreError, match=r"memory://.*/c/1/0/0/0 is missing"):
            latent_cache.open("memory://copies/toys.zarr", split="test").load()
    finally:
        memory.rm("/copies", recursive=True)


def test_finding_a_video(kit, tmp_path):
    cache = latent_cache.open(kit.build(tmp_path / "toys.zarr"))
    assert cache.latent_shape == kit.shape
    np.testing.assert_array_equal(cache.video("clip-03"), cache.video(3))
    for wanted, view, message in [
        ("clip-3", "identity", "did you mean one of .*clip-03"),
        ("clip-03", "hflip", r"no view 'hflip': it has \['identity'\]"),
        (5, "identity", "no video 5: rows are 0 to 4"),
    ]:
        with pytest.raises(StoreError, match=message):
            cache.video(wanted, view)


def test_fingerprint_changes_with_what_is_stored_and_nothing_else(kit, tmp_path):
    first = latent_cache.open(kit.build(tmp_path / "a.zarr"))
    assert latent_cache.open(tmp_path / "a.zarr").fingerprint == first.fingerprint
    kit.metadata = replace(kit.metadata, software={"zarr": "4"})
    assert latent_cache.open(kit.build(tmp_path / "b.zarr")).fingerprint == first.fingerprint
    others = [latent_cache.open(tmp_path / "a.zarr", "test").fingerprint]
    others.append(latent_cache.open(kit.build(tmp_path / "c.zarr", {"train": kit.plan([3, 7, 2, 2, 8])})).fingerprint)
    kit.metadata = replace(kit.metadata, autoencoder={"sha256": "77c1"})
    others.append(latent_cache.open(kit.build(tmp_path / "d.zarr")).fingerprint)
    assert len({first.fingerprint, *others}) == 4


def test_metadata_must_be_json_and_name_the_autoencoder():
    with pytest.raises(ValueError, match=r"metadata\.preprocessing .* cannot be written as JSON"):
        StoreMetadata("toys", 25.0, {"size": Path("a")}, {"sha256": "3f9a"}, {})
    with pytest.raises(ValueError, match="lacks `sha256`"):
        StoreMetadata("toys", 25.0, {}, {"architecture": "vqgan"}, {})
    assert StoreMetadata("toys", 25.0, {"size": (64, 64)}, {"sha256": "a"}, {}).preprocessing == {"size": [64, 64]}
