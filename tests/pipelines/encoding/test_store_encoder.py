"""Encoding a store: the same bytes whatever the order, batches and threads; views; memory budget; interruptions."""

import json
import math
import os
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange

import latent_cache
from latent_cache import ChunkWriter, SplitPlan, StoreWriter
from pipelines.config import parse_size
from pipelines.encoding import chunk_encoder
from pipelines.encoding.chunk_encoder import ChunkEncoder, ChunkTask, EncodeJob, EncodingStopped
from pipelines.errors import StoppedBySignal, UserError
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.frame_encoder import FrameEncoder
from stage1_autoencoder.views import ViewTransform, apply_views, view_transform

VIEWS = ["identity", "hflip", "jitter-1"]
IDENTITY = ViewTransform()
CHUNKS = 5 + 2  # of train and val, 10 frames per chunk


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, seconds: float = 0) -> list:
    """The arguments of each call of a method, which is slowed down by some seconds."""
    method, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        time.sleep(seconds)
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def frames_of(source, video: str) -> np.ndarray:
    count = next(info.frames for info in source.videos if info.id == video)
    return np.stack([source.frame(video, number) for number in range(count)])


def encoded_alone(kit, frames: np.ndarray) -> list:
    """Frames, each encoded in a batch of nothing but itself."""
    encoder = FrameEncoder(kit.model, torch.device("cpu"), frames.shape[1:3])
    return [encoder.encode(frame[None], [IDENTITY]) for frame in frames]


def stored_alone(kit, frames: np.ndarray) -> np.ndarray:
    """Latents of frames as they are stored, each encoded in a batch of nothing but itself."""
    rounded = kit.model.quantizer.rounded
    encoded = encoded_alone(kit, frames)
    return torch.stack([rounded(one.latents, one.codes, torch.float16).latents[0] for one in encoded]).numpy()


def make_codes_dense(kit) -> None:
    """Make the codebook so dense that rounding to fp16 alone would change the nearest code of many latents."""
    weight = kit.model.quantizer.embedding.weight
    base = stored_alone(kit, kit.splits["train"].frame("a", 0)[None]).astype(np.float32)[0, :, 1, 1]
    distance = torch.tensor([1e-2, 1e-5]).repeat(len(weight) // 2)[:, None]  # the latter are below fp16's resolution
    weight.copy_(torch.from_numpy(base) + distance * torch.randn(weight.shape, generator=torch.manual_seed(0)))


# Determinism


@pytest.mark.parametrize(
    ("cache", "threads"),
    [({"batch_frames": 7}, 1), ({"batch_frames": 500, "memory_budget": "1 TiB"}, 2), ({"batch_frames": 1}, 4)],
)
def test_the_same_bytes_whatever_batches_and_threads(kit, network_batch, cache: dict, threads: int) -> None:
    network_batch(3)
    kit.encode(batch_frames=3)
    other = kit.another("other")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    other.encode(**cache)
    assert torch.get_num_threads() == threads  # left as it was
    torch.set_num_threads(before)
    assert other.files() == kit.files()


@pytest.mark.parametrize("slow", [{"a": 0.01, "d": 0.003}, {"c": 0.02, "e": 0.002, "v": 0.005}])
def test_the_same_bytes_whatever_is_decoded_first(kit, network_batch, slow: dict[str, float]) -> None:
    network_batch(3)
    kit.encode(batch_frames=3, views=VIEWS)
    other = kit.another("other")
    other.splits = {split: kit.Source({v.id: v.frames for v in s.videos}) for split, s in kit.splits.items()}
    for source in other.splits.values():
        source.seconds = slow
    other.encode(batch_frames=6, views=VIEWS)
    assert other.files() == kit.files()


@pytest.mark.parametrize("chunk_frames", [1, 3, 1000])
def test_the_same_latents_whatever_the_chunks(kit, chunk_frames: int) -> None:
    kit.encode()
    other = kit.another("other")
    other.encode(chunk_frames=chunk_frames)
    for split in ("train", "val"):
        ours, theirs = latent_cache.open(other.store, split), latent_cache.open(kit.store, split)
        assert ours.latents.chunks[0] == chunk_frames
        np.testing.assert_array_equal(ours.load().numpy(), theirs.load().numpy())
        np.testing.assert_array_equal(ours.codes[:], theirs.codes[:])
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-6)


