"""TFRecord files of `tf.train.Example` protocol buffers, without TensorFlow: their framing, and the bytes inside.

A record is its length (uint64), a checksum of the length, the data, and a checksum of the data, all little endian. The
checksums are crc32c, rotated and shifted (https://www.tensorflow.org/tutorials/load_data/tfrecord).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import google_crc32c

_HEAD, _FOOT = struct.Struct("<QI"), struct.Struct("<I")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


class RecordError(Exception):
    """A file that is no TFRecord file, is cut off, or is damaged; the message says which, without the file's name."""


class Record(NamedTuple):
    """Where the data of a record lies in its file, in bytes, and its checksum as it is stored."""

    offset: int
    length: int
    checksum: int


def masked_crc32c(data: bytes | memoryview) -> int:
    """The checksum of the framing: crc32c, rotated by 15 bits and shifted by a constant."""
    crc = google_crc32c.value(bytes(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def walk_records(path: Path) -> Iterator[Record]:
    """Find the records of a file by their lengths; the data are passed over.

    Raises:
        RecordError: after the last record that is whole.
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
    """The length of the record that begins at byte `at`, where the file is, and which lies in it as a whole."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise RecordError(f"is cut off in record {number}")
    length, checksum = _HEAD.unpack(head)
    if checksum != masked_crc32c(head[:8]):
        raise RecordError(f"is no TFRecord file, or is damaged: the length of record {number} has a wrong checksum")
    if at + _HEAD.size + length + _FOOT.size > size:
        raise RecordError(f"is cut off in record {number}, which has {length} bytes")
    return length


def read_record(path: Path, record: Record) -> memoryview:
    """Read the data of a record.

    Raises:
        RecordError: they are not there, or do not fit their checksum.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(record.offset)
        data = file.read(record.length)
    if len(data) < record.length:
        raise RecordError(f"is cut off at byte {record.offset + len(data)}")
    if masked_crc32c(data) != record.checksum:
        raise RecordError(f"is damaged: the data at byte {record.offset} do not fit their checksum")
    return memoryview(data)


def example_bytes(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Go through the features of a serialised `tf.train.Example` that are lists of bytes: key, and the first of them.

    Features of numbers are passed over, and nothing is copied.

    Raises:
        RecordError: the data are no such message.
    """
    try:
        for features in _fields(data, 1):
            for entry in _fields(features, 1):
                key, feature = next(_fields(entry, 1)), next(_fields(entry, 2), memoryview(b""))
                for values in _fields(feature, 1):
                    if (value := next(_fields(values, 1), None)) is not None:
                        yield bytes(key).decode(), value
    except (IndexError, StopIteration, UnicodeDecodeError) as error:
        raise RecordError("has data that are no tf.train.Example") from error


def _fields(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The fields of a message that have a number and are of bytes (or messages themselves)."""
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
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError
