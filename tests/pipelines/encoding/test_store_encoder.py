"""Encoding a store: the same bytes whatever the order, the batches and the threads; views; budget; what is reported."""

import json
import math
import re
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange

import latent_cache
import pipelines.encoding.chunk_encoder as chunk_task
import pipelines.encoding.chunk_encoder as encode_chunks
import pipelines.encoding.store_encoder as store_encoder
from latent_cache import ChunkWriter, NoSpaceError, SplitPlan, StoreMismatchError, StoreWriter
from pipelines.config import parse_size
from pipelines.encoding.chunk_encoder import ChunkEncoder, ChunkTask, EncodingStopped, _Batch, psnr_stride
from pipelines.errors import StoppedBySignal, UserError
from stage1_autoencoder.autoencoder import image_to_unit
from stage1_autoencoder.frame_encoder import FrameEncoder
from stage1_autoencoder.views import ViewTransform, apply_views, view_transform
from stage1_autoencoder.vqgan import VQGAN

VIEWS = ["identity", "hflip", "jitter-1"]
IDENTITY = ViewTransform()


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list:
    """The arguments of each call of a method."""
    method, calls = getattr(owner, name), []

    def counted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


def frames_of(source, video: str) -> np.ndarray:
    count = next(info.frames for info in source.videos if info.id == video)
    return np.stack([source.frame(video, number) for number in range(count)])


def encode_alone(model: VQGAN, frames: np.ndarray) -> np.ndarray:
    """Latents of frames as they are stored, each of which is encoded in a batch of nothing but itself."""
    encoder = FrameEncoder(model, torch.device("cpu"), frames.shape[1])
    encoded = [encoder.encode(frame[None], [IDENTITY]) for frame in frames]
    stored = [model.quantizer.rounded(one.latents, one.codes, torch.float16).latents[0] for one in encoded]
    return torch.stack(stored).numpy()


def make_codes_dense(kit) -> None:
    """Let the codebook be so dense that rounding to fp16 alone would move many latents to another code."""
    weight = kit.model.quantizer.embedding.weight
    base = encode_alone(kit.model, kit.splits["train"].frame("a", 0)[None]).astype(np.float32)[0, :, 1, 1]
    distance = torch.tensor([1e-2, 1e-5]).repeat(len(weight) // 2)[:, None]  # the latter are beyond what fp16 can tell
    weight.copy_(torch.from_numpy(base) + distance * torch.randn(weight.shape, generator=torch.manual_seed(0)))


# Determinism


@pytest.mark.parametrize(
    ("cache", "threads"),
    [
        ({"batch_frames": 1}, 1),
        ({"batch_frames": 7}, 1),
        ({"batch_frames": 500}, 1),
        ({"memory_budget": "1 TiB"}, 1),
        ({}, 2),
        ({}, 4),
    ],
)
def test_the_same_bytes_whatever_batches_and_threads(kit, monkeypatch, cache: dict, threads: int) -> None:
    monkeypatch.setattr("stage1_autoencoder.frame_encoder.PASS_PIXELS", {"cpu": 3 * 16**2})
    kit.encode(batch_frames=3)
    other = kit.another("other")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    other.encode(**cache)
    assert torch.get_num_threads() == threads  # left as it was
    torch.set_num_threads(before)
    assert other.files() == kit.files()


@pytest.mark.parametrize("slow", [{"a": 0.01}, {"d": 0.003}, {"c": 0.02, "e": 0.002, "v": 0.005}])
def test_the_same_bytes_whatever_is_decoded_first(kit, monkeypatch, slow: dict[str, float]) -> None:
    monkeypatch.setattr("stage1_autoencoder.frame_encoder.PASS_PIXELS", {"cpu": 3 * 16**2})
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


def test_latents_and_codes_lie_where_the_frames_do(kit) -> None:
    kit.encode()
    for split, source in kit.splits.items():
        cache = latent_cache.open(kit.store, split)
        assert list(cache.video_ids) == [video.id for video in source.videos]
        for video in cache.video_ids:
            expected = encode_alone(kit.model, frames_of(source, video))
            np.testing.assert_array_equal(cache.video(video), expected)


def test_a_frame_does_not_depend_on_its_company(kit) -> None:
    encoder = FrameEncoder(kit.model, torch.device("cpu"), 16)
    assert encoder.frames == 8
    frames = np.stack([kit.splits["train"].frame("d", number) for number in range(8)])
    views = [view_transform(view, "d") for view in ("identity", "hflip", "jitter-1", "jitter-2") * 2]
    alone = [encoder.encode(frame[None], [view]) for frame, view in zip(frames, views, strict=True)]
    for order in (list(range(8)), [7, 3, 0, 6, 1, 2, 5, 4], [2, 2, 5], [4, 0]):
        together = encoder.encode(frames[order], [views[row] for row in order])
        for place, row in enumerate(order):
            for name in ("images", "latents", "codes"):
                assert torch.equal(getattr(together, name)[place], getattr(alone[row], name)[0])


# Memory


@pytest.fixture
def in_flight(monkeypatch) -> SimpleNamespace:
    """Bytes of frames in batches that live, and tasks at once: the most there were."""
    state = SimpleNamespace(bytes=0, most_bytes=0, tasks=0, most_tasks=0, lock=threading.Lock())

    class Watched(_Batch):
        def __init__(self, start: int, frames: np.ndarray, **others: object) -> None:
            super().__init__(start, frames, **others)
            self.size = frames.nbytes
            with state.lock:
                state.bytes += self.size
                state.most_bytes = max(state.most_bytes, state.bytes)

        def __del__(self) -> None:
            state.bytes -= self.size

    run = ChunkTask.run

    def watched_run(self: ChunkTask) -> object:
        with state.lock:
            state.tasks += 1
            state.most_tasks = max(state.most_tasks, state.tasks)
        try:
            return run(self)
        finally:
            with state.lock:
                state.tasks -= 1

    monkeypatch.setattr(chunk_task, "_Batch", Watched)
    monkeypatch.setattr(ChunkTask, "run", watched_run)
    return state


@pytest.mark.parametrize("views", [["identity"], VIEWS])
def test_what_is_in_flight_does_not_grow_with_the_videos(kit, monkeypatch, in_flight, views: list[str]) -> None:
    """Encoding is made slower than decoding, which must wait for it."""
    monkeypatch.setattr("stage1_autoencoder.frame_encoder.PASS_PIXELS", {"cpu": 4 * 16**2})
    encode_pass = ChunkTask.encode_pass

    def slow(*arguments: object) -> None:
        time.sleep(0.002)
        encode_pass(*arguments)

    monkeypatch.setattr(ChunkTask, "encode_pass", slow)
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
    cores = len(encode_chunks.os.sched_getaffinity(0))
    allowed = (2 * cores * len(views) + 3 * cores) * encoder.frames_a_batch * 3 * 16**2
    assert 0 < most[60] <= allowed
    assert most[60] < 540 * 3 * 16**2 / 2
    assert in_flight.most_tasks <= 2


def test_a_budget_for_one_chunk_makes_one_at_a_time(kit, in_flight) -> None:
    with pytest.raises(UserError, match=r"cache\.memory_budget"):
        kit.encode(memory_budget="1 KiB")
    needed = needed_bytes(kit)
    for source in kit.splits.values():
        source.seconds = dict.fromkeys("abcdevw", 0.001)
    kit.encode(memory_budget=f"{needed} B")
    assert in_flight.most_tasks == 1
    other = kit.another("other")
    other.encode(memory_budget=f"{2 * needed} B")
    assert in_flight.most_tasks == 2
    assert other.files() == kit.files()


def needed_bytes(kit) -> int:
    """The smallest budget that is accepted, by bisection."""
    low, high = 1, 2**30
    while low < high:
        middle = (low + high) // 2
        try:
            encoder_with(kit, memory_budget=f"{middle} B").close()
            high = middle
        except UserError:
            low = middle + 1
    return low


def encoder_with(kit, **cache: object) -> ChunkEncoder:
    job = SimpleNamespace(splits=kit.splits, cache=kit.config(**cache).cache, chunk_frames=10)
    return ChunkEncoder(job, kit.model, torch.device("cpu"))


def test_too_small_a_budget_says_what_is_enough(kit) -> None:
    with pytest.raises(UserError, match=r"cache\.memory_budget: 2 KiB is too little") as raised:
        kit.encode(memory_budget="2 KiB")
    text = str(raised.value)
    assert "cache.batch_frames" in text
    assert "cache.chunk_frames" in text
    enough = re.search(r"([\d.]+ \w+) are needed", text)[1]
    assert parse_size(enough) <= 2 * needed_bytes(kit) + 2**20
    kit.encode(memory_budget=enough)
    assert latent_cache.is_complete(kit.store)


def test_too_small_a_budget_leaves_the_old_store(kit) -> None:
    """Refused before anything is thrown away."""
    kit.encode()
    before = kit.files()
    with pytest.raises(UserError, match="memory_budget"):
        kit.encode(overwrite=True, memory_budget="2 KiB")
    assert kit.files() == before


def test_the_budget_counts_what_float32_takes(kit) -> None:
    sizes = {}
    for dtype in ("float16", "float32"):
        job = SimpleNamespace(splits=kit.splits, cache=kit.config(dtype=dtype).cache, chunk_frames=10**5)
        with pytest.raises(UserError, match="MiB of latents") as raised:
            ChunkEncoder(
                SimpleNamespace(
                    splits=job.splits,
                    chunk_frames=job.chunk_frames,
                    cache=kit.config(dtype=dtype, memory_budget="1 B").cache,
                ),
                kit.model,
                torch.device("cpu"),
            )
        sizes[dtype] = int(re.search(r"([\d]+) MiB of latents", str(raised.value))[1])
    values = 10**5 * 4 * 4 * 4 / 2**20
    # Measured: 10 bytes a value in float16 and 12 in float32, when a chunk is written.
    assert sizes["float16"] >= 10 * values - 1
    assert sizes["float32"] >= 12 * values - 1


# Views


def test_views_lie_side_by_side_and_each_is_what_its_name_says(kit) -> None:
    kit.encode(views=VIEWS)
    source, cache = kit.splits["train"], latent_cache.open(kit.store, "train")
    ids = [video.id for video in source.videos]
    assert list(cache.video_ids) == [video for video in ids for _ in VIEWS]
    assert list(cache.video_views) == VIEWS * len(ids)
    assert cache.lengths.tolist() == [video.frames for video in source.videos for _ in VIEWS]
    for video in ids:
        frames = frames_of(source, video)
        np.testing.assert_array_equal(cache.video(video), encode_alone(kit.model, frames))
        mirrored = np.ascontiguousarray(frames[:, :, ::-1])
        np.testing.assert_array_equal(cache.video(video, "hflip"), encode_alone(kit.model, mirrored))
        jitter = [view_transform("jitter-1", video)] * len(frames)
        with torch.inference_mode():
            latents = kit.model.encode(apply_views(image_to_unit(torch.from_numpy(frames)), jitter))
        np.testing.assert_allclose(cache.video(video, "jitter-1"), latents.numpy(), rtol=2e-3, atol=2e-3)
        assert not np.array_equal(cache.video(video, "jitter-1"), cache.video(video))
    assert list(latent_cache.open(kit.store, "val").video_ids) == ["v", "w"]
    assert set(latent_cache.open(kit.store, "val").video_views) == {"identity"}


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
    alone = values[:, :, :, :][np.repeat([view == "identity" for view in train.video_views], train.lengths)]
    assert not np.allclose(train.mean, alone.mean((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("views", "needed"),
    [
        (["sepia"], "'sepia' is not a view"),
        (["identity", "jitter-0"], "'jitter-0' is not a view"),
        (["identity", "jitter-01"], "'jitter-01' is not a view"),
        (["identity", "hflip "], "is not a view"),
        (["identity", "hflip", "hflip"], "none twice"),
        ([], "at least one view"),
        ("identity", "cache.views"),
    ],
)
def test_wrong_views_are_refused_by_name(kit, views: object, needed: str) -> None:
    with pytest.raises(UserError, match=r"cache\.views") as raised:
        kit.config(views=views)
    assert needed in str(raised.value)


def test_other_views_of_an_incomplete_store_are_refused(kit, monkeypatch) -> None:
    interrupt(kit, monkeypatch, after=2, views=["identity"])
    with pytest.raises(StoreMismatchError, match=r"preprocessing\.views: \['identity', 'hflip'\] here, \['identity'\]"):
        kit.encode(views=["identity", "hflip"])


# Interruptions


def interrupt(kit, monkeypatch, after: int, **cache: object) -> None:
    """Let encoding fail when so many chunks are written."""
    write, calls, lock = ChunkWriter.write, [], threading.Lock()

    def fails(*arguments: object) -> object:
        with lock:
            calls.append(1)
            if len(calls) > after:
                raise OSError(5, "Input/output error")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkWriter, "write", fails)
        with pytest.raises(OSError, match="Input/output error"):
            kit.encode(**cache)


def markers(kit) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(kit.store.rglob(".encoding/*/*.json"))]


@pytest.mark.parametrize("after", [0, 3, 6])
def test_only_what_is_pending_is_encoded(kit, monkeypatch, capsys, after: int) -> None:
    interrupt(kit, monkeypatch, after)
    done = len(markers(kit))
    assert done == after
    for source in kit.splits.values():
        source.passes.clear()
    written = count_calls(monkeypatch, ChunkWriter, "write")
    kit.encode()
    assert len(written) == 7 - done
    whole = kit.another("whole")
    whole.encode()
    assert kit.files() == whole.files()
    assert ("are there already" in capsys.readouterr().out) == (done > 0)


def test_a_video_that_changed_is_encoded_again_and_no_other(kit, monkeypatch) -> None:
    """An incomplete store: only the chunks with the changed video are made anew."""
    interrupt(kit, monkeypatch, after=5, memory_budget=f"{needed_bytes(kit)} B")  # all five of train
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
def test_a_video_that_breaks_leaves_the_store_of_the_others(kit, broken: str) -> None:
    kit.splits["train"].ends[broken] = 0 if broken == "c" else 4
    kit.encode(views=VIEWS)
    whole = kit.another("whole")
    whole.splits = {
        "train": kit.Source({v.id: v.frames for v in kit.splits["train"].videos if v.id != broken}),
        "val": kit.splits["val"],
    }
    whole.encode(views=VIEWS)
    ours, theirs = kit.files(), whole.files()
    assert latent_cache.open_notes(kit.store) == {"skipped": {"train": {broken: f"of {broken}"}}}
    assert ours.pop("zarr.json") != theirs.pop("zarr.json")
    assert ours == theirs
    assert list(kit.run_context.skipped) == [broken]


def test_a_video_that_breaks_changes_no_sample_of_the_round_trip(kit, monkeypatch) -> None:
    """Of a large split every so many-th frame is measured, and chunks that are kept were measured before."""
    monkeypatch.setattr(chunk_task, "PSNR_FRAMES", 4)
    lengths = {f"v{row}": 16 for row in range(7)}
    kit.splits = {"train": kit.Source(lengths)}
    kit.splits["train"].ends["v3"] = 3
    report = kit.encode()["train"]
    assert report.frames == 96
    assert psnr_stride(96) != psnr_stride(112)
    # The whole index decides, as it decides the size of the chunks.
    expected = round_trip(kit, "train", psnr_stride(112))
    assert report.round_trip_psnr == pytest.approx(expected, abs=2e-3)


def test_a_disk_that_fills_up_tells_what_is_still_needed(kit, monkeypatch) -> None:
    write, calls = ChunkWriter.write, []

    def full(*arguments: object) -> object:
        calls.append(1)
        if len(calls) > 2:
            raise NoSpaceError("no space left for chunk 2")
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkWriter, "write", full)
        with pytest.raises(NoSpaceError, match=r"0\.0 MB of latents are still to be written: free as much"):
            kit.encode()
    assert len(markers(kit)) == 2


