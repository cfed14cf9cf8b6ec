"""Files from outside that were made to hang, to crash, to fill the memory or to read and write elsewhere.

Each ends, within a second and a few megabytes, in the error that any damaged file of its kind ends in.
"""

import contextlib
import gzip
import json
import os
import signal
import sqlite3
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import zarr

import latent_cache
from pipelines.config import load_config
from pipelines.data.archives import Unpacked
from pipelines.errors import UserError
from pipelines.official import OfficialFormatError, read_official
from pipelines.runtime.files import read_json
from pipelines.runtime.progress import warn
from stage1_autoencoder.videos import BrokenVideoError, VideoError, VideoSource, open_splits, open_video
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.index import CACHE_NAME, index_videos
from stage1_autoencoder.videos.kth import read_sequences
from tests import small_data_sets

VIDEOS = DatasetConfig(name="x", source="videos", image_size=32)


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A test that waits for ever fails."""

    def stop(number: int, frame: object) -> None:
        pytest.fail("waited for 20 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def merged(levels: int) -> str:
    """YAML whose last mapping has two to the power of `levels` keys to merge."""
    lines = ["b0: &b0 {x: 1}", *(f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}]}}" for n in range(1, levels))]
    return "\n".join(lines)


def repeated(levels: int) -> str:
    """YAML whose last list has nine to the power of `levels` items."""
    aliases = (f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels))
    return "\n".join(["a0: &a0 [x]", *aliases])


@pytest.mark.parametrize(("text", "needed"), [
    ("a: " + "[" * 1000, "nested deeper than 32"),
    (repeated(30), "11 more keys"),
    (merged(40), "10000 merged keys"),
    ("".join(f"k{n}: 1\n" for n in range(5_001)), "more than 10000 keys"),
    ("seed: " + "9" * 5000, "a number of more than 100"),
    ("seed: 2020-01-01", "'2020-01-01'"),
    ("seed: !!int [1]", "line 1"),
    ("seed: !!map [1]", "line 1"),
    ("seed: !!null {}", "line 1"),
    ('seed: "\\U99999999"', "no character"),
    ("seed: !!python/object/apply:os.system [touch ran]", "python/object"),
    ("a: &a [*a]", "recursive"),
    ("#" * 2**20 + "\nseed: 1", "at most 1048576 bytes"),
], ids=lambda value: value[:12].strip())  # fmt: skip
def test_yaml(tmp_path: Path, text: str, needed: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert "x.yaml" in str(caught.value)
    assert needed in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 21


def test_yaml_based_on_a_thousand_files(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml")
    with pytest.raises(UserError, match=r"\d+\.yaml: .*`base`"):
        load_config(tmp_path / "0.yaml")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


HOSTILE_JSON = {
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"files":' * 100_000,
    "list": b"[1, 2]",
    "huge number": b'{"files": {"a": ' + b"9" * 5000 + b"}}",
    "zero": b"\0",
    "pipe": pipe,
    "device": endless,
}


@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_json(tmp_path: Path, content: bytes | Callable[[Path], None]) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(UserError, match=r"x\.json: .*; unpack it again") as caught:
        read_json(path, Unpacked, "unpack it again")
    assert len(str(caught.value)) < 400


def test_messages_move_no_cursor_and_show_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    warn("\x1b[2J\x9b1m\u202egpj http://me:secret@host/a\nb")
    shown = capsys.readouterr().err
    assert shown == "warning: \\x1b[2J\\x9b1m\\u202egpj http://***@host/a\nb\n"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (head, b"IDAT")
    )
    return b"\x89PNG\r\n\x1a\n" + parts


def gif(width: int, height: int) -> bytes:
    """Two frames of one byte each."""
    frame = b"\x21\xf9\4\0\x0a\0\0\0\x2c\0\0\0\0" + struct.pack("<HHB", width, height, 0) + b"\2\2\x44\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame + frame + b";"


def y4m(rate: str, width: int = 16, frames: int = 3) -> bytes:
    return f"YUV4MPEG2 W{width} H16 F{rate} C420\n".encode() + (b"FRAME\n" + bytes(width * 24)) * frames


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
HOSTILE_VIDEOS = {
    "a billion pixels.png": png_header(31_622, 31_622),
    "more than we take.png": png_header(9_000, 9_000),
    "not what it is named.png": EPS,
    "pipe.png": pipe,
    "device.png": endless,
    "a billion pixels.gif": gif(40_000, 40_000),
    "more than we take.gif": gif(9_000, 9_000),
    "more than we take.y4m": y4m("10:1", width=2**27, frames=0),
    "a list.mp4": b"ffconcat version 1.0\nfile other.y4m\n",
    "a playlist.ts": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\nother.y4m\n#EXT-X-ENDLIST\n",
    "a session.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "pipe.mp4": pipe,
    "pipe.webp": pipe,
    "device.mp4": endless,
}


@pytest.mark.parametrize("name", HOSTILE_VIDEOS)
def test_videos_and_pictures(tmp_path: Path, name: str) -> None:
    (tmp_path / "other.y4m").write_bytes(y4m("10:1"))
    path, content = tmp_path / "video" / name, HOSTILE_VIDEOS[name]
    path.parent.mkdir()
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    (tmp_path / "video" / "other.y4m").write_bytes(y4m("10:1"))
    given = path.parent if path.suffix == ".png" else path
    with pytest.raises(BrokenVideoError) as caught:
        open_video(VIDEOS, given).read(0)
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("rate", ["1:2000000000", "2000000000:1"])
def test_a_rate_that_no_video_has_is_taken_for_unknown(tmp_path: Path, rate: str) -> None:
    path = tmp_path / "x.y4m"
    path.write_bytes(y4m(rate))
    assert open_video(VIDEOS.model_copy(update={"fps": 10}), path).read(0).shape == (3, 32, 32, 3)


ENDLESS_VIEW = """
    ALTER TABLE video RENAME TO old;
    CREATE VIEW video AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)
    SELECT * FROM old WHERE (SELECT count(*) FROM n) > 0"""
HOSTILE_INDEXES = [
    *(f"UPDATE video SET {change}" for change in (
        "frames = -5", "frames = 0", "frames = 1000000000000000000", "frames = 'abc'", "frames = 1.5", "fps = 0",
        "fps = 9e999", "fps = 'nan'", "fps = 1e-300", "width = 'x'", "height = 0", "orientation = 99",
        "aspect = '1/0'", "aspect = '1e999999'", "aspect = '-1'", "digest = 5", "digest = x'ff'", "keyframes = '{}'",
        "keyframes = '[[1e400, 2]]'", "keyframes = '[[1, 2, 3]]'", "keyframes = '[[1, 99999999999999999999]]'",
        "keyframes = replace(hex(zeroblob(50000)), '0', '[')", "digest = hex(zeroblob(20000000))",
    )),
    ENDLESS_VIEW,
    "CREATE TRIGGER t AFTER INSERT ON video BEGIN DELETE FROM video; END; DELETE FROM video",
    "ALTER TABLE video RENAME COLUMN fps TO rate", "DROP TABLE video",
]  # fmt: skip


@pytest.mark.parametrize("statements", HOSTILE_INDEXES, ids=lambda text: " ".join(text.split())[:40])
def test_index(tmp_path: Path, statements: str) -> None:
    """It is rebuilt: videos are examined again, and known by the next call."""
    (tmp_path / "x.y4m").write_bytes(y4m("10:1"))
    examined = list(index_videos(tmp_path, ["x.y4m"]))
    with contextlib.closing(sqlite3.connect(tmp_path / CACHE_NAME)) as database:
        before = database.execute("SELECT * FROM video").fetchall()
        database.executescript(statements)
    assert list(index_videos(tmp_path, ["x.y4m"])) == examined
    with contextlib.closing(sqlite3.connect(tmp_path / CACHE_NAME)) as database:
        assert database.execute("SELECT * FROM video").fetchall() == before


@pytest.mark.parametrize("suffix", ["", "-journal", "-wal"])
def test_an_index_that_is_a_pipe_is_done_without(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "x.y4m").write_bytes(y4m("10:1"))
    pipe(tmp_path / f"{CACHE_NAME}{suffix}")
    assert [video.probe.frames for video in index_videos(tmp_path, ["x.y4m"])] == [3]


def train_split(kind: str, root: Path, splits: dict[str, int]) -> VideoSource:
    dataset = VIDEOS.model_copy(update={"source": kind, "root": str(root), "splits": splits})
    return open_splits(dataset, root)["train"]


PIXELS = np.zeros((32, 32, 3), np.uint8)


def from_elsewhere(shard: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout(PIXELS.shape, np.uint8)
    layout[:] = h5py.VirtualSource(folder / "secret.h5", "0/0", PIXELS.shape)
    shard.create_virtual_dataset("bad/0", layout)


def stored_elsewhere(shard: h5py.File, folder: Path) -> None:
    place = [(folder / "secret.h5", 0, PIXELS.nbytes)]
    shard.create_dataset("bad/0", PIXELS.shape, np.uint8, external=place)


def large(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Callable[[h5py.File, Path], None]:
    return lambda shard, folder: shard.create_dataset(
        "bad/0", shape, np.uint8, chunks=chunks, maxshape=(None, None, 3), compression="gzip"
    )


def linked(name: str, file: str, inside: str) -> Callable[[h5py.File, Path], None]:
    return lambda shard, folder: shard.update({name: h5py.ExternalLink(folder / file, inside)})


HOSTILE_SHARDS = {
    "group of another file": linked("bad", "secret.h5", "0"),
    "frame of another file": linked("bad/0", "secret.h5", "0/0"),
    "pipe": linked("bad", "pipe", "0"),
    "link to itself": lambda shard, folder: shard.update({"bad": h5py.SoftLink("/bad")}),
    "virtual": from_elsewhere,
    "external": stored_elsewhere,
    "a billion pixels": large((31_622, 31_622, 3), (8, 8, 3)),
    "huge chunks": large((32, 32, 3), (20_000, 20_000, 3)),
    "huge number": lambda shard, folder: shard.update({f"bad/{'9' * 5000}": PIXELS, "bad/1": PIXELS}),
}


@pytest.mark.parametrize("name", HOSTILE_SHARDS)
def test_hdf5(tmp_path: Path, name: str) -> None:
    """The video is skipped, and its shard's other one is used."""
    (tmp_path / "videos").mkdir()
    pipe(tmp_path / "pipe")
    for path in (tmp_path / "secret.h5", tmp_path / "videos" / "x.h5"):
        with h5py.File(path, "w") as shard:
            shard.update({"0/0": PIXELS, "len/0": 1})
    with h5py.File(path, "r+") as shard:
        HOSTILE_SHARDS[name](shard, tmp_path)
        shard["len/bad"] = 2 if name == "huge number" else 1
    source = train_split("hdf5", path.parent, {"val": 0, "test": 0})
    assert [video.id for video in source.videos] == ["x/0"]
    assert [video.id for video in source.skipped] == ["x/bad"]


