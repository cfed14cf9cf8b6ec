"""`encode --verify`: all damage and all wrong values are found and named, and a sound store is not touched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import zarr

import latent_cache
from latent_cache import StoreWriter
from pipelines.encoding.frame_verifier import LATENT_TOLERANCE
from pipelines.encoding.verification import MOST_NAMES

SETS = (
    "dataset.source=videos",
    "dataset.splits={val: 0.2, test: 0.2}",
    "dataset.split_seed=37",  # it puts two of the eight names into each of val and test
    "cache.views=[identity, hflip, jitter-1]",
    "cache.chunk_frames=20",
)
CHUNK = 20
NAMES = ("a.mp4", "b.avi", "c.gif", "d", "e.mp4", "f.avi", "deep/g.mp4", "deep/h")


@pytest.fixture(scope="module")
def encoded(story: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    """A place with videos, an autoencoder and their store. Tests copy it."""
    place = story.Place(tmp_path_factory.mktemp("verify") / "encoded", SETS)
    story.write_videos(place.data, NAMES)
    place.run("encode").ok()
    return place


@pytest.fixture
def place(encoded, tmp_path: Path):
    """A copy that a test may change."""
    return encoded.copy(tmp_path / "place", "data", "latents", "runs")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (flip_a_bit, "is damaged"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-7]), "is "),
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "missing": (lambda file: file.unlink(), "is missing"),
}


def chunk_file(place, split: str, index: int, array: str = "latents") -> Path:
    return place.store / split / array / "c" / str(index) / ("0/0/0" if array == "latents" else "0/0")


def line_with(outcome, text: str) -> str:
    (line,) = [line for line in outcome.err.splitlines() if text in line]
    return line


def videos_of(place, split: str, start: int, stop: int) -> set[str]:
    cache = latent_cache.open(place.store, split)
    rows = range(len(cache.video_ids))
    return {cache.video_ids[r] for r in rows if cache.offsets[r] < stop and cache.offsets[r + 1] > start}


# A sound store


def test_a_sound_store_is_equal_to_the_bit_and_left_as_it_is(place, story: ModuleType) -> None:
    before = story.stamps(place.store, place.runs)
    outcome = place.run("encode", "--verify", "100000").ok()
    total = sum(latent_cache.open(place.store, split).frames for split in ("train", "val", "test"))
    assert f"{total} of {total} frames, of {len(NAMES)} video(s), encoded again: {total} equal" in outcome.out
    assert outcome.err == ""
    assert story.stamps(place.store, place.runs) == before


def test_some_frames(encoded) -> None:
    assert "64 of " in encoded.run("encode", "--verify").ok().out


def test_checksums_alone_need_neither_videos_nor_autoencoder(place) -> None:
    shutil.rmtree(place.data)
    place.run("encode", "--verify", "0").ok()  # another autoencoder would be noticed
    shutil.rmtree(place.runs / "autoencoder")
    outcome = place.run("encode", "--verify", "0").ok()
    assert "0 frames encoded again" in outcome.out


def test_quiet(encoded, place) -> None:
    outcome = encoded.run("encode", "--verify", "1", "--quiet").ok()
    assert (outcome.out, outcome.err) == ("", "")
    chunk_file(place, "train", 1).unlink()
    assert "is missing" in place.run("encode", "--verify", "0", "--quiet").refused(1).err


def test_a_sharded_store(encoded, tmp_path: Path, monkeypatch) -> None:
    place = encoded.copy(tmp_path / "place", "data", "runs")
    monkeypatch.setattr("latent_cache.default_shard_chunks", lambda frames, chunk_frames: 2)
    place.run("encode").ok()
    shards = sorted((place.store / "train" / "latents" / "c").iterdir())
    assert len(shards) == 4
    place.run("encode", "--verify", "1000").ok()

    flip_a_bit(shards[1] / "0/0/0")  # in one of its two chunks
    (shards[2] / "0/0/0").unlink()
    outcome = place.run("encode", "--verify", "0").refused(1, "2 damaged")
    start, stop = (int(word) for word in line_with(outcome, "c/1/0/0/0").partition("frames ")[2].split()[:3:2])
    assert (start, stop) in ((40, 59), (60, 79))
    assert "c/2/0/0/0 is missing. It carries frames 80 to 119 of train" in outcome.err


# Damage


def test_all_damages_are_named_with_file_and_videos(place) -> None:
    broken = {
        ("train", 1, "latents"): "flipped bit",
        ("train", 3, "latents"): "missing",
        ("val", 0, "latents"): "empty",
        ("test", 0, "latents"): "truncated",
        ("train", 0, "codes"): "flipped bit",
    }
    for (split, index, array), damage in broken.items():
        DAMAGES[damage][0](chunk_file(place, split, index, array))
    outcome = place.run("encode", "--verify", "100000").refused(1, f"{len(broken)} damaged", "encode --overwrite")
    for (split, index, array), damage in broken.items():
        file, start = chunk_file(place, split, index, array), index * CHUNK
        line = line_with(outcome, f"verify: {file} {DAMAGES[damage][1]}")
        assert f"frames {start} to {start + CHUNK - 1} of {split}" in line
        for video in videos_of(place, split, start, start + CHUNK):
            assert repr(video) in line
    # Frames that can be compared still are.
    lost = len(broken) * CHUNK
    assert f"{lost} frame(s) could not be compared" in outcome.err
    compared = sum(latent_cache.open(place.store, split).frames for split in ("train", "val", "test")) - lost
    assert f"encoded again: {compared} equal" in outcome.out
    assert "differ from" not in outcome.err


@pytest.mark.parametrize(
    ("name", "damage"), [("video_id", "flipped bit"), ("video_offset", "truncated"), ("video_fingerprint", "missing")]
)
def test_damaged_names(place, name: str, damage: str) -> None:
    file = place.store / "val" / name / "c" / "0"
    DAMAGES[damage][0](file)
    chunk_file(place, "train", 2).unlink()
    outcome = place.run("encode", "--verify", "3").refused(1, "2 damaged", "no frame was encoded again", "names")
    assert "c/2/0/0/0 is missing" in outcome.err
    assert f"{place.store}/val" in outcome.err


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_codebook(place, damage: str) -> None:
    file = place.store / "codebook" / "c" / "0" / "0"
    DAMAGES[damage][0](file)
    outcome = place.run("encode", "--verify", "3").refused(1, "1 damaged", str(file))
    assert "encoded again: 3 equal" in outcome.out


def test_names_beyond_the_first_and_last_chunk(place, monkeypatch) -> None:
    monkeypatch.setattr("latent_cache.schema.NAME_CHUNK", 4)
    monkeypatch.setattr("latent_cache.schema.OFFSET_CHUNK", 4)
    shutil.rmtree(place.store)
    place.run("encode").ok()
    flip_a_bit(place.store / "train" / "video_id" / "c" / "1")
    assert latent_cache.open(place.store).frames  # opening does not notice
    (place.store / "train" / "video_view" / "c" / "1").unlink()
    outcome = place.run("encode", "--verify", "0").refused(1, "2 damaged", "video_id/c/1 is damaged")
    assert "video_view/c/1 is missing" in outcome.err


def test_many_videos_of_a_chunk_are_named_by_their_rows(place, story: ModuleType) -> None:
    names = [f"v{number:02d}.mp4" for number in range(MOST_NAMES)]
    story.write_videos(place.data, names, frames=2)
    place.run("encode", "--overwrite", sets=["cache.chunk_frames=500"]).ok()
    chunk_file(place, "train", 0).unlink()
    outcome = place.run("encode", "--verify", "0", sets=["cache.chunk_frames=500"]).refused(1)
    cache = latent_cache.open(place.store)
    rows, ids = len(cache.video_ids), cache.video_ids
    assert rows > MOST_NAMES
    assert (
        f"{rows} videos, rows 0 to {rows - 1}: {ids[0]!r}, {ids[0]!r} (hflip), ..., {ids[rows - 1]!r} (jitter-1)"
    ) in outcome.err


def test_exchanged_chunks_are_named_with_their_videos(place) -> None:
    first, second = (chunk_file(place, "train", index) for index in (1, 2))
    first.write_bytes(second.read_bytes())
    outcome = place.run("encode", "--verify", "3").refused(1, "1 damaged", "encode --overwrite")
    line = line_with(outcome, f"verify: {first} is ")
    for video in videos_of(place, "train", CHUNK, 2 * CHUNK):
        assert repr(video) in line
    place.run("train-flow").refused(2, str(first))


# Sound checksums, wrong values


def rewrite(place, split: str, array: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change an array through zarr, which writes right checksums, of a store that has no manifest."""
    if latent_cache.is_sealed(place.store):
        latent_cache.unseal(place.store)
    target = zarr.open_array(place.store / split / array, mode="r+")
    target[:] = change(target[:])