def test_an_error_in_an_encoding_thread_is_the_error_that_is_raised(kit, monkeypatch) -> None:
    def fails(*arguments: object) -> None:
        raise ZeroDivisionError("no latent")

    monkeypatch.setattr("stage1_autoencoder.frame_encoder.PASS_PIXELS", {"cpu": 2 * 16**2})
    kit.splits["train"].seconds = dict.fromkeys("abcde", 0.01)  # decoding still goes on, and is told to stop
    monkeypatch.setattr(ChunkTask, "encode_pass", fails)
    with pytest.raises(ZeroDivisionError, match="no latent"):
        kit.encode(chunk_frames=48, batch_frames=2)
    assert not markers(kit)


def test_no_thread_of_ours_stays(kit, monkeypatch) -> None:
    kit.encode()
    interrupt(kit.another("other"), monkeypatch, after=1)
    names = {thread.name for thread in threading.enumerate()}
    assert not [name for name in names if name.startswith(("decode", "encode", "chunk", "verify"))]


def test_tasks_of_a_closed_encoder_stop(kit) -> None:
    encoder = encoder_with(kit)
    encoder.close()
    plan = SplitPlan(["a"], ["identity"], [7], (4, 4, 4), 10)
    with pytest.raises((EncodingStopped, RuntimeError)):
        encoder.encode("train", plan.chunk(0))