def test_shards_are_written_as_chunks_are(kit, monkeypatch) -> None:
    """When there are very many chunks, a file holds several, and one task writes a file."""
    kit.encode()
    sharded = kit.another("sharded")
    monkeypatch.setattr("latent_cache.default_shard_chunks", lambda frames, chunk_frames: 3)
    sharded.interrupt(after=1, chunk_frames=4)
    sharded.encode(chunk_frames=4)
    for split in ("train", "val"):
        ours, theirs = latent_cache.open(sharded.store, split), latent_cache.open(kit.store, split)
        assert ours.latents.shards[0] == 12
        np.testing.assert_array_equal(ours.load().numpy(), theirs.load().numpy())
        np.testing.assert_array_equal(ours.codes[:], theirs.codes[:])


# Memory


@pytest.fixture
def in_flight(monkeypatch) -> SimpleNamespace:
    """Bytes of frames in live blocks, and running tasks, with the maximum of each."""
    state = SimpleNamespace(bytes=0, most_bytes=0, tasks=0, most_tasks=0, lock=threading.Lock())

    class Watched(chunk_encoder.Block):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            self.size = self.frames.nbytes
            with state.lock:
                state.bytes += self.size
                state.most_bytes = max(state.most_bytes, state.bytes)

        def __del__(self) -> None:
            state.bytes -= self.size

    run = ChunkTask.run

    def watched_run(self: ChunkTask, writer: ChunkWriter) -> object:
        with state.lock:
            state.tasks += 1
            state.most_tasks = max(state.most_tasks, state.tasks)
        try:
            return run(self, writer)
        finally:
            with state.lock:
                state.tasks -= 1

    monkeypatch.setattr(chunk_encoder, "Block", Watched)
    monkeypatch.setattr(ChunkTask, "run", watched_run)
    return state


@pytest.mark.parametrize("views", [["identity"], VIEWS])
def test_memory_does_not_grow_with_the_videos(kit, network_batch, monkeypatch, in_flight, views: list[str]) -> None:
    """Encoding is slower than decoding, which must wait for it."""
    network_batch(4)
    count_calls(monkeypatch, FrameEncoder, "encode", seconds=0.002)
    encoders = count_calls(monkeypatch, ChunkEncoder, "close")
    most = {}
    for count in (10, 60):
        other = kit.another(f"of {count}")
        other.splits = {"train": kit.Source({f"v{row:02d}": 9 for row in range(count)})}
        in_flight.most_bytes = 0
        other.encode(chunk_frames=90, batch_frames=4, views=views)
        assert in_flight.bytes == 0
        most[count] = in_flight.most_bytes
    (encoder,) = encoders[-1]
    cores = len(os.sched_getaffinity(0))
    allowed = (2 * cores * len(views) + 3 * cores) * encoder.block_frames * 3 * 16**2
    assert 0 < most[60] <= allowed
    assert most[60] < 540 * 3 * 16**2 / 2
    assert in_flight.most_tasks <= 2


def encoder_with(kit, chunk_frames: int = 10, **cache: object) -> ChunkEncoder:
    settings = kit.config(**cache).cache
    extras = {"preview": (settings.preview, settings.preview, 3)} if settings.preview else {}
    job = EncodeJob(kit.splits, settings, None, "", "cpu", (4, 4, 4), extras, {}, chunk_frames, "")
    return ChunkEncoder(job, kit.model, torch.device("cpu"))


def needed_bytes(kit, **options: object) -> int:
    """The smallest budget that is accepted, by bisection."""
    low, high = 1, 2**30
    while low < high:
        middle = (low + high) // 2
        try:
            encoder_with(kit, memory_budget=f"{middle} B", **options).close()
            high = middle
        except UserError:
            low = middle + 1
    return low


def test_a_budget_for_one_chunk_encodes_one_at_a_time(kit, in_flight) -> None:
    needed = needed_bytes(kit)
    for source in kit.splits.values():
        source.seconds = dict.fromkeys("abcdevw", 0.001)
    kit.encode(memory_budget=f"{needed} B")
    assert in_flight.most_tasks == 1
    other = kit.another("other")
    other.encode(memory_budget=f"{2 * needed} B")
    assert in_flight.most_tasks > 1
    assert other.files() == kit.files()


