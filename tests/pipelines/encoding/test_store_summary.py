"""`inspect`: summaries of complete, incomplete, remote and damaged stores; videos decoded from latents."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

import latent_cache
from latent_cache import SplitPlan, StoreMetadata, StoreWriter
from latent_cache.reading.remote import close_connections

DIGEST = "3f9a" * 16
NAMES = ["walk", "walk", "jump", "jump"]
VIEWS = ["identity", "hflip"] * 2


@pytest.fixture
def inspect(story: ModuleType) -> Callable[..., Any]:
    """Run the command."""
    return lambda *words: story.run_main(["inspect", *map(str, words)])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a store: train has 2 videos in 2 views, 30 frames in chunks of 4; test has one video of 3 frames."""

    def build(
        name: str = "toys.zarr",
        stop_after: int | None = None,
        notes: bool = True,
        shard_chunks: int = 1,
        fps: list[float] | None = None,
        preview: bool = False,
    ) -> Path:
        metadata = StoreMetadata(
            dataset="toys",
            fps=12.5,
            preprocessing={"image_size": 24, "resize": "area", "views": ["identity", "hflip"]},
            autoencoder={"architecture": "vqgan", "sha256": DIGEST, "downsampling": 8, "codes": 64},
            software={"zarr": "3.1.6"},
        )
        plans = {
            "train": SplitPlan(NAMES, VIEWS, [5, 5, 10, 10], (2, 3, 4), 4, fps=fps, shard_chunks=shard_chunks),
            "test": SplitPlan(["wave"], ["identity"], [3], (2, 3, 4), 3),
        }
        path = tmp_path / name
        extras = {"preview": (6, 8, 3)} if preview else {}
        with StoreWriter.open(path, metadata, plans, codes=True, extras=extras) as writer:
            todo = [(split, chunk) for split in plans for chunk in writer.pending(split)]
            for split, chunk in todo[:stop_after]:
                numbers = np.arange(chunk.start, chunk.stop)[:, None, None, None]
                latents = np.broadcast_to(numbers, (chunk.frames, 2, 3, 4)).astype(np.float32)
                codes = np.broadcast_to(numbers[:, 0] % 4, (chunk.frames, 3, 4))
                pictures = {"preview": np.broadcast_to(20 * numbers % 256, (chunk.frames, 6, 8, 3)).astype(np.uint8)}
                writer.write_chunk(split, chunk, latents, codes, extras=pictures if preview else {})
            if stop_after is None:
                measured = {"codes_used": 7, "code_perplexity": 5.4, "round_trip_psnr": 31.25, "codes_changed": 0.00125}
                skipped = {"skipped": {"train": {f"torn{number}": "f" for number in range(7)}}}
                writer.finish({"train": measured} if notes else None, skipped if notes else None)
        return path

    return build


def test_a_complete_store(write, inspect) -> None:
    path = write()
    moment = time.time() - 3 * 3600
    os.utime(path / "zarr.json", (moment, moment))
    outcome = inspect(path).ok()
    assert outcome.err == ""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for text in (
        f"{path}: latents of toys, 12.5 frames/s; complete, written 3.0 h ago, {size / 1e6:.1f} MB on disk",
        "preprocessing  image_size 24, resize area, views ['identity', 'hflip']",
        f"autoencoder    architecture vqgan, sha256 {DIGEST}, downsampling 8, codes 64",
        "software       zarr 3.1.6",
        "train  4 videos of 5 to 10 frames (views: identity, hflip); latents 30x2x3x4 float16, 8 chunks of 4 ",
        "7 of 64 codes used, perplexity 5; round trip 31.25 dB; 0.125% of codes changed by rounding",
        "7 video(s) that could not be decoded: torn0, torn1, torn2, torn3, torn4, ...",
        "test   1 videos of 3 to 3 frames; latents 3x2x3x4 float16, 1 chunks of 3 frames",
        "per channel    mean [14.5 14.5], std [8.655 8.655]",
    ):
        assert text in outcome.out, f"{text!r} is not in\n{outcome.out}"