# Reports


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


@pytest.mark.parametrize("interrupted", [None, 4])
@pytest.mark.parametrize("cache", [{}, {"views": VIEWS, "batch_frames": 3}])
@pytest.mark.parametrize("passes", [2, 8])
def test_reports_say_what_is_in_the_store(kit, monkeypatch, cache: dict, interrupted: int | None, passes: int) -> None:
    monkeypatch.setattr("stage1_autoencoder.frame_encoder.PASS_PIXELS", {"cpu": passes * 16**2})
    if interrupted is not None:
        interrupt(kit, monkeypatch, interrupted, **cache)
    for split, report in kit.encode(**cache).items():
        store = latent_cache.open(kit.store, split)
        codes = store.codes[:]
        counts = np.bincount(codes.ravel(), minlength=64)
        share = counts[counts > 0] / counts.sum()
        assert report.codes_used == np.count_nonzero(counts) > 8
        assert report.code_perplexity == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-12)
        assert report.frames == store.frames
        assert report.videos == len(kit.splits[split].videos)
        assert report.megabytes == pytest.approx(store.nbytes / 1e6)
        codebook = kit.model.quantizer.embedding.weight.numpy().astype(np.float64)
        vectors = rearrange(store.load().numpy().astype(np.float64), "n c y x -> n y x 1 c")
        nearest = np.square(vectors - codebook).sum(-1).argmin(-1)
        assert report.codes_changed == pytest.approx(np.mean(nearest != codes), abs=1e-9)
        assert report.round_trip_psnr == pytest.approx(round_trip(kit, split, 8), abs=2e-3)
        notes = store.notes
        assert notes["code_perplexity"] == report.code_perplexity
        assert notes["round_trip_psnr"] == report.round_trip_psnr


