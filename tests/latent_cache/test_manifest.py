"""The manifest: files that were exchanged, edited or lost are found, though each is sound in itself."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import pytest

import latent_cache
from latent_cache import CorruptStoreError, LockedStoreError, LostManifestError, ReplacedStoreError, StoreError
from tests.latent_cache.conftest import StoreKit, flip_a_bit


def read_everything(url: str | Path) -> None:
    """What commands read of a store: chunks directly and through zarr, codes, names, and what belongs to a video."""
    for split in latent_cache.splits(url):
        cache = latent_cache.open(url, split)
        cache.load()
        for row, _ in enumerate(list(cache.video_ids)):
            cache.video(row)
            if cache.codes is not None:
                cache.video_codes(row)
        _ = list(cache.video_views), cache.video_fps, cache.video_sizes, cache.fingerprints, cache.codebook


def edit(document: Path, *replacements: tuple[str, str]) -> None:
    text = json.dumps(json.loads(document.read_text()))
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    document.write_text(text)


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def transpose(store: Path, _: Path) -> None:
    """Height for width, in all that says so."""
    for name in ("latents", "codes"):
        edit(store / "train" / name / "zarr.json", ("3, 4]", "4, 3]"))


def copy_split(store: Path, other: Path) -> None:
    shutil.rmtree(store / "test")
    shutil.copytree(other / "test", store / "test")


LATENTS = "train/latents/c/{}/0/0/0"
BYTES = '{"name": "bytes", "configuration": {"endian": "little"}}'
TRANSPOSED = '{"name": "transpose", "configuration": {"order": [0, 1, 3, 2]}}, '
# Each was accepted without a word before there were manifests, `--verify` included. By file that is to be named.
EXCHANGES: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "two chunks": ("train/latents/c/1", lambda s, _: swap(s / LATENTS.format(1), s / LATENTS.format(2))),
    "a chunk of another store": (
        "train/latents/c/2", lambda s, o: shutil.copy(o / LATENTS.format(2), s / LATENTS.format(2)),
    ),
    "a chunk of another split": (
        "train/latents/c/3", lambda s, _: shutil.copy(s / "test/latents/c/0/0/0/0", s / LATENTS.format(3)),
    ),
    "two chunks of codes": ("train/codes/c/0", lambda s, _: swap(s / "train/codes/c/0/0/0", s / "train/codes/c/1/0/0")),
    "names": ("train/video_id/c/0", lambda s, o: shutil.copy(o / "train/video_id/c/0", s / "train/video_id/c/0")),
    "codes lost": ("train/codes/zarr.json", lambda s, _: shutil.rmtree(s / "train/codes")),
    "rates lost": ("train/video_fps/zarr.json", lambda s, _: shutil.rmtree(s / "train/video_fps")),
    "transposed shape": ("train/latents/zarr.json", transpose),
    "transposed by a codec": (
        "train/latents/zarr.json", lambda s, _: edit(s / "train/latents/zarr.json", (BYTES, TRANSPOSED + BYTES)),
    ),
    "edited mean": (
        "train/latents/zarr.json", lambda s, _: edit(s / "train/latents/zarr.json", ('"mean": [-0', '"mean": [-1')),
    ),
    "flipped bit in fps": ("zarr.json", lambda s, _: edit(s / "zarr.json", ("25.0", "35.0"))),
    "another autoencoder": ("zarr.json", lambda s, _: edit(s / "zarr.json", ("3f9a", "3f9b"))),
    "a split of another store": ("test/latents/zarr.json", copy_split),
}  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the same shapes as `toys`, of other videos."""
    kit = StoreKit()
    names = {"train": [f"film-{row:02d}" for row in range(5)], "test": ["film-00"]}
    lengths = {"train": [3, 7, 2, 1, 9], "test": [5]}
    plans = {split: kit.plan(lengths[split], names=names[split]) for split in names}
    return kit.build(tmp_path_factory.mktemp("other") / "other.zarr", plans)


@pytest.mark.parametrize("name", EXCHANGES)
def test_what_is_sound_but_not_the_stores_own_is_found(toys, other, publish, name: str) -> None:
    file, exchange = EXCHANGES[name]
    exchange(toys, other)
    for place in (toys, publish(toys)):
        with pytest.raises(CorruptStoreError, match=f"{place}.*{file}.*--overwrite"):
            read_everything(place)
    wrong = [key for key, what in latent_cache.changed_files(toys) if what] if file != "zarr.json" else [file]
    assert any(key.startswith(file) for key in wrong)
    latent_cache.unseal(toys)
    read_everything(toys)  # what the other checks find


def test_an_unfinished_copy(toys, tmp_path) -> None:
    """Whichever file lacks: the manifest itself, too."""
    lacking = ["manifest/zarr.json", "train/video_size/zarr.json", "codebook/zarr.json", LATENTS.format(5)]
    for file in lacking:
        copy = shutil.copytree(toys, tmp_path / "copy.zarr")
        (copy / file).unlink()
        with pytest.raises(CorruptStoreError, match=f"{copy}.*{file}"):
            read_everything(copy)
        shutil.rmtree(copy)


def test_any_copy_is_the_same_store(toys, publish, tmp_path) -> None:
    archive = shutil.make_archive(str(tmp_path / "toys"), "zip", tmp_path, "toys.zarr")
    for place in (shutil.copytree(toys, tmp_path / "copy"), publish(toys), f"zip://toys.zarr::file://{archive}"):
        assert latent_cache.is_sealed(place)
        read_everything(place)
        assert not [key for key, what in latent_cache.changed_files(place) if what]