def test_rates_that_differ_are_told(write, inspect) -> None:
    path = write(fps=[10, 10, 29.97, 29.97])
    assert f"{path}: latents of toys, 10 to 29.97 frames/s; complete" in inspect(path).ok().out


def test_a_store_without_notes_and_with_shards(write, inspect) -> None:
    outcome = inspect(write(notes=False, shard_chunks=2)).ok()
    assert "codes used" not in outcome.out
    assert "torn" not in outcome.out
    assert "8 chunks of 4 frames in shards of 2" in outcome.out


@pytest.mark.parametrize(("stop_after", "shard_chunks"), [(0, 1), (3, 1), (9, 1), (2, 2)])
def test_an_incomplete_store_tells_how_far_it_is(write, inspect, stop_after: int, shard_chunks: int) -> None:
    path = write(stop_after=stop_after, shard_chunks=shard_chunks)
    outcome = inspect(path).ok()
    assert outcome.err == ""
    chunks = 8 // shard_chunks
    assert re.search(rf"{path}: latents of toys, 12.5 frames/s; not complete.*river encode", outcome.out)
    last = ", the last one [0-9]+ s ago" if stop_after else ""
    assert re.search(
        rf"train  {min(stop_after, chunks)} of {chunks} chunks are written{last}; 30 frames, "
        rf"{4 * shard_chunks} per chunk",
        outcome.out,
    )
    assert f"test   {max(0, stop_after - chunks)} of 1 chunks are written" in outcome.out
    assert "sha256 3f9a" in outcome.out


def test_what_an_incomplete_store_cannot_do(write, inspect, tmp_path: Path) -> None:
    path = write(stop_after=3)
    for words in (["--verify"], ["--gif", tmp_path / "a.gif"]):
        outcome = inspect(path, *words).refused(2, f"inspect: {path}: ", "not complete", "river encode")
        assert "3 of 8 chunks" in outcome.out


def test_a_store_that_is_only_begun(tmp_path: Path, inspect) -> None:
    (tmp_path / "toys.zarr" / ".encoding").mkdir(parents=True)
    outcome = inspect(tmp_path / "toys.zarr").ok()
    assert re.search(rf"{tmp_path}/toys.zarr: .*river encode", outcome.out)


def test_no_store(tmp_path: Path, inspect) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("none.zarr", "empty"):
        inspect(tmp_path / name).refused(2, f"inspect: {tmp_path / name}: ", "paths.latents")


def test_verify(write, inspect) -> None:
    path = write()
    assert "all 18 chunks of latents and codes" in inspect(path, "--verify").ok().out

    first, second = path / "train/latents/c/1/0/0/0", path / "test/codes/c/0/0/0"
    content = bytearray(first.read_bytes())
    content[10] ^= 1
    first.write_bytes(content)
    second.unlink()
    outcome = inspect(path, "--verify").refused(1, f"inspect: {path}: 2 damaged")
    assert "latents of toys" in outcome.out
    assert re.search(rf"{first} is damaged.* frames 4 to 7 of train, .*'walk', 'walk' \(hflip\)", outcome.err)
    assert re.search(rf"{second} is missing.* frames 0 to 2 of test, .*'wave'", outcome.err)
    inspect(path).ok()  # reads no chunk

    (path / "train/video_id/c/0").unlink()
    inspect(path).refused(2, str(path))
    inspect(path, "--verify").refused(1, f"{path}/train/video_id/c/0 is missing", f"{second} is missing")


def test_a_store_with_previews_is_looked_at_without_an_autoencoder(write, inspect, tmp_path: Path) -> None:
    path, gif = write(preview=True), tmp_path / "jump.gif"
    assert "preview 6x8" in inspect(path).ok().out
    assert "preview" in inspect(path, "--video", "jump", "--gif", gif).ok().out
    with Image.open(gif) as animation:
        assert animation.n_frames == 10
        animation.seek(2)
        picture = np.asarray(animation.convert("RGB"))
        assert picture.shape[0] * 8 == picture.shape[1] * 6
        assert (abs(picture.astype(int) - 20 * 12) < 9).all()  # frame 12 of the split, in the colors of the palette
    assert "all 27 chunks" in inspect(path, "--verify").ok().out
    (path / "test/preview/c/0/0/0/0").unlink()
    inspect(path, "--verify").refused(1, f"{path}/test/preview/c/0/0/0/0 is missing", "'wave'")
    inspect(write("bare.zarr"), "--gif", gif).refused(2, "--config", "preview")