def test_codes_that_rounding_would_move_are_counted(kit) -> None:
    make_codes_dense(kit)
    report = kit.encode()["train"]
    videos = [encode_full(kit, "train", video.id) for video in kit.splits["train"].videos]
    latents = torch.from_numpy(np.concatenate(videos))
    quantizer, store = kit.model.quantizer, latent_cache.open(kit.store)
    exact = quantizer.nearest(latents)
    np.testing.assert_array_equal(store.codes[:], exact.numpy())
    moved = quantizer.nearest(latents.half().float()) != exact
    changed = quantizer.nearest(store.load().float()) != exact
    assert moved.float().mean() > 0.001
    assert report.codes_changed == pytest.approx(float(changed.float().mean()), rel=1e-6)
    assert report.codes_held == pytest.approx(float((moved & ~changed).float().mean()), rel=1e-6)
    assert report.codes_held > 0
    assert report.codes_changed > 0
    exactly = kit.another("exactly").encode(dtype="float32")["train"]
    assert (exactly.codes_changed, exactly.codes_held) == (0, 0)


@pytest.mark.parametrize("cache", [{"batch_frames": 500}, {"chunk_frames": 48}, {"chunk_frames": 3}])
def test_codes_are_held_whatever_the_company(kit, cache: dict) -> None:
    make_codes_dense(kit)
    kit.encode()
    other = kit.another("other")
    other.encode(**cache)
    ours, theirs = latent_cache.open(other.store), latent_cache.open(kit.store)
    np.testing.assert_array_equal(ours.load().numpy(), theirs.load().numpy())
    assert ours.notes["codes_held"] == theirs.notes["codes_held"] > 0


