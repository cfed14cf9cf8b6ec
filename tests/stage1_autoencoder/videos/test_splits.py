"""Splits by seeded fractions and by ranges of numbers."""

import hashlib

import pytest

from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.source import VideoError
from stage1_autoencoder.videos.splits import assign_numbers, rows_by_fractions


def split_by_fractions(ids, **fractions) -> dict[str, list[str]]:
    return {split: [ids[row] for row in rows] for split, rows in rows_by_fractions(ids, **fractions).items()}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(("val", "test"), [(0.1, 0.1), (0.0, 0.2), (0.25, 0.0), (0.3, 0.3)])
def test_fractions_follow_the_stated_rule(count, val, test):
    ids = [f"video{number}" for number in range(count)]
    shares = split_by_fractions(ids, val=val, test=test, seed=5)
    ranked = sorted(ids, key=lambda name: hashlib.sha256(f"5{name}".encode()).hexdigest())
    sizes = {
        split: max(round(count * fraction), 1 if fraction and count >= 3 else 0)
        for split, fraction in (("val", val), ("test", test))
    }
    assert set(shares["test"]) == set(ranked[: sizes["test"]])
    assert set(shares["val"]) == set(ranked[sizes["test"] : sizes["test"] + sizes["val"]])
    assert sorted(name for part in shares.values() for name in part) == sorted(ids)
    assert all(part == sorted(part, key=ids.index) for part in shares.values())


def test_a_split_depends_on_the_seed_and_not_on_the_order():
    ids = [f"video{number}" for number in range(50)]
    shares = split_by_fractions(ids, val=0.2, test=0.2, seed=0)
    again = split_by_fractions(ids[::-1], val=0.2, test=0.2, seed=0)
    assert {split: set(part) for split, part in shares.items()} == {split: set(part) for split, part in again.items()}
    assert set(split_by_fractions(ids, val=0.2, test=0.2, seed=1)["test"]) != set(shares["test"])


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
