"""TFRecord files and the examples in them, written by our own hand and by the protobuf package."""

import struct

import google_crc32c
import pytest

from stage1_autoencoder.videos.shards import ShardError
from stage1_autoencoder.videos.tfrecords import Record, example_bytes, masked_crc32c, read_record, walk_records
from tests import small_data_sets

SHORT = small_data_sets.example({"k": b"value"})[:-1]


def features(data: bytes) -> dict[str, bytes]:
    return {key: bytes(value) for key, value in example_bytes(memoryview(data))}


def test_the_checksum_is_the_published_one():
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the check value of crc32c
    # A record that TensorFlow wrote: its length, 0, and nothing in it.
    assert masked_crc32c(struct.pack("<Q", 0)) == 0x07980329
    assert masked_crc32c(b"") == 0xA282EAD8


@pytest.mark.parametrize("contents", [[], [b"first", b"", bytes(range(256)) * 40]])
def test_records_are_found_and_read(tmp_path, contents):
    path = tmp_path / "a.tfrecords"
    path.write_bytes(b"".join(map(small_data_sets.record, contents)))
    records = list(walk_records(path))
    assert [record.length for record in records] == list(map(len, contents))
    assert [bytes(read_record(path, record)) for record in records] == contents


@pytest.mark.parametrize(
    ("keep", "whole", "message"),
    [
        (5, 0, "record 0"),
        (14, 0, "record 0.*100 bytes"),
        (115, 0, "record 0.*100 bytes"),  # of the last checksum 3 of 4 bytes
        (120, 1, "record 1"),
        (200, 1, "record 1.*100 bytes"),
    ],
)
def test_files_that_are_cut_off(tmp_path, keep, whole, message):
    path = tmp_path / "a.tfrecords"
    path.write_bytes((small_data_sets.record(bytes(100)) * 2)[:keep])
    records = walk_records(path)
    assert [next(records).length for _ in range(whole)] == [100] * whole
    with pytest.raises(ShardError, match=message):
        next(records)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>Not found</html>", bytes(40), b"x" * 12, 0, 9])
def test_other_files_and_damaged_lengths(tmp_path, content):
    if isinstance(content, int):
        changed = bytearray(small_data_sets.record(b"data"))
        changed[content] ^= 1
        content = changed
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ShardError, match="record 0"):
        list(walk_records(tmp_path / "a"))


@pytest.mark.parametrize("at", [12, 15, 16, 19])  # in the data and in their checksum
def test_damaged_data_are_noticed_when_they_are_read(tmp_path, at):
    content = bytearray(small_data_sets.record(b"data"))
    content[at] ^= 1
    (tmp_path / "a").write_bytes(content)
    (record,) = walk_records(tmp_path / "a")
    with pytest.raises(ShardError, match="byte 12"):
        read_record(tmp_path / "a", record)
    with pytest.raises(ShardError, match=f"byte {len(content)}"):  # of a file that became shorter
        read_record(tmp_path / "a", Record(2, 100, 0))


def test_bytes_of_an_example():
    written = {"0/image_aux1/encoded": b"\0\1\2", "numbers": [1.0, 2.0], "empty": b"", "ü": b"x" * 300}
    found = features(small_data_sets.example(written))
    assert found == {"0/image_aux1/encoded": b"\0\1\2", "empty": b"", "ü": b"x" * 300}
    assert features(b"") == {}
    # As the protobuf package writes it: a = [b"one", b"two"], b = [1.5, 2.5], c = [-1, 2**40], long = [200 bytes].
    recorded = (
        b"\n\x9b\x02\n\x11\n\x01a\x12\x0c\n\n\n\x03one\n\x03two\n\x11\n\x01b\x12\x0c\x12\n\n\x08\x00\x00\xc0?\x00\x00 @"
        b"\n\x19\n\x01c\x12\x14\x1a\x12\n\x10" + b"\xff" * 9 + b"\x01\x80\x80\x80\x80\x80 "
        b"\n\xd7\x01\n\x04long\x12\xce\x01\n\xcb\x01\n\xc8\x01" + b"x" * 200
    )
    assert features(recorded) == {"a": b"one", "long": b"x" * 200}


@pytest.mark.parametrize(
    "data", [b"\x0a\x05\x0a", b"\x0a" + b"\xff" * 10 + b"\x01", b"\x0b", b"\x0a", b"\x0a\x02\x0a\x00", SHORT]
)
def test_data_that_are_not_an_example(data):
    with pytest.raises(ShardError, match=r"tf\.train\.Example"):
        features(data)


def test_fields_of_all_kinds_are_skipped():
    written = small_data_sets.example({"k": b"v"})
    others = b"\x10\xac\x02" + b"\x19" + bytes(range(8)) + b"\x25" + bytes(range(4)) + b"\x2a\x02hi"
    assert features(others + written + others) == {"k": b"v"}
