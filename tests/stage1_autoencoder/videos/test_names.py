"""Natural order of names."""

import re

from hypothesis import given
from hypothesis import strategies as st

from stage1_autoencoder.videos.names import join_names, natural_order


def test_numbers_inside_names_count():
    names = ["clip10", "clip2", "clip1b", "clip01", "clip1", "a", "2", "10", "clip2/10", "clip2/9"]
    right = ["2", "10", "a", "clip01", "clip1", "clip1b", "clip2", "clip2/9", "clip2/10", "clip10"]
    for order in (names, names[::-1]):
        assert [order[row] for row in natural_order(order)] == right


def texts_and_numbers(name: str) -> tuple[list[str | int], str]:
    parts: list[str | int] = re.split(r"(\d+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


@given(st.lists(st.text("a1b0-/ 29é٣", max_size=12), max_size=30))
def test_the_order_is_that_of_texts_and_numbers(names):
    assert [names[row] for row in natural_order(names)] == sorted(names, key=texts_and_numbers)


def test_long_lists_are_shortened():
    assert join_names("abc") == "a, b, c"
    assert join_names("abcdefg") == "a, b, c, d, e and 2 more"