def encode_full(kit, split: str, video: str) -> np.ndarray:
    encoder = FrameEncoder(kit.model, torch.device("cpu"), 16)
    frames = frames_of(kit.splits[split], video)
    return np.concatenate([encoder.encode(frame[None], [IDENTITY]).latents[:1].numpy() for frame in frames])


def test_the_rate_is_of_what_this_command_encoded(kit, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            kit.encode()
    reports = kit.encode()  # every chunk was there
    for report in reports.values():
        assert report.frames_per_second is None
        assert "frames/s" not in report.line()
    again = kit.another("again")
    interrupt(again, monkeypatch, after=5, memory_budget=f"{needed_bytes(kit)} B")  # all of train
    fresh = again.encode()
    assert fresh["train"].frames_per_second is None
    assert fresh["val"].frames_per_second > 0
    assert re.search(r"[1-9]\d* frames/s, ", fresh["val"].line())
    for split, report in reports.items():
        assert report.notes() == fresh[split].notes()


def test_a_clock_that_is_set_back_gives_no_negative_rate(kit, monkeypatch) -> None:
    clock = iter(range(10**6, 0, -1))
    monkeypatch.setattr(encode_chunks.time, "time", lambda: float(next(clock)))
    for report in kit.encode().values():
        assert report.frames_per_second > 0


def test_a_store_without_codes_has_the_same_report(kit) -> None:
    other = kit.another("other")
    for split, report in kit.encode().items():
        assert report.notes() == other.encode(codes=False, overwrite=True)[split].notes()
    assert latent_cache.open(other.store).codes is None


def test_how_many_frames_are_measured() -> None:
    every, most = chunk_task.PSNR_EVERY, chunk_task.PSNR_FRAMES
    assert psnr_stride(1) == psnr_stride(every * most) == every
    assert psnr_stride(every * most + 1) == every + 1
    for frames in (1, every - 1, every + 1, every * most, every * most + 1, 10**6, 10**6 + 1):
        assert 0 < len(range(0, frames, psnr_stride(frames))) <= most


def test_a_signal_after_the_last_chunk_finds_a_complete_store(kit, monkeypatch) -> None:
    finish = StoreWriter.finish

    def signalled(*arguments: object) -> None:
        finish(*arguments)
        encode_chunks.os.kill(encode_chunks.os.getpid(), 15)

    monkeypatch.setattr(StoreWriter, "finish", signalled)
    with pytest.raises(StoppedBySignal, match="is complete"):
        kit.encode()
    assert latent_cache.is_complete(kit.store)


def test_shards_are_made_as_chunks_are(kit, monkeypatch) -> None:
    """Of very many chunks several lie in a file, and a task makes a file."""
    kit.encode()
    sharded = kit.another("sharded")
    with monkeypatch.context() as patch:
        patch.setattr(store_encoder.latent_cache, "default_shard_chunks", lambda frames, chunk_frames: 3)
        interrupt(sharded, monkeypatch, after=1, chunk_frames=4)
        sharded.encode(chunk_frames=4)
    for split in ("train", "val"):
        ours, theirs = latent_cache.open(sharded.store, split), latent_cache.open(kit.store, split)
        assert ours.latents.shards[0] == 12
        np.testing.assert_array_equal(ours.load().numpy(), theirs.load().numpy())
        np.testing.assert_array_equal(ours.codes[:], theirs.codes[:])
