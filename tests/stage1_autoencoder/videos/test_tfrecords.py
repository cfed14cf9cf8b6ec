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


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>Not found</html>", bytes(40), b"x" * 12])
def test_other_files(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ShardError, match=r"TFRecord.*record 0"):
        list(walk_records(tmp_path / "a"))


@pytest.mark.parametrize("at", [0, 9])
def test_a_damaged_length_is_noticed(tmp_path, at):
    content = bytearray(small_data_sets.record(b"data"))
    content[at] ^= 1
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ShardError, match=r"record 0 .*checksum"):
        list(walk_records(tmp_path / "a"))


@pytest.mark.parametrize("at", [12, 15, 16, 19])  # in the data and in their checksum
def test_damaged_data_are_noticed_when_they_are_read(tmp_path, at):
    content = bytearray(small_data_sets.record(b"data"))
    content[at] ^= 1
    (tmp_path / "a").write_bytes(content)
    (record,) = walk_records(tmp_path / "a")
    with pytest.raises(ShardError, match=r"damaged.*byte 12"):
        read_record(tmp_path / "a", record)


def test_data_that_are_gone(tmp_path):
    (tmp_path / "a").write_bytes(b"short")
    with pytest.raises(ShardError, match="byte 5"):
        read_record(tmp_path / "a", Record(2, 100, 0))


def test_bytes_of_an_example():
    written = {"0/image_aux1/encoded": b"\0\1\2", "numbers": [1.0, 2.0], "empty": b"", "ü": b"x" * 300}
    found = features(small_data_sets.example(written))
    assert found == {"0/image_aux1/encoded": b"\0\1\2", "empty": b"", "ü": b"x" * 300}
    assert features(b"") == {}


def test_examples_of_the_protobuf_package():
    """Another writer than ours; the message is `tf.train.Example` with the lists of all three kinds."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    types = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        made = file.message_type.add(name=name)
        for number, field, kind, repeated, type_name in fields:
            label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=kind, label=label, type_name=type_name)
        return made

    message("BytesList", (1, "value", types.TYPE_BYTES, True, None))
    message("FloatList", (1, "value", types.TYPE_FLOAT, True, None))
    message("Int64List", (1, "value", types.TYPE_INT64, True, None))
    message(
        "Feature",
        (1, "bytes_list", types.TYPE_MESSAGE, False, ".t.BytesList"),
        (2, "float_list", types.TYPE_MESSAGE, False, ".t.FloatList"),
        (3, "int64_list", types.TYPE_MESSAGE, False, ".t.Int64List"),
    )
    # A map is a repeated message of key and value.
    features_type = message("Features", (1, "feature", types.TYPE_MESSAGE, True, ".t.Features.FeatureEntry"))
    entry = features_type.nested_type.add(name="FeatureEntry", options={"map_entry": True})
    entry.field.add(name="key", number=1, type=types.TYPE_STRING, label=types.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=types.TYPE_MESSAGE, label=1, type_name=".t.Feature")
    message("Example", (1, "features", types.TYPE_MESSAGE, False, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    example_type = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))

    example = example_type()
    example.features.feature["a"].bytes_list.value.extend([b"one", b"two"])
    example.features.feature["long"].bytes_list.value.append(bytes(20_000))
    example.features.feature["b"].float_list.value.extend([1.5, 2.5])
    example.features.feature["c"].int64_list.value.extend([-1, 2**40])
    assert features(example.SerializeToString()) == {"a": b"one", "long": bytes(20_000)}
    ours = example_type.FromString(small_data_sets.example({"k": b"v", "n": [0.5]}))
    assert ours.features.feature["k"].bytes_list.value == [b"v"]
    assert ours.features.feature["n"].float_list.value == [0.5]


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