def numbered(frame: str) -> bytes:
    """A TFRecord of a video whose only frame has this number."""
    return small_data_sets.record(small_data_sets.example({f"{frame}/image_aux1/encoded": PIXELS.tobytes()}))


@pytest.mark.parametrize(
    "content", [numbered("9" * 5000), numbered("9" * 12), pipe, endless], ids=["digits", "number", "pipe", "device"]
)
def test_tfrecords(tmp_path: Path, content: bytes | Callable[[Path], None]) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "good.tfrecords").write_bytes(numbered("0"))
    path = tmp_path / "train" / "bad.tfrecords"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    source = train_split("bair", tmp_path, {"val": 0})
    assert [video.id for video in source.videos] == ["good/0"]
    assert [video.id for video in source.skipped] == ["bad"]


@pytest.mark.parametrize("content", [
    b"person01_boxing_d1  frames  1-" + b"9" * 5000, b"person01_boxing_d1  frames  1-9\n" * 50_000, pipe, endless,
], ids=["digits", "size", "pipe", "device"])  # fmt: skip
def test_frame_ranges_of_kth(tmp_path: Path, content: bytes | Callable[[Path], None]) -> None:
    path = tmp_path / "00sequences.txt"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(VideoError, match=r"00sequences\.txt.*river data"):
        read_sequences(path)


class Runs:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, ("touch ran",)


def packed_again(path: Path, more: str | None = None) -> None:
    """As a compressed archive, with one more entry."""
    torch.save({"model": {"ae.x": torch.zeros(1_000_000)}}, path.with_suffix(".whole"))
    with (
        zipfile.ZipFile(path.with_suffix(".whole")) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for entry in whole.infolist():
            other.writestr(entry.filename, whole.read(entry))
        if more is not None:
            other.writestr(more, b"")


def saved(tensor: object) -> Callable[[Path], None]:
    return lambda path: torch.save({"model": {"ae.x": tensor}}, path)


@pytest.mark.parametrize(("name", "make"), [
    ("code.pth", saved(Runs())), ("program.pth", lambda path: packed_again(path, "x/constants.pkl")),
    ("bomb.pth", packed_again), ("bomb.pth.gz", lambda path: path.write_bytes(gzip.compress(bytes(10_000_000)))),
    ("any shape.pth", saved(torch.zeros(1).expand(1_000_000, 1_000_000))),
    ("sparse.pth", lambda path: saved(torch.eye(3).to_sparse())(path)),
    ("nothing.pth", saved(torch.zeros(10**12, device="meta"))), ("pipe.pth", pipe),
])  # fmt: skip
def test_official_weights(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / name)
    with pytest.raises(OfficialFormatError, match=name) as caught:
        read_official(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("ran").exists()


HOSTILE_METADATA = [
    ("train/latents", {"shape": [10**18, 4, 4, 4]}), ("train/latents", {"shape": "x"}),
    ("train/latents", "[" * 100_000),
    ("train/latents", {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 4, 4, 4]}}}),
    ("train/latents", {"data_type": "bfloat16"}), ("train/latents", {"data_type": "bool", "fill_value": False}),
    ("train/latents", {"codecs": [{"name": "numcodecs.pickle"}]}), ("train/latents", {"attributes": []}),
    ("train/latents", {"attributes": {"mean": [10**400] * 4, "std": [1] * 4}}),
    ("train/latents", {"attributes": {"mean": [0] * 4, "std": [-1] * 4}}),
    ("train/video_offset", {"shape": [10**15]}), ("train/video_id", {"shape": [10**15]}),
    ("", "[" * 100_000), ("", {"node_type": "x"}), ("", {"attributes": [1]}),
    ("", {"fps": "fast"}), ("", {"fps": 10**400}),
    ("", {"preprocessing": [1]}), ("", {"dataset": {}}), ("", {"autoencoder": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "change"), HOSTILE_METADATA, ids=lambda value: str(value)[:60])