@pytest.mark.parametrize("remote", [False, True], ids=["file", "url"])
def test_exchanged_parts_of_shards(kit, shards, tmp_path, publish, remote: bool) -> None:
    """Two shards, two chunks within a shard, and two entries of the index at its end, with right checksums."""

    def move_entries(file: Path) -> None:
        content = bytearray(file.read_bytes())
        first, second = content[-52:-36], content[-36:-20]
        content[-52:-4] = second + first + content[-20:-4]
        content[-4:] = struct.pack("<I", google_crc32c.value(bytes(content[-52:-4])))
        file.write_bytes(content)

    def move_chunks(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[196:392] + content[:196] + content[392:])

    path = kit.build(tmp_path / "shards.zarr", shards)
    read_everything(publish(path) if remote else path)
    one, two = path / LATENTS.format(0), path / LATENTS.format(1)
    for damage in (lambda: swap(one, two), lambda: move_entries(one), lambda: move_chunks(one)):
        before = one.read_bytes(), two.read_bytes()
        damage()
        with pytest.raises(CorruptStoreError, match=r"train/latents/c/0/0/0/0"):
            read_everything(publish(path) if remote else path)
        assert "" not in [what for key, what in latent_cache.changed_files(path) if key == LATENTS.format(0)]
        one.write_bytes(before[0])
        two.write_bytes(before[1])


def test_a_flipped_bit_of_the_manifest_is_no_fault_of_other_files(toys, all_files) -> None:
    document = toys / "manifest/zarr.json"
    before = document.read_bytes()
    start = before.index(b'"autoencoder"')
    for place in range(start, len(before), len(before) // 40):
        flip_a_bit(document, place)
        if json.loads(before) != _parsed(document):  # otherwise it was between two values
            with pytest.raises(LostManifestError, match=f"{document}.*--seal"):
                latent_cache.open(toys)
        document.write_bytes(before)
    document.write_bytes(b"")
    latent_cache.seal(toys)
    assert document.read_bytes() == before


def _parsed(document: Path) -> object:
    try:
        return json.loads(document.read_bytes())
    except ValueError:
        return None


# Stores without a manifest


def test_an_old_store_is_read_with_one_line_that_tells_how_to_seal_it(first_store, caplog) -> None:
    read_everything(first_store)
    (line,) = caplog.messages
    assert str(first_store) in line
    assert "inspect" in line
    assert "--seal" in line
    assert not latent_cache.is_sealed(first_store)
    fingerprint = latent_cache.open(first_store).fingerprint
    latent_cache.seal(first_store)
    assert latent_cache.is_sealed(first_store)
    read_everything(first_store)
    assert latent_cache.open(first_store).fingerprint == fingerprint
    assert len(caplog.messages) == 1


def test_sealing_gives_the_manifest_that_the_writer_gives(kit, shards, tmp_path, all_files) -> None:
    path = kit.build(tmp_path / "toys.zarr", shards)
    before = all_files(path)
    latent_cache.unseal(path)
    latent_cache.seal(path)
    assert all_files(path) == before


def test_sealing_that_is_interrupted_is_repeated(toys, monkeypatch) -> None:
    latent_cache.unseal(toys)
    for stop_at in range(20):
        calls = iter(range(stop_at))

        def stop(descriptor: int, calls=calls) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt

        monkeypatch.setattr("os.fsync", stop)
        try:
            latent_cache.seal(toys)
        except KeyboardInterrupt:
            try:
                read_everything(toys)
            except LostManifestError:
                pass
        else:
            break
    assert 2 <= stop_at < 19
    read_everything(toys)
    assert latent_cache.is_sealed(toys)


def test_what_cannot_be_sealed(kit, toys, publish, tmp_path) -> None:
    with pytest.raises(StoreError, match=r"memory://.*local"):
        latent_cache.seal(publish(toys))
    with pytest.raises(StoreError, match=r"not complete.*river encode"):
        latent_cache.seal(kit.build(tmp_path / "half.zarr", stop_after=2))
    (toys / ".encoding").mkdir()
    (toys / ".encoding/writer.lock").write_text('{"host": "elsewhere", "pid": 12}')
    with pytest.raises(LockedStoreError, match="12 on elsewhere"):
        latent_cache.seal(toys)


# A store that is written again under a reader


@pytest.mark.parametrize("residency", ["stream", "video"])
@pytest.mark.parametrize("again", ["written", "being written"])
def test_a_reader_notices_that_the_store_was_written_again(kit, toys, residency: str, again: str) -> None:
    cache = latent_cache.open(toys)
    sampler = latent_cache.open_sampler(cache, "cpu", 0, 4, 5, residency="stream", memory_budget=3072)
    sampler.batch(0)
    kit.metadata = replace(kit.metadata, autoencoder={"sha256": "77c1"})
    names = [f"film-{row:02d}" for row in range(5)]
    plans = {"train": kit.plan([3, 7, 2, 1, 9], names=names), "test": kit.plan([5])}
    kit.build(toys, plans, overwrite=True, stop_after=None if again == "written" else 1)
    read = (lambda: [sampler.batch(step) for step in range(1, 20)]) if residency == "stream" else lambda: cache.video(3)
    with pytest.raises(ReplacedStoreError, match=f"{toys}.*start .* again"):
        read()
    sampler.close()