@pytest.mark.parametrize("chunk_frames", [10, 10**5])
def test_too_small_a_budget_says_what_is_enough_before_the_old_store_is_deleted(kit, chunk_frames: int) -> None:
    kit.encode()
    before = kit.files()
    with pytest.raises(UserError) as raised:
        kit.encode(overwrite=True, memory_budget="2 KiB")
    assert kit.files() == before
    with pytest.raises(UserError) as raised:
        encoder_with(kit, chunk_frames, memory_budget="2 KiB")
    text = str(raised.value)
    for key in ("cache.memory_budget: 2 KiB", "cache.batch_frames", "cache.chunk_frames"):
        assert key in text
    enough = re.search(r"needs ([\d.]+ \w+)", text)[1]
    encoder_with(kit, chunk_frames, memory_budget=enough).close()
    assert parse_size(enough) <= needed_bytes(kit, chunk_frames=chunk_frames) + 2**20


@pytest.mark.parametrize(("dtype", "value"), [("float16", 10), ("float32", 16)])
def test_the_budget_counts_what_a_chunk_takes_and_no_second_encoder(kit, dtype: str, value: int) -> None:
    """`value`: bytes per value of a chunk. Measured while a chunk is written: 10 in float16 and 12 in float32."""
    frames = 10**5
    difference = needed_bytes(kit, dtype=dtype, chunk_frames=frames + 10) - needed_bytes(kit, dtype=dtype)
    assert difference == value * frames * 4 * 4 * 4
    assert (
        needed_bytes(kit, preview=8, chunk_frames=frames) > needed_bytes(kit, chunk_frames=frames) + 8 * 8 * 3 * frames
    )


# Views


def test_views_are_adjacent_and_each_is_what_its_name_says(kit) -> None:
    kit.encode(views=VIEWS)
    for split, views in (("train", VIEWS), ("val", ["identity"])):
        source, cache = kit.splits[split], latent_cache.open(kit.store, split)
        ids = [video.id for video in source.videos]
        assert list(cache.video_ids) == [video for video in ids for _ in views]
        assert list(cache.video_views) == views * len(ids)
        assert cache.lengths.tolist() == [video.frames for video in source.videos for _ in views]
        for video in ids:
            frames = frames_of(source, video)
            np.testing.assert_array_equal(cache.video(video), stored_alone(kit, frames))
            if split == "val":
                continue
            mirrored = np.ascontiguousarray(frames[:, :, ::-1])
            np.testing.assert_array_equal(cache.video(video, "hflip"), stored_alone(kit, mirrored))
            jitter = [view_transform("jitter-1", video)] * len(frames)
            with torch.inference_mode():
                latents = kit.model.encode(apply_views(image_to_unit(torch.from_numpy(frames)), jitter))
            np.testing.assert_allclose(cache.video(video, "jitter-1"), latents.numpy(), rtol=2e-3, atol=2e-3)
            assert not np.array_equal(cache.video(video, "jitter-1"), cache.video(video))


def test_a_preview_shows_what_the_autoencoder_saw(kit) -> None:
    """Means over areas of the frames of each view, here over 4x4 pixels of one color, which are that color."""
    kit.interrupt(after=3, views=VIEWS, preview=4)
    kit.encode(views=VIEWS, preview=4)
    cache = latent_cache.open(kit.store)
    frames = frames_of(kit.splits["train"], "d")
    np.testing.assert_array_equal(cache.video_preview("d"), frames[:, ::4, ::4])
    np.testing.assert_array_equal(cache.video_preview("d", "hflip"), frames[:, ::4, ::-4])
    assert not np.array_equal(cache.video_preview("d", "jitter-1"), cache.video_preview("d"))
    larger = kit.another("larger")
    larger.encode(preview=99)  # than the frames, which stay as they are
    cache = latent_cache.open(larger.store, "val")
    np.testing.assert_array_equal(cache.video_preview("v"), frames_of(kit.splits["val"], "v"))


def test_actions_are_stored_beside_the_latents_of_their_frames(kit) -> None:
    class Robot(kit.Source):
        action_size = 2

        def actions(self, index: int) -> np.ndarray:
            frames = np.arange(self.videos[index].frames, dtype=np.float32)
            return np.stack([np.full_like(frames, index + 0.5), frames], axis=1)

    kit.splits = {
        split: Robot({video.id: video.frames for video in source.videos}) for split, source in kit.splits.items()
    }
    kit.encode(views=["identity", "hflip"])
    cache = latent_cache.open(kit.store)
    for row, video in enumerate("abcde"):
        for view in ("identity", "hflip"):
            actions = cache.video_actions(video, view)
            np.testing.assert_array_equal(actions[:, 0], row + 0.5)
            np.testing.assert_array_equal(actions[:, 1], np.arange(kit.splits["train"].videos[row].frames))


@pytest.mark.parametrize("chunk_frames", [4, 29, 1000])
def test_a_video_is_decoded_once_for_all_its_views_in_a_chunk(kit, chunk_frames: int) -> None:
    kit.encode(views=VIEWS, chunk_frames=chunk_frames)
    for split, source in kit.splits.items():
        views = VIEWS if split == "train" else VIEWS[:1]
        rows = [(video.id, video.frames) for video in source.videos for _ in views]
        places = [(video, number) for video, frames in rows for number in range(frames)]
        chunks = [places[start : start + chunk_frames] for start in range(0, len(places), chunk_frames)]
        # One pass from the first to the last frame that some view of the chunk needs.
        expected = Counter()
        for chunk in chunks:
            for video in dict.fromkeys(video for video, _ in chunk):
                numbers = [number for name, number in chunk if name == video]
                expected[video, min(numbers), max(numbers) + 1] += 1
        assert Counter(source.passes) == expected


def test_statistics_are_over_all_views_and_of_train_alone(kit) -> None:
    kit.encode(views=VIEWS)
    train = latent_cache.open(kit.store, "train")
    values = train.load().numpy().astype(np.float64)
    assert len(values) == 3 * 48
    for split in ("train", "val"):
        cache = latent_cache.open(kit.store, split)
        np.testing.assert_allclose(cache.mean, values.mean((0, 2, 3)), rtol=1e-6)
        np.testing.assert_allclose(cache.std, values.std((0, 2, 3)), rtol=1e-6)
    alone = values[np.repeat([view == "identity" for view in train.video_views], train.lengths)]
    assert not np.allclose(train.mean, alone.mean((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    "views",
    [["sepia"], ["identity", "jitter-0"], ["jitter-01"], ["hflip "], ["identity", "hflip", "hflip"], [], "identity"],
)
def test_wrong_views_are_refused_by_name(kit, views: object) -> None:
    with pytest.raises(UserError, match=r"cache\.views") as raised:
        kit.config(views=views)
    assert not views or str(views[-1]) in str(raised.value)


# Interruptions


def interrupt_at_the_end(kit, **cache: object) -> None:
    """Encode all chunks, and fail before the store is complete."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            kit.encode(**cache)


def markers(kit) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(kit.store.rglob(".encoding/*/*.json"))]


@pytest.mark.parametrize("after", [0, 4])
def test_only_what_is_pending_is_encoded(kit, monkeypatch, after: int) -> None:
    kit.interrupt(after)
    assert len(markers(kit)) == after
    written = count_calls(monkeypatch, ChunkWriter, "write")
    kit.encode()
    assert len(written) == CHUNKS - after
    whole = kit.another("whole")
    whole.encode()
    assert kit.files() == whole.files()


def test_a_video_that_changed_is_encoded_again_and_no_other(kit, monkeypatch) -> None:
    kit.interrupt(after=5, memory_budget=f"{needed_bytes(kit)} B")  # all five of train
    changed = kit.Source({video.id: video.frames for video in kit.splits["train"].videos}, d="other")
    kit.splits = kit.splits | {"train": changed}
    written = count_calls(monkeypatch, ChunkWriter, "write")
    kit.encode()
    # d's frames are 21 to 42 of the split.
    assert sorted((split, chunk.index) for _, split, chunk, *_ in written) == [
        ("train", 2), ("train", 3), ("train", 4), ("val", 0), ("val", 1),
    ]  # fmt: skip
    whole = kit.another("whole")
    whole.encode()
    assert kit.files() == whole.files()


@pytest.mark.parametrize("broken", ["a", "c", "d", "e"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_broken_video_leaves_the_store_of_the_others(kit, monkeypatch, broken: str, interrupted: bool) -> None:
    kit.splits["train"].ends[broken] = 0 if broken == "c" else 4
    if interrupted:
        interrupt_at_the_end(kit, views=VIEWS)
        assert list(kit.run_context.skipped) == [broken]
        kit.run_context.skipped.clear()
        kit.splits["train"].ends.clear()  # what is remembered is not decoded again
    written = count_calls(monkeypatch, ChunkWriter, "write")
    kit.encode(views=VIEWS)
    assert interrupted == (not written)  # all that was encoded past the broken video is kept
    whole = kit.another("whole")
    whole.splits = {
        "train": kit.Source({v.id: v.frames for v in kit.splits["train"].videos if v.id != broken}),
        "val": kit.splits["val"],
    }
    assert list(kit.run_context.skipped) == [broken]
    whole.encode(views=VIEWS)
    ours, theirs = kit.files(), whole.files()
    assert latent_cache.open_notes(kit.store)["skipped"] == {"train": {broken: f"of {broken}"}}
    for key in ("zarr.json", "manifest/zarr.json"):  # the latter has the digest of the former
        assert ours.pop(key) != theirs.pop(key)
    assert ours == theirs


def test_notes_on_broken_videos_are_dropped_when_damaged_or_out_of_date(kit, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.encoding.chunk_encoder.RETRY_SECONDS", (0, 0, 0))  # noted before the interruption
    kit.splits["train"].ends["a"] = 4
    for change in ("damage", "repair"):
        kit.interrupt(after=3)
        (noted,) = kit.store.rglob("broken.json")
        if change == "damage":
            noted.write_text('{"train": 3}')
        else:
            kit.splits["train"] = kit.Source({v.id: v.frames for v in kit.splits["train"].videos}, a="repaired")
            kit.run_context.skipped.clear()
    kit.encode()
    assert kit.run_context.skipped == {}
    whole = kit.another("whole")
    whole.encode()
    assert kit.files() == whole.files()


def test_an_error_in_an_encoding_thread_is_the_error_that_is_raised(kit, network_batch, monkeypatch) -> None:
    def fails(*arguments: object) -> None:
        raise ZeroDivisionError("no latent")

    network_batch(2)
    kit.splits["train"].seconds = dict.fromkeys("abcde", 0.01)  # decoding goes on, and must stop
    monkeypatch.setattr(FrameEncoder, "encode", fails)
    with pytest.raises(ZeroDivisionError, match="no latent"):
        kit.encode(chunk_frames=48, batch_frames=2)
    assert not markers(kit)


def test_no_thread_stays(kit) -> None:
    kit.encode()
    kit.another("other").interrupt(after=1)
    names = {thread.name for thread in threading.enumerate()}
    assert not [name for name in names if name.startswith(("decode", "encode", "chunk", "verify"))]


def test_tasks_of_a_closed_encoder_stop(kit) -> None:
    encoder = encoder_with(kit)
    encoder.close()
    plan = SplitPlan(["a"], ["identity"], [7], (4, 4, 4), 10)
    with pytest.raises((EncodingStopped, RuntimeError)):
        encoder.encode(ChunkWriter(kit.store, "over"), "train", plan.chunk(0))


def test_a_signal_after_the_last_chunk_finds_a_complete_store(kit, monkeypatch) -> None:
    finish = StoreWriter.finish

    def signalled(*arguments: object) -> None:
        finish(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StoreWriter, "finish", signalled)
    with pytest.raises(StoppedBySignal):
        kit.encode()
    assert latent_cache.is_complete(kit.store)


# The summary


def round_trip(kit, split: str, stride: int) -> float:
    """Mean PSNR in dB of every stride-th frame of a split, from the finished store."""
    cache, source, model = latent_cache.open(kit.store, split), kit.splits[split], kit.model.double()
    found = []
    for position in range(0, cache.frames, stride):
        row = int(np.searchsorted(cache.offsets, position, side="right")) - 1
        frame = source.frame(cache.video_ids[row], position - int(cache.offsets[row]))
        if cache.video_views[row] == "hflip":
            frame = frame[:, ::-1]
        elif cache.video_views[row] != "identity":
            transform = view_transform(cache.video_views[row], cache.video_ids[row])
            unit = apply_views(image_to_unit(torch.from_numpy(frame[None].copy())), [transform])[0]
            frame = rearrange((unit + 1) * 127.5, "c h w -> h w c").numpy()
        latent = torch.from_numpy(cache.latents[position : position + 1].astype(np.float64))
        with torch.inference_mode():
            decoded = rearrange(model.decode(latent)[0].clamp(-1, 1), "c h w -> h w c").numpy()
        error = np.mean(((decoded + 1) / 2 - frame / 255.0) ** 2)
        found.append(10 * math.log10(1 / error))
    kit.model.float()
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("cache", "batch", "interrupted"),
    [({}, 2, None), ({}, 8, 4), ({"views": VIEWS, "batch_frames": 3}, 2, 4), ({"views": VIEWS}, 8, None)],
)
def test_summaries_say_what_is_in_the_store(
    kit, network_batch, cache: dict, batch: int, interrupted: int | None
) -> None:
    network_batch(batch)
    if interrupted is not None:
        kit.interrupt(interrupted, **cache)
    for split, summary in kit.encode(**cache).items():
        store = latent_cache.open(kit.store, split)
        codes = store.codes[:]
        counts = np.bincount(codes.ravel(), minlength=64)
        share = counts[counts > 0] / counts.sum()
        assert summary.measured["codes_used"] == np.count_nonzero(counts) > 8
        assert summary.measured["code_perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-12)
        assert summary.frames == store.frames
        assert summary.videos == len(kit.splits[split].videos)
        assert summary.megabytes == pytest.approx(store.nbytes / 1e6)
        codebook = kit.model.quantizer.embedding.weight.numpy().astype(np.float64)
        vectors = rearrange(store.load().numpy().astype(np.float64), "n c y x -> n y x 1 c")
        nearest = np.square(vectors - codebook).sum(-1).argmin(-1)
        assert summary.measured["codes_changed"] == pytest.approx(np.mean(nearest != codes), abs=1e-9)
        assert summary.measured["round_trip_psnr"] == pytest.approx(round_trip(kit, split, 8), abs=2e-3)
        assert store.notes == summary.measured


def test_a_broken_video_does_not_change_which_frames_are_measured(kit, monkeypatch) -> None:
    """Chunks that are kept were measured before. The whole index decides, as it decides the size of the chunks."""
    monkeypatch.setattr("pipelines.encoding.store_encoder.PSNR_FRAMES", 4)
    kit.splits = {"train": kit.Source({f"v{row}": 16 for row in range(7)})}
    kit.splits["train"].ends["v3"] = 3
    summary = kit.encode()["train"]
    assert summary.frames == 96
    assert summary.measured["round_trip_psnr"] == pytest.approx(round_trip(kit, "train", 112 // 4), abs=2e-3)
    measured = count_calls(monkeypatch, FrameEncoder, "round_trip_psnr")
    kit.another("again").encode()
    assert 0 < len(measured) <= 2 * 4  # of the plan with the broken video, and of the one without


def test_codes_that_rounding_would_change_are_counted(kit) -> None:
    make_codes_dense(kit)
    summary = kit.encode()["train"]
    source = kit.splits["train"]
    frames = np.concatenate([frames_of(source, video.id) for video in source.videos])
    latents = torch.cat([one.latents[:1] for one in encoded_alone(kit, frames)])
    quantizer, store = kit.model.quantizer, latent_cache.open(kit.store)
    exact = quantizer.nearest(latents)
    np.testing.assert_array_equal(store.codes[:], exact.numpy())
    moved = quantizer.nearest(latents.half().float()) != exact
    changed = quantizer.nearest(store.load().float()) != exact
    assert moved.float().mean() > 0.001
    assert summary.measured["codes_changed"] == pytest.approx(float(changed.float().mean()), rel=1e-6)
    assert summary.measured["codes_held"] == pytest.approx(float((moved & ~changed).float().mean()), rel=1e-6)
    assert summary.measured["codes_held"] > 0
    assert summary.measured["codes_changed"] > 0
    exactly = kit.another("exactly").encode(dtype="float32")["train"].measured
    assert (exactly["codes_changed"], exactly["codes_held"]) == (0, 0)


def test_codes_are_held_whatever_the_batches(kit) -> None:
    make_codes_dense(kit)
    kit.encode()
    other = kit.another("other")
    other.encode(batch_frames=500, chunk_frames=3)
    ours, theirs = latent_cache.open(other.store), latent_cache.open(kit.store)
    np.testing.assert_array_equal(ours.load().numpy(), theirs.load().numpy())
    assert ours.notes["codes_held"] == theirs.notes["codes_held"] > 0


def test_the_rate_is_of_what_this_command_encoded(kit, capsys, monkeypatch) -> None:
    monkeypatch.setattr("pipelines.encoding.store_encoder.REPORT_SECONDS", 0.0)
    whole = kit.encode()
    out = capsys.readouterr().out
    assert "encoding 61 frames\n" in out
    assert re.search(r"\d+ of 61 frames encoded, [1-9]\d* frames/s, about \d+ s left\n", out)
    assert re.search(r"store: 61 frames encoded in \d+ s, [1-9]\d* frames/s\n", out)
    resumed = kit.another("resumed")
    resumed.interrupt(after=5, memory_budget=f"{needed_bytes(kit)} B")  # all of train, 48 frames
    assert resumed.encode() == whole
    assert "store: 13 frames encoded" in capsys.readouterr().out
    finished = kit.another("finished")
    interrupt_at_the_end(finished)
    capsys.readouterr()
    assert finished.encode() == whole
    assert "frames/s" not in capsys.readouterr().out


@pytest.mark.parametrize("normalize", [False, True])
def test_codes_alone_decode_to_what_the_latents_do(kit, normalize: bool) -> None:
    kit.model.config = kit.model.config.model_copy(update={"normalize_codes": normalize})
    kit.model.quantizer.normalize = normalize
    kit.encode(dtype="float32")
    cache = latent_cache.open(kit.store)
    vectors = torch.from_numpy(cache.codebook[cache.video_codes("d")]).movedim(-1, 1)
    latents = torch.from_numpy(cache.video("d"))
    assert torch.equal(vectors, kit.model.quantize(latents)[0])
    assert torch.equal(kit.model.decode_quantized(vectors), kit.model.decode(latents))


def test_each_video_has_its_rate_and_size(kit) -> None:
    rates = {"a": 10.0, "b": 30.0, "c": 25.0, "d": 30.0, "e": 0.5}
    source = kit.splits["train"]
    source.videos = [replace(video, fps=rates[video.id], size=(40, 30)) for video in source.videos]
    source.ends["c"] = 0  # broken, and not in the store
    kit.encode(views=["identity", "hflip"])
    cache = latent_cache.open(kit.store)
    assert cache.video_fps.tolist() == [rates[video] for video in cache.video_ids]
    assert cache.video_sizes.tolist() == [[40, 30]] * len(cache.video_ids)
    assert cache.metadata.fps == 30.0
    assert latent_cache.open(kit.store, "val").video_fps.tolist() == [10.0, 10.0]


def test_a_store_without_codes_has_the_same_summary(kit) -> None:
    other = kit.another("other")
    assert other.encode(codes=False) == kit.encode()
    assert latent_cache.open(other.store).codes is None


# New videos of a complete store


@pytest.mark.parametrize("interrupted", [False, True])
def test_new_videos_are_encoded_as_if_they_had_been_there(kit, monkeypatch, interrupted: bool) -> None:
    """But behind the others; their decoding, and no other, is what is done. A broken one is left out and named."""
    kit.encode(views=VIEWS)
    old = {split: latent_cache.open(kit.store, split) for split in kit.splits}
    expected = {split: cache.load() for split, cache in old.items()}
    fingerprints = {split: cache.fingerprint for split, cache in old.items()}
    train = {"new1": 6, "a": 7, "b": 13, "c": 1, "torn": 9, "d": 22, "e": 5, "new2": 17}
    kit.splits = {"train": kit.Source(train), "val": kit.splits["val"]}
    kit.splits["train"].ends["torn"] = 4
    kit.added = {"train": {"new1", "torn", "new2"}}
    if interrupted:
        kit.interrupt(after=2, views=VIEWS)
    summaries = kit.encode(views=VIEWS)
    assert (list(summaries), summaries["train"].videos, summaries["train"].frames) == (["train"], 2, 3 * 23)
    assert {video for video, *_ in kit.splits["train"].passes} == {"new1", "torn", "new2"}
    assert list(kit.run_context.skipped) == ["torn"]
    assert latent_cache.open_notes(kit.store)["skipped"] == {"train": {"torn": "of torn"}}

    alone = kit.another("alone")
    alone.splits = {"train": kit.Source({"new1": 6, "new2": 17})}
    alone.encode(views=VIEWS)
    now = latent_cache.open(kit.store)
    assert list(dict.fromkeys(now.video_ids)) == ["a", "b", "c", "d", "e", "new1", "new2"]
    assert torch.equal(now.load(), torch.cat([expected["train"], latent_cache.open(alone.store).load()]))
    np.testing.assert_array_equal(now.mean, old["train"].mean)
    assert now.fingerprint != fingerprints["train"]
    assert now.notes == old["train"].notes | {"appended_videos": 2}
    val = latent_cache.open(kit.store, "val")
    assert val.fingerprint == fingerprints["val"]
    assert torch.equal(val.load(), expected["val"])
