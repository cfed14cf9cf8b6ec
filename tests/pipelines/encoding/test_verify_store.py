"""`encode --verify`: damage and wrong values are found and named, all of them, and a sound store is left in peace."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import zarr

import latent_cache
from latent_cache import StoreWriter
from pipelines.encoding.verify_frames import LATENT_TOLERANCE, FrameVerifier, draw_frames, latent_deviation
from pipelines.encoding.verify_store import MOST_NAMES
from stage1_autoencoder.videos.folders import FolderSource
from stage1_autoencoder.videos.source import BrokenVideoError

VIEWS = ("identity", "hflip", "jitter-1")
SETS = (
    "dataset.source=videos",
    "dataset.splits={val: 0.2, test: 0.2}",
    "cache.views=[identity, hflip, jitter-1]",
    "cache.chunk_frames=20",
)
CHUNK = 20
NAMES = ("a.mp4", "b.avi", "c.gif", "d", "e.mp4", "f.avi", "deep/g.mp4", "deep/h")


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


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
    assert f"all {total} frames of {len(NAMES)} video(s) encoded again: all equal to the bit" in outcome.out
    assert "chunks of latents and codes" in outcome.out
    assert "match their checksums" in outcome.out
    assert outcome.err == ""
    assert story.stamps(place.store, place.runs) == before


@pytest.mark.parametrize(("words", "count"), [(["--verify", "5"], 5), (["--verify"], 64)])
def test_some_frames(encoded, words: list[str], count: int) -> None:
    assert f"{count} frames, drawn from " in encoded.run("encode", *words).ok().out


def test_checksums_alone_need_neither_videos_nor_autoencoder(place) -> None:
    shutil.rmtree(place.data)
    place.run("encode", "--verify", "0").ok()  # another autoencoder would be noticed
    shutil.rmtree(place.runs / "autoencoder")
    outcome = place.run("encode", "--verify", "0").ok()
    assert "match their checksums" in outcome.out
    assert "nothing was encoded again" in outcome.out


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
    assert "all equal to the bit" in place.run("encode", "--verify", "1000").ok().out

    flip_a_bit(shards[1] / "0/0/0")  # in one of its two chunks
    (shards[2] / "0/0/0").unlink()
    outcome = place.run("encode", "--verify", "0").refused(1, "2 file(s) or chunk(s) are damaged")
    start, stop = (int(word) for word in line_with(outcome, "c/1/0/0/0").partition("frames ")[2].split()[:3:2])
    assert (start, stop) in ((40, 59), (60, 79))
    assert "c/2/0/0/0 is missing. It carries frames 80 to 119 of train" in outcome.err


def test_float32_without_codes(encoded, tmp_path: Path) -> None:
    place = encoded.copy(tmp_path / "place", "data", "runs").with_sets("cache.codes=false", "cache.dtype=float32")
    place.run("encode").ok()
    assert "all equal to the bit" in place.run("encode", "--verify", "1000").ok().out


# Damage


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("array", ["latents", "codes"])
def test_each_damage_names_file_and_videos(place, damage: str, array: str) -> None:
    break_it, message = DAMAGES[damage]
    file = chunk_file(place, "train", 1, array)
    break_it(file)
    outcome = place.run("encode", "--verify", "0").refused(1, "1 file(s) or chunk(s) are damaged", "encode --overwrite")
    line = line_with(outcome, str(file))
    assert f"{file} {message}" in line
    assert "frames 20 to 39 of train" in line
    for video in videos_of(place, "train", 20, 40):
        assert repr(video) in line


def test_all_damages_are_named(place) -> None:
    files = [chunk_file(place, *where) for where in [("train", 0), ("train", 3), ("val", 0), ("test", 0, "codes")]]
    flip_a_bit(files[0])
    files[1].unlink()
    files[2].write_bytes(b"")
    flip_a_bit(files[3])
    outcome = place.run("encode", "--verify", "100000").refused(1, "4 file(s) or chunk(s) are damaged")
    for file in files:
        assert [line for line in outcome.err.splitlines() if f"verify: {file} " in line]
    # Frames that can be compared still are.
    lost = 4 * CHUNK
    assert f"{lost} frame(s) could not be compared" in outcome.err
    compared = sum(latent_cache.open(place.store, split).frames for split in ("train", "val", "test")) - lost
    assert f"encoded again: {compared} equal to the bit" in outcome.out
    assert "are not what" not in outcome.err


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["video_id", "video_view", "video_offset", "video_fingerprint"])
def test_damaged_names(place, name: str, damage: str) -> None:
    file = place.store / "val" / name / "c" / "0"
    DAMAGES[damage][0](file)
    chunk_file(place, "train", 2).unlink()
    outcome = place.run("encode", "--verify", "3").refused(1, "2 file(s) or", "no frame was encoded again", "names")
    assert "c/2/0/0/0 is missing" in outcome.err
    assert f"{place.store}/val" in outcome.err


def test_names_beyond_the_first_and_last_chunk(place, monkeypatch) -> None:
    monkeypatch.setattr("latent_cache.schema.NAME_CHUNK", 4)
    monkeypatch.setattr("latent_cache.schema.OFFSET_CHUNK", 4)
    shutil.rmtree(place.store)
    place.run("encode").ok()
    flip_a_bit(place.store / "train" / "video_id" / "c" / "1")
    assert latent_cache.open(place.store).frames  # opening does not notice
    (place.store / "train" / "video_view" / "c" / "1").unlink()
    outcome = place.run("encode", "--verify", "0").refused(1, "2 file(s) or", "video_id/c/1 is damaged")
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


# Sound checksums, wrong values


def rewrite(place, split: str, array: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change an array through zarr, which writes right checksums."""
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
    assert "match their checksums" in place.run("encode", "--verify", "0").ok().out
    outcome = place.run("encode", "--verify", "1000").refused(1, "2 of ", "frames are not what their videos encode to")
    number = last - first
    for place_in_split, frame in ((first, 0), (last, number)):
        file = chunk_file(place, "train", place_in_split // CHUNK)
        line = line_with(outcome, f"view hflip, frame {frame} ({file})")
        assert f"train, video {cache.video_ids[row]!r}" in line
        assert "latents deviate" in line
    assert "0 equal" not in outcome.out


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_latents_wrong(place, split: str) -> None:
    rewrite(place, split, "latents", lambda latents: latents[::-1] * np.float16(1.5))
    outcome = place.run("encode", "--verify", "20").refused(1, "frames are not what their videos encode to")
    assert f"verify: {split}, video" in outcome.err


def test_views_that_were_mixed_up(place) -> None:
    cache = latent_cache.open(place.store)
    lengths = cache.lengths
    pairs = [row for row in range(len(lengths)) if cache.video_views[row] == "identity"]

    def mix(latents: np.ndarray) -> np.ndarray:
        for row in pairs:
            a, b, c, d = cache.offsets[row : row + 4]
            latents[a:d] = np.concatenate([latents[b:c], latents[c:d], latents[a:b]])
        return latents

    rewrite(place, "train", "latents", mix)
    outcome = place.run("encode", "--verify", "1000").refused(1)
    wrong = Counter(
        line.partition("view ")[2].partition(",")[0] for line in outcome.err.splitlines() if "view " in line
    )
    assert set(wrong) == set(VIEWS)
    assert min(wrong.values()) > 0.8 * cache.frames / 3


def test_altered_codes(place) -> None:
    cache = latent_cache.open(place.store)

    def alter(codes: np.ndarray) -> np.ndarray:
        codes[50, 0, 0] = (codes[50, 0, 0] + 1) % 32
        codes[90] = 60000  # no such code
        return codes

    rewrite(place, "train", "codes", alter)
    outcome = place.run("encode", "--verify", "1000").refused(1, "2 of ", "frames are not what")
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
    assert "sound but not equal" in outcome.out
    assert "% of what is tolerated" in outcome.out
    assert "the store was written with torch 0.1, here" in outcome.out


def test_a_hundredth_more_than_tolerated(place) -> None:
    std = latent_cache.open(place.store).std[:, None, None]
    rewrite(place, "val", "latents", lambda latents: (latents + 2 * LATENT_TOLERANCE * std).astype(latents.dtype))
    place.run("encode", "--verify", "1000").refused(1, "latents deviate")


# What is needed


def test_another_autoencoder(place) -> None:
    place.run("train-autoencoder", "--restart", sets=["seed=1"]).ok()
    for count in ("0", "3"):
        place.run("encode", "--verify", count).refused(2, "was encoded by autoencoder", "encode --overwrite")


def test_no_autoencoder(place) -> None:
    shutil.rmtree(place.runs / "autoencoder")
    place.run("encode", "--verify", "3").refused(2, "holds no checkpoint", "--verify 0")
    assert not (place.runs / "autoencoder").exists()


def test_missing_videos(place) -> None:
    shutil.rmtree(place.data)
    place.run("encode", "--verify", "3").refused(2, f"{place.data}: the raw videos are not there", "--verify 0")
    place.data.mkdir(parents=True)
    place.run("encode", "--verify", "3").refused(2, str(place.data), "--verify 0")


def test_changed_videos(place, story: ModuleType) -> None:
    (place.data / "a.mp4").unlink()
    story.write_video(place.data / "a.mp4", story.moving_square(12, 77))
    place.run("encode", "--verify", "3").refused(2, "1 replaced: a")


def test_other_preprocessing(place) -> None:
    place.run("encode", "--verify", "3", sets=["cache.views=[identity]"]).refused(2, "other preprocessing", "views")


def test_no_store(place, monkeypatch) -> None:
    shutil.rmtree(place.store)
    place.run("encode", "--verify", "3").refused(2, f"{place.store}: there is no such path", "make encode")
    assert not place.store.exists()
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        place.run("encode").refused(1)
    place.run("encode", "--verify", "3").refused(2, "is not complete", "make encode")


def test_overwrite_is_another_command(encoded) -> None:
    encoded.run("encode", "--verify", "3", "--overwrite").refused(2, "--verify writes nothing")
    encoded.run("encode", "--verify", "-1").refused(2, "-1 is not a number of frames")


def test_a_video_that_cannot_be_decoded_any_more(place, monkeypatch) -> None:
    read, broken = FolderSource.read, "deep/g"

    def fails(self, index: int, positions=None) -> np.ndarray:
        if self.videos[index].id == broken:
            raise BrokenVideoError(broken, "the decoder gave up")
        return read(self, index, positions)

    monkeypatch.setattr(FolderSource, "read", fails)
    outcome = place.run("encode", "--verify", "1000").refused(1, "could not be compared", "the decoder gave up")
    lost = sum("the decoder gave up" in line for line in outcome.err.splitlines())
    assert f"{lost} frame(s) could not be compared" in outcome.err


# Drawing, decoding, comparing


def toy_cache(split: str, lengths: list[int]) -> SimpleNamespace:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return SimpleNamespace(split=split, offsets=offsets, frames=int(offsets[-1]))


def test_frames_are_drawn_uniformly_and_once() -> None:
    caches = [toy_cache("train", [3, 1, 5]), toy_cache("test", [2])]
    every = {("train", 0, n) for n in range(3)} | {("train", 1, 0)} | {("train", 2, n) for n in range(5)}
    every |= {("test", 0, 0), ("test", 0, 1)}
    drawn = draw_frames(caches, 11, 0)
    assert {(frame.cache.split, frame.row, frame.number) for frame in drawn} == every
    assert len(draw_frames(caches, 12, 0)) == 11
    counts = Counter()
    for seed in range(2000):
        some = draw_frames(caches, 4, seed)
        keys = [(frame.cache.split, frame.row, frame.number) for frame in some]
        assert len(set(keys)) == 4
        assert [caches.index(f.cache) * 100 + f.place for f in some] == sorted(
            caches.index(f.cache) * 100 + f.place for f in some
        )
        assert all(frame.place == frame.cache.offsets[frame.row] + frame.number for frame in some)
        counts.update(keys)
    expected = 2000 * 4 / 11
    assert all(abs(counts[key] - expected) < 5 * np.sqrt(expected) for key in every)


def test_the_draw_is_a_function_of_the_seed() -> None:
    caches = [toy_cache("train", [100, 200])]
    places = [[frame.place for frame in draw_frames(caches, 10, seed)] for seed in (3, 3, 4)]
    assert places[0] == places[1] != places[2]


def test_each_video_is_decoded_once(encoded, monkeypatch) -> None:
    passes = Counter()
    iterate = FolderSource.iterate

    def counted(self, index: int, start: int = 0, stop: int | None = None):
        passes[self.videos[index].id] += 1
        return iterate(self, index, start, stop)

    monkeypatch.setattr(FolderSource, "iterate", counted)
    encoded.run("encode", "--verify", "100000").ok()
    assert len(passes) == len(NAMES)
    assert set(passes.values()) == {1}


def test_memory_does_not_grow_with_the_number_of_frames(encoded, monkeypatch) -> None:
    """Frames are encoded while others are still to be decoded."""
    monkeypatch.setattr("stage1_autoencoder.frame_encoder.PASS_PIXELS", {"cpu": 4 * 32**2})
    ahead, most = [0], [0]
    decode, compare = FrameVerifier._decode, FrameVerifier._compare_frame

    def decoded(self, drawn):
        for item in decode(self, drawn):
            ahead[0] += 1
            most[0] = max(most[0], ahead[0])
            yield item

    def compared(self, *arguments):
        ahead[0] -= 1
        return compare(self, *arguments)

    monkeypatch.setattr(FrameVerifier, "_decode", decoded)
    monkeypatch.setattr(FrameVerifier, "_compare_frame", compared)
    encoded.run("encode", "--verify", "100000").ok()
    assert ahead[0] == 0
    assert 4 <= most[0] <= 4 * (2 * len(os.sched_getaffinity(0)) + 3)


def test_the_number_of_threads_changes_nothing_and_is_left_as_it_was(encoded) -> None:
    torch.set_num_threads(2)
    try:
        assert "all equal to the bit" in encoded.run("encode", "--verify", "50").ok().out
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("stored_latent", "stored_code", "wrong"), [
    (0.49, 0, False),  # the same latent, the same code
    (0.49, 1, True),  # 0.49 is nearer to 0
    (0.52, 1, False),  # another device came out on the other side of the border between the codes
    (0.52, 2, True),
    (0.49, 7, True),  # no such code
])  # fmt: skip
def test_codes_near_a_border(stored_latent: float, stored_code: int, wrong: bool) -> None:
    """Codes at 0, 1 and 10; a latent of 0.49, whose code is 0."""
    codebook = torch.tensor([[0.0], [1.0], [10.0]])
    verifier = SimpleNamespace(autoencoder=SimpleNamespace(quantizer=SimpleNamespace(codebook=codebook)))
    ours = np.full((1, 1, 1), 0.49, np.float32)
    fresh = SimpleNamespace(latents=ours, rounded=ours.astype(np.float16), codes=np.zeros((1, 1), np.int64))
    stored = np.full((1, 1, 1), stored_latent, np.float16)
    found = FrameVerifier._unexplained_codes(verifier, fresh, stored, np.full((1, 1), stored_code, np.uint16))
    assert found.tolist() == [[wrong]]


def test_deviation_by_known_answers() -> None:
    stored = np.zeros((2, 2, 2), np.float16)
    std = np.array([1.0, 10.0], np.float32)
    one_tolerance = (LATENT_TOLERANCE * std)[:, None, None] * np.ones((2, 2, 2), np.float32)
    assert latent_deviation(stored.astype(np.float32), stored, std) == 0
    assert latent_deviation(one_tolerance, stored, std) == pytest.approx(1, rel=1e-4)
    alone = one_tolerance.copy()
    alone[1] = 0
    assert latent_deviation(2 * alone, stored, std) == pytest.approx(np.sqrt(2), rel=1e-4)
    assert latent_deviation(np.full((2, 2, 2), np.nan, np.float32), stored, std) == float("inf")
    # A constant channel has no deviation of its own: rounding alone is tolerated.
    constant = np.full((1, 2, 2), 3.0, np.float16)
    nothing = np.zeros(1, np.float32)
    ulp = float(np.spacing(np.float16(3)))
    assert latent_deviation(constant.astype(np.float32) + ulp, constant, nothing) < 1
    assert latent_deviation(constant.astype(np.float32) + 4 * ulp, constant, nothing) > 1