def test_store(first_store: Path, key: str, change: str | dict[str, object]) -> None:
    path = first_store / key / "zarr.json"
    metadata = json.loads(path.read_text())
    if isinstance(change, str):
        path.write_text(change)
    else:
        part = metadata["attributes"] if change.keys() <= metadata["attributes"].keys() else metadata
        part |= change
        path.write_text(json.dumps(metadata))
    with pytest.raises(latent_cache.StoreError, match=r"tiny\.zarr"):
        latent_cache.open(first_store, "train")


def test_store_whose_offsets_and_shape_agree_on_absurd_numbers(first_store: Path) -> None:
    group = zarr.open_group(first_store / "train", mode="r+")
    group["video_offset"][-1] = 10**18
    for name in ("latents", "codes"):
        path = first_store / "train" / name / "zarr.json"
        metadata = json.loads(path.read_text())
        metadata["shape"][0] = 10**18
        path.write_text(json.dumps(metadata))
    with pytest.raises(latent_cache.StoreError, match="chunks"):
        latent_cache.open(first_store, "train")


def test_store_whose_notes_are_none(command: Callable, first_store: Path) -> None:
    path = first_store / "zarr.json"
    for notes in ([1], {"skipped": "x"}):
        metadata = json.loads(path.read_text())
        metadata["attributes"]["notes"] = notes
        path.write_text(json.dumps(metadata))
        command(["inspect", str(first_store)]).refused(2, str(first_store), "notes")