def test_latents_of_another_frame(place) -> None:
    cache = latent_cache.open(place.store)
    row = 4  # the mirrored second video
    assert cache.video_views[row] == "hflip"
    first, last = int(cache.offsets[row]), int(cache.offsets[row + 1]) - 1
    before = cache.load().numpy()
    assert not np.array_equal(before[first], before[last])

    def swap(latents: np.ndarray) -> np.ndarray:
        latents[[first, last]] = latents[[last, first]]
        return latents

    rewrite(place, "train", "latents", swap)
    place.run("encode", "--verify", "0").ok()  # the checksums are right
    outcome = place.run("encode", "--verify", "1000").refused(1, "2 of ", "frames differ from")
    number = last - first
    for place_in_split, frame in ((first, 0), (last, number)):
        file = chunk_file(place, "train", place_in_split // CHUNK)
        line = line_with(outcome, f"view hflip, frame {frame} ({file})")
        assert f"train, video {cache.video_ids[row]!r}" in line
        assert "latents deviate" in line
    assert "encoded again: 0 equal" not in outcome.out


def test_altered_codes(place) -> None:
    cache = latent_cache.open(place.store)

    def alter(codes: np.ndarray) -> np.ndarray:
        codes[50, 0, 0] = (codes[50, 0, 0] + 1) % 32
        codes[90] = 60000  # no such code
        return codes

    rewrite(place, "train", "codes", alter)
    outcome = place.run("encode", "--verify", "1000").refused(1, "2 of ", "frames differ from")
    positions = int(np.prod(cache.latent_shape[1:]))
    lines = [line for line in outcome.err.splitlines() if "codes are not the nearest" in line]
    assert [f"1 of its {positions} codes" in line for line in lines] == [True, False]
    assert f"{positions} of its {positions} codes" in lines[1]
    assert "latents deviate" not in outcome.err


def test_what_another_device_does_is_no_fault(place) -> None:
    std = latent_cache.open(place.store).std[:, None, None]
    noise = np.random.default_rng(0)

    def nudge(latents: np.ndarray) -> np.ndarray:
        moved = latents + 0.2 * LATENT_TOLERANCE * std * noise.standard_normal(latents.shape)
        return moved.astype(latents.dtype)

    for split in ("train", "val", "test"):
        rewrite(place, split, "latents", nudge)
    root = place.store / "zarr.json"
    content = json.loads(root.read_text())
    content["attributes"]["software"]["torch"] = "0.1"
    root.write_text(json.dumps(content))
    outcome = place.run("encode", "--verify", "30").ok()
    assert "within the tolerance" in outcome.out
    assert "torch 0.1" in outcome.out


def test_a_hundredth_more_than_tolerated(place) -> None:
    std = latent_cache.open(place.store).std[:, None, None]
    rewrite(place, "val", "latents", lambda latents: (latents + 2 * LATENT_TOLERANCE * std).astype(latents.dtype))
    outcome = place.run("encode", "--verify", "1000").refused(1, "latents deviate")
    assert f"{latent_cache.open(place.store, 'val').frames} of " in outcome.err  # each of them, and no other
    assert "verify: train" not in outcome.err


# What is needed


def test_another_autoencoder(place) -> None:
    place.run("train-autoencoder", "--restart", sets=["seed=1"]).ok()
    for count in ("0", "3"):
        place.run("encode", "--verify", count).refused(2, str(place.store), "encode --overwrite")


def test_no_autoencoder(place) -> None:
    shutil.rmtree(place.runs / "autoencoder")
    place.run("encode", "--verify", "3").refused(2, str(place.runs), "--verify 0")
    assert not (place.runs / "autoencoder").exists()


def test_missing_videos(place) -> None:
    shutil.rmtree(place.data)
    place.run("encode", "--verify", "3").refused(2, str(place.data), "--verify 0")
    place.data.mkdir(parents=True)
    place.run("encode", "--verify", "3").refused(2, str(place.data), "--verify 0")


def test_changed_videos(place, story: ModuleType) -> None:
    (place.data / "a.mp4").unlink()
    story.write_video(place.data / "a.mp4", story.moving_square(12, 77))
    place.run("encode", "--verify", "3").refused(2, "1 replaced: a")


def test_no_store(place, monkeypatch) -> None:
    shutil.rmtree(place.store)
    place.run("encode", "--verify", "3").refused(2, str(place.store), "river encode")
    assert not place.store.exists()
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        place.run("encode").refused(1)
    place.run("encode", "--verify", "3").refused(2, str(place.store), "river encode")


def test_overwrite_is_another_command(encoded) -> None:
    encoded.run("encode", "--verify", "3", "--overwrite").refused(2, "--overwrite")
    encoded.run("encode", "--verify", "-1").refused(2, "--verify", "-1")
