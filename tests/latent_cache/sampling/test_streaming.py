"""Streaming: each target once an epoch, the right frames around it, a function of (seed, step), little memory."""

import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import latent_cache
from latent_cache import CorruptStoreError, StoreError, StoreWriter, StreamingSampler, open_sampler
from latent_cache.sampling.draws import LegalTargets
from latent_cache.sampling.windows import WindowPlan
from tests.latent_cache.sampling.test_sampler import exact_probabilities

FRAME_BYTES = 2 * 3 * 4 * 2
RAGGED = [1, 5, 2, 3, 12, 1, 4, 9, 2, 2, 2, 7, 30, 3]


@pytest.fixture(scope="module", autouse=True)
def _unread_rows_are_nan() -> Iterator[None]:
    """New buffers hold NaN, so that a row beside a group and its halo, which nobody reads, would show."""
    patch, empty = pytest.MonkeyPatch(), np.empty

    def poisoned(*arguments, **options):
        array = empty(*arguments, **options)
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    patch.setattr(np, "empty", poisoned)
    yield
    patch.undo()


def budget_of(groups, chunk_frames, clip_frames, longest, group_chunks=1):
    """Memory for two windows of so many groups."""
    return 2 * groups * (group_chunks * chunk_frames + min(clip_frames, longest) - 1) * FRAME_BYTES


def make_sampler(cache, batch_size=8, clip_frames=6, seed=3, groups=4, budget=None, **options):
    if budget is None:
        budget = budget_of(groups, cache.latent_reader.chunk_frames, clip_frames, cache.lengths.max())
    sampler = StreamingSampler(cache, "cpu", seed, batch_size, clip_frames, budget, **options)
    assert sampler.plan.nbytes <= budget
    return sampler


def served(batches):
    """[samples, 3] video, target, condition, after a check that all frames are what they should be."""
    rows = []
    for batch in batches:
        frames = torch.stack([batch.target, batch.reference, batch.condition])
        assert torch.equal(frames[:, :, :2], frames[:, :, :2, :1, :1].expand_as(frames[:, :, :2]))
        assert not frames[:, :, 2:].any()
        video, place = frames[:, :, 0, 0, 0], frames[:, :, 1, 0, 0]
        assert torch.equal(video[0], video[1])
        assert torch.equal(video[0], video[2])
        assert torch.equal(place[1], place[0] - 1)
        assert torch.equal(place[2], place[1] - batch.distance)
        rows.append(torch.stack([video[0], place[0], place[2]], 1).long().numpy())
    return np.concatenate(rows)


