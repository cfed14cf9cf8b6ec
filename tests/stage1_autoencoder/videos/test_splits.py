"""Splits by seeded fractions and by ranges of numbers."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.division import rows_by_fractions
from stage1_autoencoder.videos.source import VideoError
from stage1_autoencoder.videos.splits import assign_numbers


def divide(ids, known=None, *, val=0.1, test=0.1, seed=0) -> dict[str, str]:
    """Split by id."""
    rows = rows_by_fractions(ids, val=val, test=test, seed=seed, known=(known or {}).get)
    assert all((np.diff(part) > 0).all() for part in rows.values())
    split_of = {ids[row]: split for split, part in rows.items() for row in part.tolist()}
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(len(ids)))
    return split_of


def names(count: int, prefix: str = "video") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


def place(name: str, seed: int = 0) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}{name}".encode()).digest()[:8], "big") / 2**64


@pytest.mark.parametrize(("val", "test"), [(0.1, 0.1), (0.0, 0.2), (0.25, 0.0), (0.3, 0.3)])
def test_fractions_follow_the_stated_rule(val, test):
    count, seed = 400, 5
    split_of = divide(names(count), val=val, test=test, seed=seed)
    for name, split in split_of.items():
        at = place(name, seed)
        assert split == ("test" if at < test else "val" if at < test + val else "train")
    # Five standard deviations of a binomial distribution; the hashes are fixed, so this never changes.
    for split, share in (("val", val), ("test", test)):
        found = sum(other == split for other in split_of.values())
        assert abs(found - count * share) <= 5 * (count * share * (1 - share)) ** 0.5
    assert divide(names(count)[::-1], val=val, test=test, seed=seed) == split_of
    assert divide(names(count), val=val, test=test, seed=seed + 1) != split_of


@given(data=st.data(), count=st.integers(1, 12), val=st.sampled_from([0, 0.1, 0.4]), test=st.sampled_from([0, 0.1]))
def test_no_video_moves_while_a_folder_grows_and_shrinks(data, count, val, test):
    """As long as assignments are remembered; and no split is empty that new videos can fill."""
    known: dict[str, str] = {}
    everything = names(12, data.draw(st.sampled_from("abcdefgh")))
    for _ in range(4):
        here = data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=count, unique=True))
        fresh = [name for name in here if name not in known]
        split_of = divide(here, known, val=val, test=test)
        assert {name: split_of[name] for name in here if name in known} == {
            name: split for name, split in known.items() if name in here
        }
        if len(fresh) == len(here):
            assert "train" in split_of.values()
            wanted = {"train"} | {split for split, share in (("val", val), ("test", test)) if share and len(here) >= 3}
            assert wanted <= set(split_of.values())
        known |= split_of


@pytest.mark.parametrize("group", ["test", "val", "train"])
def test_the_nearest_hash_fills_an_empty_split(group):
    """Where all videos have their hashes in one split, these are cut in order of the hashes."""
    low, high = {"test": (0, 0.3), "val": (0.3, 0.6), "train": (0.6, 1)}[group]
    ids = sorted([name for name in names(60) if low <= place(name) < high][:5], key=place)
    split_of = divide(ids, val=0.3, test=0.3)
    cuts = {"test": (3, 4), "val": (1, 4), "train": (1, 2)}[group]
    expected = ["test" if row < cuts[0] else "val" if row < cuts[1] else "train" for row in range(5)]
    assert [split_of[name] for name in ids] == expected
    assert set(divide(ids[:2], val=0.3, test=0.3).values()) == {"train"} | ({group} if group != "train" else set())
    assert divide(ids[:1], val=0.3, test=0.3) == {ids[0]: "train"}


def test_assignments_that_the_fractions_exclude_are_not_kept():
    known = dict.fromkeys(names(30), "val")
    assert set(divide(names(30), known, val=0.5).values()) == {"val"}  # an emptied train is refused elsewhere
    assert "val" not in divide(names(30), known, val=0.0).values()


def test_a_file_beside_another_of_its_name_changes_no_split():
    """Then both ids get extensions."""
    for name in names(40):
        (split,) = divide([name], test=0.5, known={"other": "train"}).values()
        both = divide([f"{name}.mp4", f"{name}.avi"], {name: split}, test=0.5)
        assert set(both.values()) == {split}
    ids = names(40)
    split_of = divide(ids, test=0.4)
    again = divide([f"{name}.mov" for name in ids], test=0.4)
    assert list(again.values()) == list(split_of.values())


@pytest.mark.parametrize(
    ("value", "numbers"), [(20, {20}), ("3", {3}), ("1-4,7", {1, 2, 3, 4, 7}), (" 2 - 3 , 9 ", {2, 3, 9}), ("05", {5})]
)
def test_ranges_of_numbers(value, numbers):
    assert assign_numbers({"train": value}, "person", "1-19") == dict.fromkeys(numbers, "train")


@pytest.mark.parametrize("value", ["", "a", "4-1", "1..4", "1-", "1,,2", "-3"])
def test_ranges_that_cannot_be_parsed(value):
    with pytest.raises(VideoError, match=rf"dataset\.splits\.val: '{value}' .*persons.*'1-19'"):
        assign_numbers({"val": value}, "person", "1-19")


def test_a_number_in_two_splits():
    assert assign_numbers({"train": "0-2", "test": 7}, "video", "0-9") == {
        0: "train",
        1: "train",
        2: "train",
        7: "test",
    }
    with pytest.raises(VideoError, match=r"video 2 .*train.*test"):
        assign_numbers({"train": "0-2", "test": "2-5"}, "video", "0-9")


@pytest.mark.parametrize(
    ("source", "splits", "carried"),
    [
        ("shapes", {"val": 0.5}, r"splits\.val: 0\.5 .*shapes"),
        ("bair", {"test": 0.1}, r"splits\.test.*only val"),
        ("bair", {"val": "3-4"}, r"splits\.val: '3-4' .*bair"),
        ("hdf5", {"val": "3-4"}, r"splits\.val: '3-4' .*hdf5"),
        ("videos", {"val": 0.5, "test": 0.5}, r"splits.*0\.5.*train"),
        ("kth", {"val": 0.1}, r"splits\.val: 0\.1 .*1-19"),
        ("clevrer", {"val": 0.1}, r"splits\.val: 0\.1 .*0-9999"),
    ],
)
def test_splits_must_fit_the_source(source, splits, carried):
    with pytest.raises(ValueError, match=carried):
        DatasetConfig(name="mine", source=source, splits=splits)