def test_an_old_store_is_sealed_if_it_is_sound(write, inspect) -> None:
    path = write()
    latent_cache.unseal(path)
    chunk = path / "train/latents/c/1/0/0/0"
    content = chunk.read_bytes()
    chunk.unlink()
    inspect(path, "--seal").refused(1, f"{path}: 1 damaged", f"{chunk} is missing")
    chunk.write_bytes(content)
    for _ in range(2):  # the second time there is nothing to do
        assert "has a manifest" in inspect(path, "--seal").ok().out
    shutil.copy(path / "train/latents/c/2/0/0/0", chunk)
    shutil.rmtree(path / "train/codes")
    outcome = inspect(path, "--verify").refused(1, "damaged", "train/codes/zarr.json is missing")
    assert f"{chunk} is " in outcome.err

    shutil.rmtree(path / "manifest")
    inspect(path).refused(2, f"{path}/manifest/zarr.json is missing", "--seal")


@pytest.fixture
def remote(write) -> Iterator[Callable[[Path], str]]:
    """Copy a store to memory and give its URL."""
    memory = fsspec.filesystem("memory")

    def publish(path: Path) -> str:
        memory.put(str(path), f"/inspected/{path.name}", recursive=True)
        return f"memory://inspected/{path.name}"

    yield publish
    memory.rm("/inspected", recursive=True)


def test_a_url(write, inspect, remote) -> None:
    path = write()
    url = remote(path)
    outcome = inspect(url, "--verify").ok()
    assert f"{url}: latents of toys, 12.5 frames/s; complete\n" in outcome.out
    assert f"verify: {url}: all 18 chunks" in outcome.out
    # But for the first line all is as it is here.
    assert inspect(path).out.splitlines()[1:] == inspect(url).out.splitlines()[1:]


def test_an_incomplete_store_behind_a_url(write, inspect, remote) -> None:
    outcome = inspect(remote(write(stop_after=2))).ok()
    assert "not complete" in outcome.out
    assert "of 8 chunks" not in outcome.out  # known only where it is written


@pytest.mark.parametrize("url", ["memory://inspected/none.zarr", "http://127.0.0.1:9/toys.zarr"])
def test_a_url_where_nothing_is(inspect, url: str) -> None:
    inspect(url).refused(2, url)
    close_connections()


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["--video", "walk"], ["--video walk", "--gif walk.gif"]),
        (["--view", "hflip"], ["--view hflip", "--gif"]),
        (["--gif", "walk.mp4"], ["--gif walk.mp4", ".gif"]),
        (["--gif", "walk.gif"], ["--gif", "--config"]),
    ],
)
def test_options_that_need_another_one(write, inspect, words: list[str], needed: list[str]) -> None:
    inspect(write(), *words).refused(2, *needed)


# With an autoencoder


def test_any_view_is_decoded(story: ModuleType, tmp_path: Path) -> None:
    place = story.Place(tmp_path / "place", ("cache.views=[identity, hflip]", "autoencoder.training.steps=2"))
    place.run("encode").ok()
    frames = {}
    for view in ("identity", "hflip"):
        gif = tmp_path / f"{view}.gif"
        outcome = place.run("inspect", "--video", "train_00002", "--view", view, "--gif", str(gif)).ok()
        assert re.search(rf"train_00002.* of train decoded to {gif}", outcome.out)
        with Image.open(gif) as animation:
            assert animation.n_frames == 12
            assert animation.size == (256, 256)
            frames[view] = np.asarray(animation.convert("RGB"))
    assert not np.array_equal(frames["identity"], frames["hflip"])
    place.run("inspect", "--video", "train_00002", "--view", "jitter-3", "--gif", str(tmp_path / "x.gif")).refused(
        2, "'jitter-3'", "['hflip', 'identity']"
    )
