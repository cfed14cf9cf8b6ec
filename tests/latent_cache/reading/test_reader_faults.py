"""A damaged or foreign store is refused, in words that say what and where."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

import latent_cache
from latent_cache import CorruptStoreError, IncompleteStoreError, StoreError


@pytest.fixture
def path(kit, tmp_path) -> Path:
    return kit.build(tmp_path / "toys.zarr")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "flipped bit": (flip_a_bit, "is damaged"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-7]), "is truncated .*: 189 bytes, not 196"),
    "no checksum": (lambda file: file.write_bytes(file.read_bytes()[:-4]), "is truncated or overlong: 192 bytes"),
    "overlong": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "is truncated or overlong: 197 bytes"),
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "missing": (lambda file: file.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("index", [1, 5])  # a full chunk, and the partial last one
@pytest.mark.parametrize("how", ["load", "load without sizes", "video", "zarr"])
def test_a_damaged_chunk_names_its_file_and_its_videos(path, monkeypatch, damage, index, how):
    break_it, message = DAMAGES[damage]
    file = path / f"train/latents/c/{index}/0/0/0"
    break_it(file)
    carried = {1: r"1 video\(s\): 'clip-01'", 5: r"1 video\(s\): 'clip-04'"}[index]
    cache = latent_cache.open(path)
    if how == "load without sizes":
        monkeypatch.setattr(cache.latent_reader.__class__, "check_files", lambda self: None)
    if how == "zarr":  # the way of remote stores
        monkeypatch.setattr(cache.latent_reader.__class__, "_plain_folder", None)
        monkeypatch.setattr(cache.latent_reader.__class__, "check_files", lambda self: None)
    with pytest.raises(CorruptStoreError, match=rf"{file} {message}.*It carries {carried}.*--overwrite"):
        cache.video({1: "clip-01", 5: "clip-04"}[index]) if how == "video" else cache.load()


def test_damage_in_the_padding_is_noticed_too(path):
    file = path / "train/latents/c/5/0/0/0"  # 2 frames of 4
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptStoreError, match="c/5/0/0/0 is damaged"):
        latent_cache.open(path).load()


def test_many_missing_chunks_are_counted(kit, tmp_path):
    path = kit.build(tmp_path / "many.zarr", {"train": kit.plan([1] * 20)})
    for index in (1, 2, 4):
        (path / f"train/latents/c/{index}/0/0/0").unlink()
    message = r"c/1/0/0/0 is missing \(3 of 5 files are unusable\).*4 video\(s\): 'clip-04', .*'clip-06', \.\.\."
    with pytest.raises(CorruptStoreError, match=message):
        latent_cache.open(path).load()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_behind_a_right_checksum_is_refused(path, value):
    zarr.open_array(path / "train/latents", mode="r+")[5, 1, 2, 3] = value
    cache = latent_cache.open(path)
    for read in (cache.load, lambda: cache.video("clip-01")):
        with pytest.raises(CorruptStoreError, match=r"c/1/0/0/0 holds NaN or infinity.*'clip-01'"):
            read()
    assert np.isfinite(cache.video("clip-04")).all()


@pytest.mark.parametrize("damage", ["flipped bit", "empty", "missing"])
def test_damaged_codes(path, damage):
    DAMAGES[damage][0](path / "train/codes/c/1/0/0")
    with pytest.raises(CorruptStoreError, match=r"codes/c/1/0/0 (is missing|is empty|is damaged).*'clip-01'"):
        latent_cache.open(path).video_codes("clip-01")


def edit_attrs(path: Path, **changes: object) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    metadata["attributes"] |= changes
    metadata["attributes"] = {key: value for key, value in metadata["attributes"].items() if value is not None}
    (path / "zarr.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"complete": False}, IncompleteStoreError, "is not complete: run `make encode` again"),
        ({"complete": None}, IncompleteStoreError, "is not complete"),
        ({"complete": "yes"}, IncompleteStoreError, "is not complete"),
        ({"format": "river-pixels"}, StoreError, "its format is 'river-pixels', not 'river-latents'"),
        ({"format": None}, StoreError, "its format is None"),
        ({"format_version": 2}, StoreError, "format_version is 2, and this program knows 1: update the program"),
        ({"fps": None}, CorruptStoreError, "root attributes are damaged .*fps.*--overwrite"),
        ({"autoencoder": "vqgan"}, CorruptStoreError, "root attributes are damaged"),
    ],
)
def test_root_attributes(path, changes, error, message):
    edit_attrs(path, **changes)
    with pytest.raises(error, match=rf"{path}.*{message}"):
        latent_cache.open(path)


def test_an_incomplete_store_tells_about_itself(kit, tmp_path):
    path = kit.build(tmp_path / "half.zarr", stop_after=2)
    assert latent_cache.open_metadata(path) == kit.metadata
    assert latent_cache.splits(path) == ["train", "test"]
    assert not latent_cache.is_complete(path)
    with pytest.raises(IncompleteStoreError, match="run `make encode` again, it goes on from there"):
        latent_cache.open(path)


def test_places_without_a_store(path, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert not latent_cache.is_complete(tmp_path / "nowhere")
    assert not latent_cache.is_complete(empty)
    assert latent_cache.is_complete(path)
    (empty / ".encoding").mkdir()
    assert not latent_cache.is_complete(empty)
    old = tmp_path / "old"
    zarr.open_group(old, mode="w", zarr_format=2)
    file = tmp_path / "file.zarr"
    file.write_text("")
    for place, error, message in [
        (tmp_path / "nowhere", StoreError, "there is no such path: write the store with `make encode`"),
        (tmp_path, StoreError, "not a Zarr v3 group"),
        (old, StoreError, "not a Zarr v3 group"),
        (file, StoreError, "a file, and a store is a folder"),
        (empty, IncompleteStoreError, "only begun: run `make encode` again"),
        (path / "train" / "latents", StoreError, "a Zarr array, not a store"),
        (path / "train", StoreError, "its format is None"),
        ("nonsense://bucket/a.zarr", StoreError, "cannot be opened"),
    ]:
        with pytest.raises(error, match=message):
            latent_cache.open(place)


def test_unknown_split(path):
    with pytest.raises(StoreError, match=r"no split 'val': there are \['train', 'test'\]"):
        latent_cache.open(path, split="val")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"node_type": "group"}'])
@pytest.mark.parametrize("where", ["zarr.json", "train/latents/zarr.json", "train/video_offset/zarr.json"])
def test_torn_metadata(path, where, content):
    (path / where).write_text(content)
    with pytest.raises(StoreError, match=str(path)):
        latent_cache.open(path)


@pytest.mark.parametrize("name", ["video_offset", "video_id", "video_view"])
@pytest.mark.parametrize("damage", ["flipped bit", "empty", "missing"])
def test_damaged_index(path, name, damage):
    DAMAGES[damage][0](path / "train" / name / "c" / "0")
    with pytest.raises(CorruptStoreError, match=rf"{path}/train"):
        latent_cache.open(path)


def test_missing_statistics(path):
    metadata = json.loads((path / "train/latents/zarr.json").read_text())
    metadata["attributes"] = {}
    (path / "train/latents/zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(CorruptStoreError, match=r"attribute is missing or damaged .*mean"):
        latent_cache.open(path)
