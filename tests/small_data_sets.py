"""Small data sets in the true formats of BAIR and CLEVRER: `python -m tests.small_data_sets OUT`.

Their videos show shapes that bounce. What is written is what the data sets' own sites have: an archive
`bair_robot_pushing_dataset_v0.tar` with TFRecords of protobuf examples, and `video_train.zip`, `video_validation.zip`
and `video_test.zip` with H.264 videos of 480x320. So the folder is a mirror: `make data DATASET=bair_64 MIRROR=OUT`,
`make data DATASET=clevrer MIRROR=OUT`.
"""

import argparse
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import av
import google_crc32c
import numpy as np

from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.shapes import ShapesSource

BAIR_ARCHIVE = "bair_robot_pushing_dataset_v0.tar"
BAIR_FRAMES = 30
CLEVRER_FRAMES = 128
# First number of each split; CLEVRER has 10 000, 5000 and 5000 from there.
CLEVRER_FIRST = {"train": 0, "validation": 10_000, "test": 15_000}


def bouncing(count: int, frames: int, side: int, seed: int) -> Iterator[np.ndarray]:
    """Videos [frames, side, side, 3] uint8."""
    shapes = {"frames": frames, "max_speed": 2.0, "min_speed": 0.5}
    dataset = DatasetConfig(
        name="bouncing", source="shapes", image_size=side, split_seed=seed, splits={"train": count}, shapes=shapes
    )
    source = ShapesSource(dataset, "train")
    return (source.read(index) for index in range(count))


def masked_crc(data: bytes) -> bytes:
    """The checksum of a TFRecord: crc32c, rotated and shifted so that it may itself be checksummed."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    """One framed record of a TFRecord file."""
    length = struct.pack("<Q", len(data))
    return length + masked_crc(length) + data + masked_crc(data)


def example(features: Mapping[str, bytes | Sequence[float]]) -> bytes:
    """A serialised `tf.train.Example`: bytes become a list of one, numbers a list of floats."""
    entries = b""
    for key, value in features.items():
        if isinstance(value, bytes):
            feature = _field(1, _field(1, value))
        else:
            feature = _field(2, _field(1, struct.pack(f"<{len(value)}f", *value)))
        entries += _field(1, _field(1, key.encode()) + _field(2, feature))
    return _field(1, entries)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def bair_example(video: np.ndarray) -> bytes:
    """A video [n, 64, 64, 3] uint8 as BAIR has it: two cameras, actions and the arm's place for each frame."""
    features: dict[str, bytes | Sequence[float]] = {}
    for number, frame in enumerate(video):
        features[f"{number}/image_aux1/encoded"] = frame.tobytes()
        features[f"{number}/image_main/encoded"] = frame[::-1].tobytes()
        features[f"{number}/action"] = [0.1 * number] * 4
        features[f"{number}/endeffector_pos"] = [0.0, 0.5, 1.0]
    return example(features)


def write_bair(folder: Path, *, train: int = 96, test: int = 16, per_file: int = 32, frames: int = BAIR_FRAMES) -> None:
    """Write `softmotion30_44k/{train,test}/traj_<first>_to_<last>.tfrecords` below a folder."""
    for seed, (split, count) in enumerate({"train": train, "test": test}.items()):
        inside = folder / "softmotion30_44k" / split
        inside.mkdir(parents=True)
        videos = bouncing(count, frames, 64, seed)
        for first in range(0, count, per_file):
            last = min(first + per_file, count) - 1
            with (inside / f"traj_{first}_to_{last}.tfrecords").open("wb") as file:
                for _ in range(first, last + 1):
                    file.write(record(bair_example(next(videos))))


def write_bair_archive(folder: Path, **sizes: int) -> None:
    """Write the archive as BAIR's site has it, and the unpacked files beside it."""
    write_bair(folder, **sizes)
    with tarfile.open(folder / BAIR_ARCHIVE, "w") as archive:
        archive.add(folder / "softmotion30_44k", "softmotion30_44k")


def write_lerobot(
    root: Path,
    version: str,
    episodes: Sequence[bytes],
    actions: Sequence[np.ndarray],
    fps: float = 10,
    cameras: Sequence[str] = ("observation.images.top",),
) -> Path:
    """A robot data set as LeRobot of version v2.1 or v3.0 stores it.

    Args:
        episodes: MP4 of each; in version 3 one MP4 with all of them.
        actions: of each episode [frames, n] float32; without values (n = 0) the data set has none.
    """
    import pyarrow
    from pyarrow import parquet

    def write_table(path: Path, columns: Mapping[str, object]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(dict(columns)), path)

    def data(numbers: Sequence[int]) -> dict[str, object]:
        index = np.concatenate([np.full(len(actions[number]), number) for number in numbers])
        told = np.concatenate([actions[number] for number in numbers])
        values, size = pyarrow.array(told.ravel()), told.shape[1]
        if size == 0:
            return {"episode_index": index}
        column = values if size == 1 else pyarrow.FixedSizeListArray.from_arrays(values, size)
        return {"action": column, "episode_index": index}

    size = actions[0].shape[1]
    info = {
        "codebase_version": version, "robot_type": "toy", "total_episodes": len(actions), "fps": fps, "chunks_size": 2,
        "features": {camera: {"dtype": "video", "shape": [48, 64, 3]} for camera in cameras}
        | ({"action": {"dtype": "float32", "shape": [size]}} if size else {}),
    }  # fmt: skip
    lengths = [len(those) for those in actions]
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    if version == "v3.0":
        ends = np.cumsum(lengths)
        columns = {"episode_index": np.arange(len(lengths)), "length": lengths}
        columns |= {f"data/{name}_index": [0] * len(lengths) for name in ("chunk", "file")}
        for camera in cameras:
            columns |= {f"videos/{camera}/{name}_index": [0] * len(lengths) for name in ("chunk", "file")}
            columns |= {f"videos/{camera}/from_timestamp": (ends - lengths) / fps}
            columns |= {f"videos/{camera}/to_timestamp": ends / fps}
            place = root / "videos" / camera / "chunk-000"
            place.mkdir(parents=True)
            (place / "file-000.mp4").write_bytes(episodes[0])
        write_table(root / "meta/episodes/chunk-000/file-000.parquet", columns)
        write_table(root / "data/chunk-000/file-000.parquet", data(range(len(lengths))))
        return root
    lines = [{"episode_index": number, "length": length, "tasks": ["go"]} for number, length in enumerate(lengths)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number, video in enumerate(episodes):
        chunk, name = f"chunk-{number // 2:03d}", f"episode_{number:06d}"
        for camera in cameras:
            place = root / "videos" / chunk / camera
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}.mp4").write_bytes(video)
        write_table(root / "data" / chunk / f"{name}.parquet", data([number]))
    return root


def clevrer_video(video: np.ndarray) -> bytes:
    """A video [n, 320, 320, 3] uint8 as an mp4 of 480x320, the margins grey."""
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "23", "preset": "fast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 480, 320, "yuv420p"
        wide = np.full((320, 480, 3), 90, np.uint8)
        for pixels in video:
            wide[:, 80:400] = pixels
            container.mux(stream.encode(av.VideoFrame.from_ndarray(wide, "rgb24")))
        container.mux(stream.encode())
    return content.getvalue()


def write_clevrer_archives(
    folder: Path, *, train: int = 24, validation: int = 4, test: int = 8, frames: int = CLEVRER_FRAMES
) -> None:
    """Write `video_{train,validation,test}.zip` with `video_<first>-<last>/video_NNNNN.mp4` inside."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": train, "validation": validation, "test": test}
    for seed, (split, count) in enumerate(counts.items()):
        first = CLEVRER_FIRST[split]
        with zipfile.ZipFile(folder / f"video_{split}.zip", "w") as archive:
            for number, video in enumerate(bouncing(count, frames, 320, seed), first):
                inside = f"video_{number // 1000 * 1000:05d}-{number // 1000 * 1000 + 1000:05d}"
                archive.writestr(f"{inside}/video_{number:05d}.mp4", clevrer_video(video))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    write_bair_archive(out)
    write_clevrer_archives(out)
