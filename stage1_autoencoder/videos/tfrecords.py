"""TFRecord files of `tf.train.Example` protocol buffers, without TensorFlow: records, and the byte features in them.

A record is its length (uint64), a checksum of the length, the data, and a checksum of the data, all little endian. The
checksums are crc32c, rotated and shifted (https://www.tensorflow.org/tutorials/load_data/tfrecord).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import google_crc32c

from stage1_autoencoder.videos.shards import ShardError

_HEAD, _FOOT = struct.Struct("<QI"), struct.Struct("<I")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


class Record(NamedTuple):
    """Offset and length of a record's data in its file, in bytes, and the stored checksum."""

    offset: int
    length: int
    checksum: int


def masked_crc32c(data: bytes | memoryview) -> int:
    """The checksum of the framing: crc32c, rotated by 15 bits and shifted by a constant."""
    crc = google_crc32c.value(bytes(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def walk_records(path: Path) -> Iterator[Record]:
    """Find the records of a file by their lengths, without reading the data.

    Raises:
        ShardError: after the last complete record.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        at, number = 0, 0
        while at < size:
            length = _read_head(file, at, number, size)
            end = at + _HEAD.size + length
            file.seek(end)
            yield Record(at + _HEAD.size, length, *_FOOT.unpack(file.read(_FOOT.size)))
            at, number = end + _FOOT.size, number + 1


def _read_head(file: BinaryIO, at: int, number: int, size: int) -> int:
    """Read the length of the record at byte `at`, the current position, and check that the record is complete."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise ShardError(f"is cut off in record {number}")
    length, checksum = _HEAD.unpack(head)
    if checksum != masked_crc32c(head[:8]):
        raise ShardError(f"is not a TFRecord file, or is damaged: the length of record {number} has a wrong checksum")
    if at + _HEAD.size + length + _FOOT.size > size:
        raise ShardError(f"is cut off in record {number}, which has {length} bytes")
    return length


def read_record(path: Path, record: Record) -> memoryview:
    """Read the data of a record.

    Raises:
        ShardError: the data are missing, or contradict their checksum.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(record.offset)
        data = file.read(record.length)
    if len(data) < record.length:
        raise ShardError(f"is cut off at byte {record.offset + len(data)}")
    if masked_crc32c(data) != record.checksum:
        raise ShardError(f"is damaged: the data at byte {record.offset} contradict their checksum")
    return memoryview(data)


def example_bytes(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Iterate over the bytes features of a serialized `tf.train.Example`: the key and the first value of each.

    Features of numbers are skipped, and nothing is copied.

    Raises:
        ShardError: the data are not such a message.
    """
    try:
        for features in _fields(data, 1):
            for entry in _fields(features, 1):
                key, feature = next(_fields(entry, 1)), next(_fields(entry, 2), memoryview(b""))
                for values in _fields(feature, 1):
                    if (value := next(_fields(values, 1), None)) is not None:
                        yield bytes(key).decode(), value
    except (IndexError, StopIteration, UnicodeDecodeError) as error:
        raise ShardError("has a record that is not a tf.train.Example") from error


def _fields(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The fields with number `wanted` of a message, which are bytes or messages themselves."""
    at, size = 0, len(message)
    while at < size:
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(message, at)
            if at + length > size:
                raise IndexError
            if tag >> 3 == wanted:
                yield message[at : at + length]
            at += length
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise IndexError


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Read a number with 7 bits per byte, lowest first; returns it and the position after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError
