"""Plans: every frame in one chunk, keys that follow the content."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_cache import SplitPlan, StoreError, default_chunk_frames, default_shard_chunks

SHAPE = (4, 8, 8)


def make_plan(names, lengths, chunk_frames=4, views=None, **options):
    return SplitPlan(names, views or ["identity"] * len(names), lengths, SHAPE, chunk_frames, **options)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 15))
def test_pieces_cover_every_frame_once_and_in_order(lengths, chunk_frames):
    plan = make_plan([str(row) for row in range(len(lengths))], lengths, chunk_frames)
    covered = []
    for index, chunk in enumerate(plan.chunks):
        assert chunk.index == index
        assert chunk.start == index * chunk_frames
        assert chunk.frames == sum(stop - start for _, start, stop in chunk.pieces)
        assert chunk.frames == chunk_frames or index == len(plan.chunks) - 1
        covered += [(video, frame) for video, start, stop in chunk.pieces for frame in range(start, stop)]
    assert covered == [(video, frame) for video, length in enumerate(lengths) for frame in range(length)]
    np.testing.assert_array_equal(plan.offsets, np.cumsum([0, *lengths]))
    assert plan.frames == sum(lengths)


def test_chunks_are_a_sequence():
    plan = make_plan(["a", "b"], [5, 6])
    assert plan.chunks[-1] == plan.chunks[2] == list(plan.chunks)[2]
    assert plan.chunks[1:] == [plan.chunks[1], plan.chunks[2]]
    with pytest.raises(IndexError):
        plan.chunks[3]


@pytest.mark.parametrize(
    ("shape", "frames", "expected"),
    [((4, 8, 8), 10**6, 16384), ((8, 16, 16), 10**6, 2048), ((4, 8, 8), 30, 30), ((4, 8192, 8192), 10, 1)],
)
def test_default_chunk_is_8_mib_and_no_more_than_the_split(shape, frames, expected):
    assert default_chunk_frames(shape, frames) == expected
    assert default_shard_chunks(5000 * expected, expected) == 1
    assert default_shard_chunks(5000 * expected + 1, expected) == 8


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 4))
def test_a_shard_is_planned_as_one_chunk_of_its_frames(lengths, chunk_frames, shard_chunks):
    names = [str(row) for row in range(len(lengths))]
    sharded = make_plan(names, lengths, chunk_frames, shard_chunks=shard_chunks)
    assert list(sharded.chunks) == list(make_plan(names, lengths, chunk_frames * shard_chunks).chunks)
    assert sharded.file_frames == chunk_frames * shard_chunks


def test_a_chunk_names_its_pieces():
    chunk = make_plan(["a", "b", "b", "c"], [3, 4, 2, 5], 16, views=["identity"] * 2 + ["hflip", "identity"]).chunks[0]
    assert chunk.video_ids == ("a", "b", "b", "c")
    assert chunk.video_views == ("identity", "identity", "hflip", "identity")
    assert chunk.videos_of(np.array([0, 2])) == ["a"]
    assert chunk.videos_of(np.array([2, 3, 6, 7, 8, 9, 13])) == ["a", "b", "c"]
    assert make_plan(["a", "b"], [3, 4], 2).chunks[2].videos_of(np.array([0, 1])) == ["b"]


def test_key_follows_content_not_position():
    plan = make_plan(["a", "b", "c"], [4, 4, 4])
    assert plan.chunks[2].key == make_plan(["c"], [4]).chunks[0].key
    changed = [
        make_plan(["x"], [4]),
        make_plan(["c"], [4], views=["hflip"]),
        make_plan(["c"], [3]),
        make_plan(["z", "c"], [1, 4], chunk_frames=5),
        make_plan(["c"], [4], fingerprints=["9c"]),
        make_plan(["c"], [4], fingerprints=["9d"]),
    ]
    assert len({plan.chunks[2].key, *(other.chunks[0].key for other in changed)}) == 7


def test_a_long_split_costs_no_more_than_its_offsets():
    videos = 100_000
    plan = make_plan([str(row) for row in range(videos)], np.full(videos, 1000), 16384)
    assert len(plan.chunks) == -(-videos * 1000 // 16384)
    assert plan.chunks[-1].stop == 10**8


@pytest.mark.parametrize(
    ("names", "views", "lengths", "message"),
    [
        ([], [], [], r"no videos.*dataset\.root"),
        (["a", ""], ["identity", "identity"], [3, 3], "empty id or view"),
        (["a", "b"], ["identity", "identity"], [3, 0], r"1 video\(s\) without frames.*\['b'\]"),
        (["a", "a"], ["identity", "identity"], [3, 3], r"more than once.*\[\('a', 'identity'\)\]"),
    ],
)
def test_unusable_videos_are_named(names, views, lengths, message):
    with pytest.raises(StoreError, match=message):
        SplitPlan(names, views, lengths, SHAPE, 4)


@pytest.mark.parametrize(
    ("lengths", "shape", "chunk_frames", "message"),
    [
        ([1, 2], SHAPE, 4, "1 video ids, .* 2 lengths"),
        ([1], (4, 8), 4, "latent_shape"),
        ([1], (4, 0, 8), 4, "latent_shape"),
        ([1], SHAPE, 0, "chunk_frames"),
    ],
)
def test_arguments_that_do_not_fit(lengths, shape, chunk_frames, message):
    with pytest.raises(ValueError, match=message):
        SplitPlan(["a"], ["identity"], lengths, shape, chunk_frames)
