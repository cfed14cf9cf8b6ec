"""What is written is read, by us and by other programs; damaged, incomplete and foreign stores are refused."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import dask.array
import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import latent_cache
from latent_cache import (
    CorruptStoreError,
    IncompleteStoreError,
    SplitPlan,
    StoreError,
    StoreMetadata,
    StoreWriter,
    schema,
)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    chunk_frames=st.integers(1, 12),
    shard_chunks=st.integers(1, 3),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_ragged_videos_come_back(lengths, chunk_frames, shard_chunks, dtype):
    generator = np.random.default_rng(0)
    names = [f"v{row}" for row in range(len(lengths))]
    plan = SplitPlan(names, ["identity"] * len(names), lengths, (2, 3, 4), chunk_frames, shard_chunks=shard_chunks)
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


def test_layout_is_the_documented_one(toys):
    group = zarr.open_group(toys, mode="r")
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
        "manifest": True,
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
        "video_fps": ("video",),
        "video_size": ("video", "width_height"),
    }
    assert group["train/video_offset"].dtype == np.int64
    assert (group["train/video_fps"].dtype, group["train/video_size"].dtype) == (np.float32, np.int32)
    assert (group["codebook"].dtype, group["codebook"].metadata.dimension_names) == (np.float32, ("code", "channel"))
    assert all(array.attrs["description"] for _, array in [*group["test"].arrays(), *group.arrays()])
    assert not (toys / ".encoding").exists()


def test_rate_and_size_belong_to_the_video(kit, tmp_path):
    plan = kit.plan([3, 5, 2], fps=[10, 29.97, 0.5], sizes=[(160, 120), (0, 0), (1920, 1080)])
    path = kit.build(tmp_path / "rates.zarr", {"train": plan, "test": kit.plan([4])})
    train, test = latent_cache.open(path), latent_cache.open(path, "test")
    np.testing.assert_array_equal(train.video_fps, np.float32([10, 29.97, 0.5]))
    np.testing.assert_array_equal(train.video_sizes, [(160, 120), (0, 0), (1920, 1080)])
    assert train.video_fps.dtype == np.float32
    # A plan without rates: all videos have the store's.
    assert (test.video_fps.tolist(), test.video_sizes.tolist()) == ([25.0], [[0, 0]])
    for wrong in ({"fps": [10]}, {"fps": [[10]] * 3}, {"sizes": [1, 2, 3]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kit.plan([3, 5, 2], **wrong)


def test_codes_can_be_looked_up_in_the_store(kit, toys, tmp_path):
    np.testing.assert_array_equal(latent_cache.open(toys, "test").codebook, kit.codebook)
    assert latent_cache.open(kit.build(tmp_path / "none.zarr", codes=False)).codebook is None


def test_damage_of_the_new_arrays_is_found(toys, damage):
    for file in ("train/video_fps/c/0", "train/video_size/c/0/0", "codebook/c/0/0"):
        damage(toys / file)
    cache = latent_cache.open(toys)
    for name, file in (("video_fps", "video_fps"), ("video_sizes", "video_size"), ("codebook", "codebook")):
        with pytest.raises(CorruptStoreError, match=rf"{toys}.*/{file}/c/0"):
            getattr(cache, name)
    found = [str(error) for error in (*cache.index_damages(), *latent_cache.codebook_damages(toys))]
    assert len(found) == 3
    assert latent_cache.open(toys, "test").video_fps.tolist() == [25.0]


def test_what_lies_beside_latents_and_codes(kit, toys, tmp_path, damage):
    """Small pictures and actions, per frame: read by video, checked as codes are, and not part of the fingerprint."""
    kit.extras = {"preview": (3, 4, 3), "actions": (2,)}
    path = kit.build(tmp_path / "beside.zarr")
    cache, without = latent_cache.open(path), latent_cache.open(toys)
    expected = kit.further(kit.expected(kit.plan([3, 7, 2, 1, 9])))
    np.testing.assert_array_equal(cache.video_preview("clip-01"), expected["preview"][3:10])
    np.testing.assert_array_equal(cache.video_actions("clip-01"), expected["actions"][3:10])
    frames = xarray.open_zarr(path, group="train", consolidated=False)
    assert frames.preview.dims == ("frame", "preview_y", "preview_x", "color")
    np.testing.assert_array_equal(frames.preview, expected["preview"])
    np.testing.assert_array_equal(frames.actions, expected["actions"])
    assert cache.fingerprint == without.fingerprint
    assert (without.preview, without.actions) == (None, None)
    for read in (without.video_preview, without.video_actions):
        with pytest.raises(StoreError, match=r"has no (preview|actions)"):
            read("clip-01")
    damage(path / "train/preview/c/1/0/0/0")
    damage(path / "train/actions/c/1/0")
    for read, name in ((cache.video_preview, "preview"), (cache.video_actions, "actions")):
        with pytest.raises(CorruptStoreError, match=rf"train/{name}/c/1/0.*'clip-01'"):
            read("clip-01")


def test_a_store_without_the_later_arrays_is_the_same_store(first_store):
    """It was written before `video_fps`, `video_size` and `codebook` existed: digests are those of then."""
    fingerprints = {
        "train": "f0b1b0eb06ecfc72e09a1581ea32b6e93a4d7adff6e7dc74e93a9a150bad2457",
        "val": "f58a4fc89c42a4096801a8437db83d8af52708c5b72e79b6d342cb8d0f6034a1",
        "test": "225d4aa363f72ca5f6ebb8ddfcff79ba522641e0ab74b04be46e0b344c5f706b",
    }
    assert latent_cache.splits(first_store) == list(fingerprints)
    for split, fingerprint in fingerprints.items():
        cache = latent_cache.open(first_store, split)
        assert cache.fingerprint == fingerprint
        assert cache.video_fps.tolist() == [10.0] * len(cache.video_ids)
        assert not cache.video_sizes.any()
        assert cache.codebook is None
        assert not [*cache.index_damages(), *latent_cache.codebook_damages(first_store)]
        assert torch.isfinite(cache.load()).all()


def test_the_later_arrays_leave_the_fingerprint_as_it_is(kit, tmp_path):
    def fingerprint(name: str, **options: object) -> str:
        return latent_cache.open(kit.build(tmp_path / name, {"train": kit.plan([3, 5], **options)})).fingerprint

    assert fingerprint("a.zarr") == fingerprint("b.zarr", fps=[10, 30], sizes=[(4, 3)] * 2)


def test_other_programs_can_open_it(kit, toys):
    expected = kit.expected(kit.plan([3, 7, 2, 1, 9])).astype(np.float16)
    np.testing.assert_array_equal(zarr.open(toys, mode="r")["train/latents"][:], expected)
    np.testing.assert_array_equal(dask.array.from_zarr(str(toys), component="train/latents").compute(), expected)
    with xarray.open_zarr(toys, group="train", consolidated=False) as dataset:
        assert dataset["latents"].dims == ("frame", "channel", "y", "x")
        assert dataset["codes"].dims == ("frame", "y", "x")
        np.testing.assert_array_equal(dataset["latents"].values, expected)
        assert list(dataset["video_id"].values) == [f"clip-{row:02d}" for row in range(5)]


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
    """Of values and numbers of frames whose sums of squares are rounded up."""
    plans = {"train": kit.plan([137], chunk_frames=50)}
    with StoreWriter.open(tmp_path / "a.zarr", kit.metadata, plans, codes=False, dtype="float32") as writer:
        for chunk in writer.pending("train"):
            latents = np.full((chunk.frames, *kit.shape), 0.1)
            latents[:, 1] = 0.8
            writer.write_chunk("train", chunk, latents, None)
        writer.finish()
    cache = latent_cache.open(tmp_path / "a.zarr")
    assert cache.codes is None
    np.testing.assert_array_equal(cache.std, 0)
    with pytest.raises(StoreError, match=r"a\.zarr.*cache\.codes=true"):
        cache.video_codes(0)


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


def test_fingerprint_depends_on_where_videos_begin(kit, tmp_path, monkeypatch):
    """The same latents, names, statistics and metadata, cut into videos at another place."""
    monkeypatch.setattr(kit, "latents", lambda plan, chunk: np.full((chunk.frames, *kit.shape), 2.0, np.float32))
    lengths = {"a": [3, 7], "b": [3, 7], "c": [4, 6]}
    made = [
        latent_cache.open(kit.build(tmp_path / f"{name}.zarr", {"train": kit.plan(each)}))
        for name, each in lengths.items()
    ]
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint


def test_metadata_must_be_json_and_name_the_autoencoder():
    with pytest.raises(ValueError, match=r"metadata\.preprocessing"):
        StoreMetadata("toys", 25.0, {"size": Path("a")}, {"sha256": "3f9a"}, {})
    with pytest.raises(ValueError, match=r"metadata\.autoencoder.*sha256"):
        StoreMetadata("toys", 25.0, {}, {"architecture": "vqgan"}, {})
    assert StoreMetadata("toys", 25.0, {"size": (64, 64)}, {"sha256": "a"}, {}).preprocessing == {"size": [64, 64]}


# What is no complete store of latents


def edit_attrs(file: Path, **changes: object) -> None:
    """Change attributes of a zarr.json, or remove those that become None."""
    metadata = json.loads(file.read_text())
    attributes = metadata["attributes"] | changes
    metadata["attributes"] = {key: value for key, value in attributes.items() if value is not None}
    file.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"complete": False}, IncompleteStoreError, "`river encode`"),
        ({"complete": "yes"}, IncompleteStoreError, "`river encode`"),
        ({"format": "river-pixels"}, StoreError, "'river-pixels'.*'river-latents'"),
        ({"format": None}, StoreError, "None"),
        ({"format_version": 2}, StoreError, "format_version is 2.* 1: update"),
        ({"fps": None}, CorruptStoreError, "fps.*--overwrite"),
        ({"autoencoder": "vqgan"}, CorruptStoreError, "--overwrite"),
    ],
)
def test_root_attributes(toys, changes, error, message):
    latent_cache.unseal(toys)
    edit_attrs(toys / "zarr.json", **changes)
    with pytest.raises(error, match=rf"{toys}.*{message}"):
        latent_cache.open(toys)


def test_an_incomplete_store_has_metadata_splits_and_progress(kit, tmp_path):
    path = kit.build(tmp_path / "half.zarr", stop_after=2)
    assert latent_cache.open_metadata(path) == kit.metadata
    assert latent_cache.splits(path) == ["train", "test"]
    assert not latent_cache.is_complete(path)
    train, test = latent_cache.open_progress(path).values()
    assert (train.written, train.chunks, train.frames, train.frames_per_chunk) == (2, 6, 22, 4)
    assert (test.written, test.chunks, test.last_write) == (0, 2, None)
    assert train.last_write > 0


def test_places_without_a_store(toys, tmp_path):
    empty, begun, old, file = (tmp_path / name for name in ("empty", "begun", "old", "file.zarr"))
    empty.mkdir()
    (begun / ".encoding").mkdir(parents=True)
    zarr.open_group(old, mode="w", zarr_format=2)
    file.write_text("")
    assert latent_cache.is_complete(toys)
    for place in (tmp_path / "nowhere", empty, begun):
        assert not latent_cache.is_complete(place)
    for place, error, message in [
        (tmp_path / "nowhere", StoreError, "no such path.*`river encode`"),
        (tmp_path, StoreError, "Zarr v3 group.*paths.latents"),
        (old, StoreError, "Zarr v3 group"),
        (file, StoreError, "a file.*folder"),
        (begun, IncompleteStoreError, "`river encode`"),
        (toys / "train" / "latents", StoreError, "Zarr array, not a store"),
        (toys / "train", StoreError, "format is None"),
        ("nonsense://bucket/a.zarr", StoreError, "protocol"),
    ]:
        with pytest.raises(error, match=rf"{place}.*{message}"):
            latent_cache.open(place)
    with pytest.raises(StoreError, match=r"'val'.*\['train', 'test'\]"):
        latent_cache.open(toys, split="val")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"node_type": "group"}'])
@pytest.mark.parametrize("where", ["zarr.json", "train/latents/zarr.json", "train/video_offset/zarr.json"])
def test_torn_metadata(toys, where, content):
    latent_cache.unseal(toys)
    (toys / where).write_text(content)
    with pytest.raises(StoreError, match=str(toys)):
        latent_cache.open(toys)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda train: edit_attrs(train / "latents/zarr.json", mean=None),
        lambda train: edit_attrs(train / "latents/zarr.json", std=[1.0]),
        lambda train: edit_attrs(train / "latents/zarr.json", mean=[0.0, float("nan")]),
        lambda train: zarr.open_array(train / "latents", mode="r+").resize((21, 2, 3, 4)),
        lambda train: zarr.open_array(train / "codes", mode="r+").resize((21, 3, 4)),
        lambda train: zarr.open_array(train / "video_id", mode="r+").resize((4,)),
        lambda train: zarr.open_array(train / "video_offset", mode="r+").set_basic_selection(0, 1),
        lambda train: zarr.open_array(train / "video_offset", mode="r+").set_basic_selection(2, 3),
    ],
    ids=["no mean", "short std", "nan", "fewer latents", "fewer codes", "fewer names", "first offset", "empty video"],
)
def test_arrays_that_do_not_fit_together(toys, break_it):
    latent_cache.unseal(toys)
    break_it(toys / "train")
    with pytest.raises(CorruptStoreError, match=rf"{toys}/train.*--overwrite"):
        latent_cache.open(toys)


# Names

WORDS = ["a", "bé", "\N{ROCKET}", "d d", "e\n", "f", "g" * 300, "h", "a2", "j"]


@pytest.fixture
def named(kit, tmp_path, monkeypatch) -> Path:
    """A store of ten videos, with names in chunks of three: 3, 3, 3 and 1."""
    monkeypatch.setattr(schema, "NAME_CHUNK", 3)
    return kit.build(tmp_path / "named.zarr", {"train": kit.plan([1] * 10, names=WORDS)})


def test_names_are_a_sequence(named) -> None:
    names = latent_cache.open(named).video_ids
    assert list(names) == WORDS
    assert [names[index] for index in range(-10, 10)] == WORDS + WORDS
    for key in (slice(2, 7), slice(None, None, -1), slice(1, 9, 3), slice(5, 2)):
        assert names[key] == WORDS[key]
    for index in (10, -11):
        with pytest.raises(IndexError):
            names[index]
    assert "\N{ROCKET}" in names
    assert "nobody" not in names
    assert 3 not in names
    assert names.index("h") == 7
    assert names == tuple(WORDS)
    for other in (WORDS[:-1], [*WORDS[:-1], "k"], 3):
        assert names != other


def test_a_video_is_found_by_name_and_view(kit, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(schema, "NAME_CHUNK", 2)
    ids, views = ["a", "a", "b", "c", "c", "c", "d"], ["identity", "hflip", "identity", "identity", "hflip", "x", "y"]
    cache = latent_cache.open(
        kit.build(tmp_path / "views.zarr", {"train": SplitPlan(ids, views, [1] * 7, kit.shape, 4)})
    )
    for name in {*ids, "nobody"}:
        assert cache.video_ids.find(name).tolist() == [row for row, other in enumerate(ids) if other == name]
    assert cache.row("c", "x") == 5
    assert cache.row("a", "hflip") == 1
    assert list(cache.video_views) == views
    np.testing.assert_array_equal(cache.video("b"), cache.video(2))
    for name, view, message in [
        ("bb", "identity", "'bb'.*b"),
        ("b", "hflip", r"'hflip'.*\['identity'\]"),
        (7, "identity", "no video 7.* 0 to 6"),
        (-1, "identity", "no video -1"),
    ]:
        with pytest.raises(StoreError, match=message):
            cache.video(name, view)


def test_one_chunk_of_names_is_read_for_one_name(named, monkeypatch) -> None:
    names, reads, read = latent_cache.open(named).video_ids, [], zarr.Array.__getitem__
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda self, key: reads.append(key) or read(self, key))
    assert names[4] == "e\n"
    assert names[3:6] == WORDS[3:6]
    assert reads == [slice(3, 6)]


@pytest.mark.parametrize("array", ["video_id", "video_view"])
@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_lost_names_are_noticed(named, damage, array: str, chunk: int) -> None:
    """Those of the first and the last chunk at once, others when they are read."""
    damage(named / "train" / array / "c" / str(chunk))
    message = re.escape(f"{named}/train/{array}/c/{chunk} ")
    if chunk != 1:
        with pytest.raises(CorruptStoreError, match=message):
            latent_cache.open(named)
        return
    cache = latent_cache.open(named)
    assert [str(found).startswith(f"{named}/train/{array}/c/1 ") for found in cache.index_damages()] == [True]
    names = cache.video_ids if array == "video_id" else cache.video_views
    assert names[0]
    assert names[9]
    for use in (lambda: names[4], lambda: list(names), lambda: names.find("j"), lambda: names == WORDS):
        with pytest.raises(CorruptStoreError, match=message):
            use()


def test_lost_offsets_are_noticed(toys, damage) -> None:
    damage(toys / "train/video_offset/c/0")
    with pytest.raises(CorruptStoreError, match=rf"{toys}/train"):
        latent_cache.open(toys)