def epochs_of(sampler, epochs):
    """`served` of whole epochs from the start, [epochs, targets, 3]."""
    samples = epochs * sampler.legal_targets
    rows = served(sampler.batch(step) for step in range(-(-samples // sampler.batch_size)))
    return rows[:samples].reshape(epochs, -1, 3)


def check_epochs(sampler, lengths, clip_frames, epochs=3):
    clip_frames = min(clip_frames, sampler.past_horizon + 1) if sampler.past_horizon else clip_frames
    legal = {(video, target) for video, length in enumerate(lengths) for target in range(2, length)}
    for epoch in epochs_of(sampler, epochs):
        pairs = [(video, target) for video, target, _ in epoch.tolist()]
        assert len(pairs) == len(legal)
        assert set(pairs) == legal
        assert (epoch[:, 2] >= 0).all()
        assert (epoch[:, 1] - epoch[:, 2] < clip_frames).all()
        assert (epoch[:, 1] - epoch[:, 2] >= 2).all()


@pytest.mark.parametrize(
    ("lengths", "chunk_frames", "clip_frames", "past_horizon", "dtype"),
    [
        (RAGGED, 4, 6, None, "float16"),
        (RAGGED, 4, 40, 3, "float32"),  # halos over many chunks, but for the horizon
        (RAGGED, 200, 6, None, "float16"),  # one chunk
        ([41, 3, 26], 4, 12, None, "float16"),  # videos over many chunks
        ([2, 2, 2, 2, 9, 2, 2, 2, 2, 2, 1, 1, 30, 2, 2, 2, 2, 2], 4, 6, None, "float32"),  # groups without a target
    ],
)
def test_an_epoch_of_a_store_serves_every_target_once(
    numbered, lengths, chunk_frames, clip_frames, past_horizon, dtype
):
    cache = numbered(lengths, chunk_frames, dtype=dtype)
    budget = budget_of(5, chunk_frames, clip_frames, max(lengths)) * (2 if dtype == "float32" else 1)
    sampler = make_sampler(cache, clip_frames=clip_frames, budget=budget, past_horizon=past_horizon)
    assert sampler.legal_targets == sum(max(length - 2, 0) for length in lengths)
    check_epochs(sampler, lengths, clip_frames)
    sampler.close()


class Reader:
    """Chunks of numbered frames, from nowhere."""

    def __init__(self, cache, chunk_frames):
        self.cache, self.chunk_frames, self.reads, self.seconds = cache, chunk_frames, [], 0.0

    def check_files(self):
        pass

    def read_chunk(self, index, out):
        self.reads.append(index)
        frames = np.arange(index * self.chunk_frames, min((index + 1) * self.chunk_frames, self.cache.frames))
        video = np.searchsorted(self.cache.offsets, frames, side="right") - 1
        out[:] = 0
        out[:, 0], out[:, 1] = video[:, None, None], (frames - self.cache.offsets[video])[:, None, None]
        time.sleep(self.seconds)


def imagined(lengths, chunk_frames):
    """As `numbered`, without files."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    cache = SimpleNamespace(
        url="imagined",
        split="train",
        offsets=offsets,
        lengths=np.diff(offsets),
        frames=int(offsets[-1]),
        latent_shape=(2, 3, 4),
        latents=SimpleNamespace(dtype=np.dtype(np.float16)),
        nbytes=int(offsets[-1]) * FRAME_BYTES,
    )
    cache.latent_reader = Reader(cache, chunk_frames)
    return cache


@settings(max_examples=60, deadline=None)
@example(  # halos that are a sixteenth of the budget must not take room that the windows need
    lengths=[1, 1, 1, 15, 25], chunk_frames=14, clip_frames=3, groups=4, group_chunks=1, batch_size=1, past_horizon=None
)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=25).filter(lambda lengths: max(lengths) > 2),
    chunk_frames=st.integers(1, 30),
    clip_frames=st.integers(3, 30),
    groups=st.integers(4, 20),
    group_chunks=st.integers(1, 5),
    batch_size=st.integers(1, 50),
    past_horizon=st.none() | st.integers(2, 40),
)
def test_any_split_is_served_whole(lengths, chunk_frames, clip_frames, groups, group_chunks, batch_size, past_horizon):
    cache = imagined(lengths, chunk_frames)
    budget = budget_of(groups, chunk_frames, clip_frames, max(lengths), group_chunks)
    sampler = make_sampler(cache, batch_size, clip_frames, budget=budget, past_horizon=past_horizon)
    check_epochs(sampler, lengths, clip_frames, epochs=2)
    sampler.close()


@pytest.mark.parametrize(("groups", "epochs", "past_horizon"), [(4, 300, None), (4, 300, 4), (50, 3000, 3)])
def test_conditions_have_their_exact_probability(groups, epochs, past_horizon):
    lengths, clip_frames = [1, 5, 2, 3, 12, 1, 4], 6
    sampler = make_sampler(imagined(lengths, 4), 1000, clip_frames, groups=groups, past_horizon=past_horizon)
    assert (sampler.plan.windows_per_epoch == 1) == (groups == 50)
    counts = Counter(map(tuple, epochs_of(sampler, epochs).reshape(-1, 3).tolist()))
    sampler.close()
    expected = exact_probabilities(lengths, clip_frames, past_horizon)
    assert counts.keys() == expected.keys()
    observed, wanted = (np.array([values[key] for key in expected]) for values in (counts, expected))
    wanted *= epochs * sampler.legal_targets
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(expected) - sampler.legal_targets
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)
    assert chi_square > freedom - 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("past_horizon", [6, 50])
def test_a_horizon_of_the_clip_or_more_changes_no_draw(past_horizon):
    samplers = [make_sampler(imagined(RAGGED, 4)), make_sampler(imagined(RAGGED, 4), past_horizon=past_horizon)]
    for step in (0, 9, 30):
        expected, found = (sampler.batch(step) for sampler in samplers)
        assert same(found, expected)
    assert samplers[0].order == samplers[1].order
    for sampler in samplers:
        sampler.close()


def test_a_horizon_spares_the_reading_before_a_group():
    for past_horizon, halo in ((2, 2), (3, 3), (None, 39)):
        sampler = make_sampler(imagined([60] * 4, 4), clip_frames=40, past_horizon=past_horizon)
        assert sampler.plan.halo_frames == halo
        assert (np.diff(served([sampler.batch(0)])[:, [2, 1]]) <= halo).all()
        sampler.close()


def test_a_target_comes_anywhere_in_an_epoch():
    """Each of the places in an epoch is alike likely for each target, over many epochs."""
    sampler = make_sampler(imagined([10] * 8, 4), 64)
    assert sampler.plan.windows_per_epoch > 3
    epochs = 400
    order = epochs_of(sampler, epochs)
    sampler.close()
    numbers = order[:, :, 0] * 8 + order[:, :, 1] - 2
    place_of_target = np.argsort(numbers, axis=1)
    thirds = np.stack([np.bincount(column * 3 // 64, minlength=3) for column in place_of_target.T])
    chi_square = ((thirds - epochs / 3) ** 2 / (epochs / 3)).sum(axis=1)  # of a target, 2 degrees of freedom
    assert chi_square.mean() == pytest.approx(2, abs=1.8)  # targets of a group come together
    assert chi_square.max() < 25


def test_windows_are_even_and_mix_four_groups():
    plans = []
    for chunks in range(1, 60):
        cache = imagined([30] * chunks, 30)
        budget = budget_of(8, 30, 6, 30)
        plan = WindowPlan(cache, LegalTargets(cache.offsets), 0, 6, budget)
        sizes = [len(plan.window(number).groups) for number in range(plan.windows_per_epoch)]
        assert sum(sizes) == chunks
        assert max(sizes) <= 8
        assert min(sizes) >= min(4, chunks)
        plans.append(plan)
    assert all(plan.group_chunks == 1 for plan in plans)


def test_group_sizes_grow_with_the_budget_and_then_their_number():
    cache = imagined([300] * 1000, 10)
    sizes = {}
    for chunks in (8, 12, 25, 100, 200, 1000):
        plan = WindowPlan(cache, LegalTargets(cache.offsets), 0, 6, 2 * chunks * 16 * FRAME_BYTES)
        sizes[chunks] = (plan.group_chunks, len(plan.window(0).groups))
        assert plan.nbytes <= plan.memory_budget
    assert sizes == {8: (1, 8), 12: (2, 6), 25: (6, 5), 100: (16, 8), 200: (16, 18), 1000: (16, 93)}


def test_a_budget_that_is_too_small_says_how_much_it_takes(numbered):
    cache = numbered(RAGGED)
    needed = budget_of(4, 4, 6, 30)
    with pytest.raises(StoreError, match=rf"{cache.url}.*cache\.memory_budget is {needed - 1} .*{needed}"):
        make_sampler(cache, budget=needed - 1)
    make_sampler(cache, budget=needed).close()


def same(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@pytest.mark.parametrize("batch_size", [8, 50, 200])
def test_a_step_is_a_function_of_seed_and_step(numbered, batch_size):
    """In any order of steps, and for a sampler that begins at a late one."""
    cache = numbered(RAGGED)
    sampler = make_sampler(cache, batch_size)
    expected = [sampler.batch(step) for step in range(20)]
    for step in np.random.default_rng(0).permutation(20):
        assert same(sampler.batch(int(step)), expected[step])
    fresh, other = make_sampler(cache, batch_size), make_sampler(cache, batch_size, seed=4)
    assert same(fresh.batch(17), expected[17])
    assert not same(other.batch(17), expected[17])
    late = fresh.batch(10**12)
    assert same(late, sampler.batch(10**12))
    assert not same(late, expected[0])
    for each in (sampler, fresh, other):
        each.close()


def test_every_draw_depends_on_the_seed(numbered):
    """The order of groups, the order of targets within a window, and conditions; each alone."""
    cache = numbered(RAGGED)
    budget = budget_of(4, cache.latent_reader.chunk_frames, 6, cache.lengths.max())
    orders, keys, samples = [], [], []
    for seed in (3, 4):
        sampler = open_sampler(cache, "cpu", seed, 8, 6, residency="stream", memory_budget=budget)
        windows = [sampler.plan.window(number) for number in range(3 * sampler.plan.windows_per_epoch)]
        orders.append([window.groups.tolist() for window in windows])
        keys.append(windows[0].key.tolist())
        samples.append(served(sampler.batch(step) for step in range(30)))
        sampler.close()
    assert orders[0] != orders[1]
    assert keys[0] != keys[1]
    # Where a whole clip precedes both targets, a distance is a function of its random numbers alone.
    (_, targets, conditions), (_, others, their_conditions) = (rows.T for rows in samples)
    far = (targets >= 5) & (others >= 5)
    assert ((targets - conditions)[far] != (others - their_conditions)[far]).any()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_rows_of_the_ranks_are_the_global_batch(numbered, world_size):
    cache = numbered(RAGGED)
    whole = make_sampler(cache)
    ranks = [make_sampler(cache) for _ in range(world_size)]
    windows = set()
    for step in range(15):  # over two epochs
        windows.add(len(list(whole.plan.segments(8 * step, 8 * step + 8))))
        parts = [sampler.batch(step, rank, world_size) for rank, sampler in enumerate(ranks)]
        for name in ("target", "reference", "condition", "distance"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole.batch(step), name))
    assert max(windows) > 1
    with pytest.raises(ValueError, match="batch_size = 8, rank 0 of 3"):
        whole.batch(0, 0, 3)
    for sampler in (whole, *ranks):
        sampler.close()


def test_epochs_and_windows_are_shuffled_anew():
    sampler = make_sampler(imagined([30] * 40, 10))
    first, second = epochs_of(sampler, 2)
    sampler.close()
    assert not np.array_equal(first, second)
    assert abs(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) < 0.2
    distances = [epoch[:, 1] - epoch[:, 2] for epoch in (first, second)]
    assert abs(np.corrcoef(*distances)[0, 1]) < 0.15
    videos = [set(epoch[:100, 0]) for epoch in (first, second)]  # a window's, about
    assert videos[0] != videos[1]
    # Within a window neighbors in the video are no neighbors in the order.
    assert (abs(np.diff(first[:, 1])) == 1).mean() < 0.2


def chunk_file(cache, index):
    return f"{cache.url}/{cache.latent_reader.chunk_key(index)}"


@pytest.mark.parametrize("damaged", range(8))
def test_a_damaged_chunk_is_named_when_its_window_comes(numbered, flip, damaged):
    """And never served, whether it is a group's own or the halo of one; the windows before it are served."""
    cache = numbered([30], 4)
    expected = [make_sampler(cache).batch(step) for step in range(4)]
    flip(Path(chunk_file(cache, damaged)))
    sampler = make_sampler(cache)
    window = sampler.plan.window(0)
    concerned = set(window.groups) | {f // 4 for group in window.groups for f in sampler.plan.halo(int(group))}
    failures = {}
    for step in range(4):
        try:
            assert same(sampler.batch(step), expected[step])
        except CorruptStoreError as error:
            failures[step] = str(error)
    assert failures
    assert (0 in failures) == (damaged in concerned)
    for message in failures.values():
        assert chunk_file(cache, damaged) in message
        assert "'clip-00'" in message
    flip(Path(chunk_file(cache, damaged)))
    for step in range(4):  # restored from a copy, and read again
        assert same(sampler.batch(step), expected[step])
    sampler.close()


def test_missing_chunks(numbered, tmp_path):
    cache = numbered(RAGGED)
    sampler = make_sampler(cache)
    for index in range(cache.latent_reader.chunk_count):
        (tmp_path / "toys.zarr" / cache.latent_reader.chunk_key(index)).unlink()
    with pytest.raises(CorruptStoreError, match=r"c/\d+/0/0/0 .*'clip-"):
        sampler.batch(0)
    sampler.close()
    with pytest.raises(CorruptStoreError, match="c/0/0/0/0 "):
        make_sampler(cache)  # before a training begins


def test_halos_that_are_kept_are_read_in_the_first_epoch_only():
    lengths = [100] * 60
    cache = imagined(lengths, 99)  # all videos but the first begin before a chunk, and go on into it
    chunks = -(-cache.frames // 99)
    sampler = make_sampler(cache, 7, clip_frames=3, budget=100_000)
    assert sampler.plan.keeps_halos
    assert sampler.plan.group_chunks == 1
    assert sampler.plan.windows_per_epoch > 5
    window = sampler.plan.buffer_frames // sampler.plan.slot_frames
    check_epochs(sampler, lengths, 3, epochs=1)
    # Of about every second group the chunk before was read already.
    assert chunks + 10 <= len(cache.latent_reader.reads) <= chunks + 45 + window
    cache.latent_reader.reads.clear()
    check_epochs(sampler, lengths, 3, epochs=3)
    reads = Counter(cache.latent_reader.reads)
    assert set(reads) == set(range(chunks))
    assert 3 * chunks <= sum(reads.values()) <= 3 * chunks + 2 * window  # no more than the windows ahead of the end
    plan = sampler.plan
    halos = sum(len(plan.halo(group)) for group in range(chunks))
    assert (2 * plan.buffer_frames + halos) * FRAME_BYTES <= plan.nbytes <= plan.memory_budget
    sampler.close()


def test_halos_are_kept_when_they_are_small():
    for chunk_frames, clip_frames, budget, kept in [
        (99, 3, 100_000, True),
        (99, 3, 80_000, False),  # more than a sixteenth
        (4, 5, 10**7, True),
        (4, 6, 10**7, False),  # may reach over two chunks
    ]:
        cache = imagined([100] * 60, chunk_frames)
        plan = WindowPlan(cache, LegalTargets(cache.offsets), 0, clip_frames, budget)
        assert plan.keeps_halos == kept


def test_resuming_reads_no_more_than_its_window():
    cache = imagined([40] * 1000, 10)
    sampler = make_sampler(cache, clip_frames=6)
    sampler.batch(123_456)
    sampler.close()
    assert 4 <= len(cache.latent_reader.reads) <= 3 * (4 + 4)  # its one or two windows and the next, with halos


@pytest.mark.parametrize("budget", [4 * 2**20, 10**8], ids=["a tenth of the store", "more than the store"])
def test_memory_stays_within_the_budget(kit, tmp_path, budget):
    """Not by the sampler's own account, but by that of the allocator."""
    kit.shape = (4, 8, 8)
    plan = kit.plan([200] * 410, 512)
    with StoreWriter.open(tmp_path / "large.zarr", kit.metadata, {"train": plan}, codes=False) as writer:
        for chunk in writer.pending("train"):
            writer.write_chunk("train", chunk, np.ones((chunk.frames, *kit.shape), np.float32), None)
        writer.finish()
    cache = latent_cache.open(tmp_path / "large.zarr")
    frame_bytes = 4 * 8 * 8 * 2
    tracemalloc.start()
    try:
        sampler = StreamingSampler(cache, "cpu", 0, 64, 16, budget)
        for step in range(0, 1000, 3):
            assert bool((sampler.batch(step).target == 1).all())
        peak = tracemalloc.get_traced_memory()[1]
        sampler.close()
        left = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    streamed = budget < cache.nbytes
    assert (sampler.plan.windows_per_epoch > 1) == streamed
    held = (2 if streamed else 1) * sampler.plan.buffer_frames * frame_bytes
    assert held <= sampler.plan.nbytes <= budget
    assert sampler.plan.nbytes > 0.9 * budget or not streamed
    draws = 25 * 8 * 2**14  # some numbers of a block of samples at a time, whatever the store's size
    assert held < peak < held + draws
    assert left < draws


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("latents")]


def test_the_next_window_is_read_ahead_and_close_ends_it():
    before = len(own_threads())
    cache = imagined([30] * 20, 4)
    sampler = make_sampler(cache, groups=11)
    sampler.batch(0)
    reader, plan = cache.latent_reader, sampler.plan
    ahead = {chunk for group in plan.window(1).groups for chunk in plan.chunks(int(group))}
    deadline = time.perf_counter() + 20
    while not ahead <= set(reader.reads) and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert ahead <= set(reader.reads)
    assert len(own_threads()) > before
    # Serving it waits for nothing, and reads the one after it: over two seconds for two threads.
    reader.seconds, read = 0.2, len(reader.reads)
    start = time.perf_counter()
    sampler.batch(int(plan.window(0).targets[-1]) // 8)
    while len(reader.reads) == read and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert len(reader.reads) > read
    sampler.close()
    assert time.perf_counter() - start < 1.2
    sampler.close()
    assert len(own_threads()) == before
    with pytest.raises(ValueError, match="closed"):
        sampler.batch(0)


def test_a_split_that_fits_is_read_once():
    cache = imagined([30] * 4, 10)
    sampler = make_sampler(cache, 50, groups=100)
    check_epochs(sampler, [30] * 4, 6, epochs=4)
    assert sampler.plan.windows_per_epoch == 1
    # A halo is read again, unless it was at hand.
    assert max(Counter(cache.latent_reader.reads).values()) <= 2
    sampler.close()


FORGETFUL = """
import sys, time
import latent_cache
from latent_cache import StreamingSampler
from latent_cache.reading.frame_reader import FrameReader

sampler = StreamingSampler(latent_cache.open(sys.argv[1]), "cpu", 0, 8, 6, int(sys.argv[2]))
sampler.batch(0)
time.sleep(2)  # for the next window
read_chunk = FrameReader.read_chunk
FrameReader.read_chunk = lambda *arguments: time.sleep(1) or read_chunk(*arguments)
sampler.batch(int(sampler.plan.window(0).targets[-1]) // 8)
print(time.time(), flush=True)
"""


@pytest.mark.long
def test_a_program_that_forgets_to_close_ends(numbered):
    """It does not wait for the window that is being read: 90 reads of a second by at most four threads."""
    cache = numbered([300] * 10, 4)
    budget = str(budget_of(30, 4, 6, 300))
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL, cache.url, budget], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.time() - float(done.stdout) < 8
