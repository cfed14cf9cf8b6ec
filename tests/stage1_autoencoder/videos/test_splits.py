"""Splits by seeded fractions and by persons, and natural order."""

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage1_autoencoder.videos.source import VideoError
from stage1_autoencoder.videos.splits import (
    natural_order,
    numbers_of_splits,
    parse_numbers,
    persons_of_splits,
    split_by_fractions,
)


def test_natural_order():
    names = ["clip10", "clip2", "clip1b", "clip01", "clip1", "a", "2", "10", "clip2/10", "clip2/9"]
    right = ["2", "10", "a", "clip01", "clip1", "clip1b", "clip2", "clip2/9", "clip2/10", "clip10"]
    for order in (names, names[::-1]):
        assert [order[at] for at in natural_order(order)] == right


def whole_numbers(name: str) -> tuple[list[str | int], str]:
    parts: list[str | int] = re.split(r"(\d+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


@given(st.lists(st.text("a1b0-/ 29é٣", max_size=12), max_size=30))
def test_natural_order_is_that_of_texts_and_numbers(names):
    assert [names[at] for at in natural_order(names)] == sorted(names, key=whole_numbers)


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
    ("value", "persons"), [(20, {20}), ("3", {3}), ("1-4,7", {1, 2, 3, 4, 7}), (" 2 - 3 , 9 ", {2, 3, 9}), ("05", {5})]
)
def test_persons(value, persons):
    assert set().union(*parse_numbers(value, "train")) == persons


@pytest.mark.parametrize("value", ["", "a", "4-1", "1..4", "1-", "1,,2", "-3"])
def test_persons_that_cannot_be_read(value):
    with pytest.raises(VideoError, match=r"dataset\.splits\.val: .* is not a range of persons such as '1-19'"):
        parse_numbers(value, "val")


def members(splits) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for person, split in persons_of_splits(splits).items():
        found.setdefault(split, []).append(person)
    return found


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({}, {"train": list(range(1, 20)), "test": [21, 22, 23, 24, 25], "val": [20]}),
        ({"train": "1-3", "test": "4"}, {"train": [1, 2], "test": [4], "val": [3]}),
        ({"train": "7,2-3", "test": "4"}, {"train": [2, 3], "test": [4], "val": [7]}),
        ({"train": "1-3", "val": "none", "test": "4"}, {"train": [1, 2, 3], "test": [4]}),
        ({"train": "1-3", "val": 9}, {"train": [1, 2, 3], "val": [9]}),
        ({"train": 5, "test": "4"}, {"train": [5], "test": [4]}),
    ],
)
def test_persons_of_splits(splits, expected):
    assert members(splits) == expected


def test_a_person_in_two_splits():
    with pytest.raises(VideoError, match="person 16 is both in train and in test"):
        persons_of_splits({"train": "1-17", "test": "16-25"})
    with pytest.raises(VideoError, match="person 17 is both in train and in test"):  # though held out
        persons_of_splits({"train": "1-17", "test": "17-25"})


def test_numbers_of_splits():
    official = numbers_of_splits({})
    assert [official[number] for number in (0, 9999, 10_000, 14_999, 15_000, 19_999)] == [
        "train", "train", "val", "val", "test", "test",
    ]  # fmt: skip
    assert len(official) == 20_000
    assert numbers_of_splits({"train": "0-2", "test": 7}) == {0: "train", 1: "train", 2: "train", 7: "test"}
    with pytest.raises(VideoError, match="video 2 is both in train and in test; leave the video out"):
        numbers_of_splits({"train": "0-2", "test": "2-5"})
    with pytest.raises(VideoError, match=r"splits\.test: 'x' is not a range of videos such as '0-9999'"):
        numbers_of_splits({"test": "x"})
