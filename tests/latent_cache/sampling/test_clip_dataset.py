"""Clips for other trainings: which there are, in workers of every kind, and what a damaged or replaced store does."""

import logging
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

import latent_cache
from latent_cache import CorruptStoreError, ReplacedStoreError, StoreError, torch_dataset

LENGTHS = [1, 5, 2, 3, 12, 3, 4]


@pytest.fixture
def store(numbered):
    """Channel 0 is the video, channel 1 the frame within it, in chunks of four frames."""
    return numbered(LENGTHS).url


def clips_of(batches):
    """(video, first frame) of each clip; checks that a clip is consecutive frames of one video."""
    found = []
    for clip in torch.cat(list(batches)):
        video, frame = clip[0, :2, 0, 0].int().tolist()
        assert (clip[:, 0] == video).all()
        assert (clip[:, 1, 0, 0] == frame + torch.arange(len(clip))).all()
        found.append((video, frame))
    return found


def legal(clip_frames, stride=1):
    return [(video, first) for video, n in enumerate(LENGTHS) for first in range(0, n - clip_frames + 1, stride)]


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(("clip_frames", "stride"), [(1, 1), (3, 1), (3, 2), (6, 4), (12, 1)])
def test_every_legal_clip_is_there_once(store, clip_frames, stride, memory):
    dataset = torch_dataset(store, "train", clip_frames, stride=stride, memory=memory)
    assert len(dataset) == len(legal(clip_frames, stride))
    assert clips_of([torch.stack(list(dataset))]) == legal(clip_frames, stride)
    assert [dataset.window(i) for i in range(len(dataset))] == legal(clip_frames, stride)
    assert dataset[0].shape == (clip_frames, 2, 3, 4)
    assert dataset[0].dtype == torch.float32
    assert torch.equal(dataset[-1], dataset[np.int64(len(dataset) - 1)])
    dataset[0].fill_(9)
    assert clips_of([dataset[0][None]]) == legal(clip_frames, stride)[:1]
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize("shard_chunks", [1, 3])
def test_clips_are_the_latents_of_the_store(kit, tmp_path, shard_chunks):
    plan = kit.plan([3, 7, 2, 1, 9, 6, 5], shard_chunks=shard_chunks)
    path = kit.build(tmp_path / "kit.zarr", {"train": plan})
    cache = latent_cache.open(path)
    raw, scaled = torch_dataset(path, "train", 5), torch_dataset(path, "train", 5, standardize=True)
    for _ in range(2):  # the second time from checked files
        for index in range(len(raw)):
            video, first = raw.window(index)
            expected = cache.video(video)[first : first + 5].astype(np.float32)
            np.testing.assert_array_equal(raw[index], expected)
            expected = (expected - cache.mean[:, None, None]) / cache.std[:, None, None]
            np.testing.assert_allclose(scaled[index], expected, rtol=1e-6)


def test_a_constant_channel_is_standardized_to_zero(numbered):
    dataset = torch_dataset(numbered([3], name="constant").url, "train", 2, standardize=True)
    assert (dataset[0][:, 0] == 0).all()


def test_short_videos_are_mentioned_once(store, caplog):
    with caplog.at_level(logging.WARNING, "latent_cache"):
        dataset = torch_dataset(store, "train", 4)
        list(pickle.loads(pickle.dumps(dataset)))
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "4 of 7" in line


@pytest.mark.parametrize(
    ("clip_frames", "stride", "error", "message"),
    [(13, 1, StoreError, "toys.zarr.*'train'.*13 frames.*7 videos.*1 to 12"), (0, 1, ValueError, "clip_frames = 0"),
     (3, 0, ValueError, "stride = 0")],
)  # fmt: skip
def test_impossible_clips(store, clip_frames, stride, error, message):
    with pytest.raises(error, match=message):
        torch_dataset(store, "train", clip_frames, stride=stride)


@pytest.mark.parametrize("memory", [False, True])
def test_forked_workers_read_the_same_in_every_epoch(store, memory):
    dataset = torch_dataset(store, "train", 3, memory=memory)
    dataset[4]  # opened and read before the workers start
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=2, multiprocessing_context="fork")
    epochs = [clips_of(loader) for _ in range(3)]
    assert epochs[0] != epochs[1]
    assert all(sorted(epoch) == legal(3) for epoch in epochs)


def test_spawned_workers_read_the_same(store):
    dataset = torch_dataset(store, "train", 3)
    two_epochs = RandomSampler(dataset, num_samples=2 * len(dataset))
    loader = DataLoader(dataset, 4, sampler=two_epochs, num_workers=1, multiprocessing_context="spawn")
    assert sorted(clips_of(loader)) == sorted(2 * legal(3))


def test_workers_read_a_url(store, publish):
    dataset = torch_dataset(publish(store), "train", 3)
    assert clips_of(DataLoader(dataset, batch_size=5, num_workers=1, multiprocessing_context="fork")) == legal(3)


@pytest.mark.parametrize("memory", [False, True])
def test_a_pickled_copy_has_no_latents_and_reads_the_same(store, numbered, memory):
    dataset = torch_dataset(store, "train", 3, memory=memory)
    copy = pickle.loads(pickle.dumps(dataset))
    assert clips_of([torch.stack(list(copy))]) == legal(3)
    large = torch_dataset(numbered([900], chunk_frames=100, name="large").url, "train", 3, memory=memory)
    assert len(pickle.dumps(large)) < 3000 < 900 * large[0][0].nbytes


def test_distributed_samplers_share_the_clips(store):
    dataset = torch_dataset(store, "train", 3)
    assert len(dataset) == 17
    for epoch in range(2):
        found = []
        for rank in range(3):
            sampler = DistributedSampler(dataset, 3, rank, shuffle=True, seed=1)
            sampler.set_epoch(epoch)
            found += clips_of(DataLoader(dataset, batch_size=2, sampler=sampler))
        assert len(found) == 18  # one clip fills the last rank up
        assert sorted(set(found)) == legal(3)


def test_a_damaged_chunk_names_its_videos(store, flip):
    file = f"{store}/train/latents/c/2/0/0/0"
    loader = DataLoader(torch_dataset(store, "train", 3))
    list(loader)
    flip(Path(file))  # after it was read and checked
    with pytest.raises(
        CorruptStoreError, match=rf"{re.escape(file)} is damaged.*2 video\(s\): 'clip-03', 'clip-04'"
    ) as raised:
        list(loader)
    # A DataLoader makes an error of a worker again from its text alone.
    assert isinstance(type(raised.value)("in worker 1"), CorruptStoreError)


def test_a_store_that_was_written_again_is_refused(kit, store, tmp_path):
    dataset = torch_dataset(store, "train", 3)
    before, copy = dataset[0], pickle.dumps(dataset)
    shutil.rmtree(store)
    kit.build(tmp_path / "toys.zarr", {"train": kit.plan(LENGTHS)}, codes=False)
    with pytest.raises(ReplacedStoreError, match=r"toys\.zarr"):
        dataset[0]
    with pytest.raises(ReplacedStoreError, match=r"toys\.zarr"):
        pickle.loads(copy)[0]
    assert clips_of([before[None]]) == [(1, 0)]
