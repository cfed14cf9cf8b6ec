"""Decoding from the middle of a file: bit for bit what decoding from its start gives, from any first frame."""

import contextlib
import json
import sqlite3
from pathlib import Path

import av
import numpy as np
import pytest
from av.container import InputContainer
from av.video.stream import VideoStream

from stage1_autoencoder.videos import open_source
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.index import CACHE_NAME
from stage1_autoencoder.videos.source import BrokenVideoError
from stage1_autoencoder.videos.video_files import (
    Keyframe,
    Probe,
    can_restart,
    choose_keyframes,
    decode_video,
    frames_from,
    probe_video,
)
from tests.stage1_autoencoder.videos.conftest import encode, write_pictures

FRAMES = 50


def x264(**settings: int) -> dict[str, str]:
    # Neither scene cuts nor several threads, so that keyframes are where the test wants them.
    settings = {"scenecut": 0, "min-keyint": 1, "threads": 1} | {k.replace("_", "-"): v for k, v in settings.items()}
    return {"x264-params": ":".join(f"{key}={value}" for key, value in settings.items())}


# asm=0: x265's assembler writes past its buffers where pictures are smaller than 64x64, and the process dies later.
X265 = "log-level=none:asm=0:pools=none:frame-threads=1:keyint=12:min-keyint=12:scenecut=0"

# Files whose keyframes may be used.
SEEKABLE = [
    ("b_frames.mp4", "libx264", x264(keyint=12, bframes=3), {}),
    ("short_groups.mp4", "libx264", x264(keyint=3, bframes=3), {}),
    ("pyramid.mkv", "libx264", x264(keyint=16, bframes=5, b_pyramid=2, ref=5), {}),
    ("intra.mp4", "libx264", x264(keyint=1), {}),
    ("late.mp4", "libx264", x264(keyint=10), {"first": 70}),
    ("late.mkv", "libx264", x264(keyint=10), {"first": 70}),
    ("before_zero.mkv", "libx264", x264(keyint=10), {"first": -5}),
    ("uneven.mp4", "libx264", x264(keyint=12, bframes=3), {"uneven": True}),
    ("uneven.mkv", "libx264", x264(keyint=12, bframes=3), {"uneven": True}),
    ("closed.mp4", "libx265", {"x265-params": f"{X265}:open-gop=0"}, {}),
    ("open.mkv", "libx265", {"x265-params": f"{X265}:open-gop=1:bframes=4"}, {}),
    ("v.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, {}),
    ("hidden.webm", "libvpx-vp9", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "8"}, {}),
    ("v.mkv", "libsvtav1", {"g": "12", "preset": "12"}, {}),
    ("v.mov", "mjpeg", {}, {}),
    ("v.mkv", "mjpeg", {}, {"uneven": True}),
]  # fmt: skip

# Files whose keyframes may not be used, for one reason or another.
OTHERS = [
    ("open_groups.mp4", "libx264", x264(keyint=12, bframes=3, open_gop=1), {}),  # recovery points
    ("refresh.mp4", "libx264", x264(keyint=12, intra_refresh=1), {}),
    ("interlaced.mp4", "libx264", x264(keyint=12, tff=1), {}),
    ("v.mp4", "mpeg4", {"g": "12", "bf": "2"}, {}),
    ("v.avi", "mpeg4", {"g": "12"}, {}),
    ("b_frames.avi", "mpeg4", {"g": "12", "bf": "2"}, {}),
    ("v.avi", "mjpeg", {}, {}),
    ("v8.webm", "libvpx", {"g": "12", "deadline": "realtime"}, {}),
    ("v.gif", "gif", {}, {}),
    ("edited.mp4", "libx264", x264(keyint=20, bframes=2), {"first": -5}),  # 5 frames are not to be shown
    ("one_group.mp4", "libx264", x264(keyint=250), {}),
]


def moving_noise(count: int) -> list[np.ndarray]:
    """Frames [32, 48, 3] that look like none before them but are predicted from them."""
    picture = np.random.default_rng(0).integers(0, 128, (32, 48, 3), np.uint8)
    return [np.roll(picture, (n, 3 * n), (0, 1)) + np.uint8(n % 128) for n in range(count)]


def write(
    path: Path, codec: str, options: dict[str, str], first: int = 0, uneven: bool = False, count: int = FRAMES
) -> Path:
    """Encode moving noise, with timestamps from `first` on, at a distance of 1, or of 1, 2 and 3 in turn."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    steps = [1 + number % 3 if uneven else 1 for number in range(count - 1)]
    return encode(path, moving_noise(count), codec, np.cumsum([first, *steps]).tolist(), **options)


def pixels(path: Path, first: int, stop: int, probe: Probe | None, step: int = 1) -> list[bytes]:
    return [frame.to_ndarray().tobytes() for frame in decode_video(path, "v", first, stop, step, probe)]


@pytest.mark.parametrize(("name", "codec", "options", "timing"), [*SEEKABLE, *OTHERS])
def test_every_start_gives_the_frames_of_decoding_from_the_start(tmp_path, name, codec, options, timing):
    path = write(tmp_path / name, codec, options, **timing)
    probe = probe_video(path, "v", keyframe_spacing=1)
    frames = 45 if name == "edited.mp4" else FRAMES
    assert probe.frames == frames
    assert probe_video(path, "v").keyframes == ()  # shorter than the usual spacing
    from_start = pixels(path, 0, frames, None)
    assert len(set(from_start)) == frames
    positions = [keyframe.position for keyframe in probe.keyframes]
    assert bool(positions) == ((name, codec, options, timing) in SEEKABLE)
    for first in range(frames):
        stop = frames if first in positions else first + 1
        assert pixels(path, first, stop, probe) == from_start[first:stop], f"from frame {first}"
    assert pixels(path, 20, frames, probe, step=7) == from_start[20::7]
    for keyframe in probe.keyframes:
        with av.open(str(path)) as container:
            number, frame = next(frames_from(container, "v", keyframe))
            assert (number, frame.to_ndarray().tobytes()) == (keyframe.position, from_start[keyframe.position])


def damage(path: Path, first: int, stop: int) -> None:
    """Overwrite the packets first..stop-1 of an mp4 file."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for at, size in places[first:stop]:
        content[at + 5 : at + size] = bytes(size - 5)
    path.write_bytes(content)


def test_decoding_begins_at_the_keyframe_before_the_first_frame(tmp_path):
    path = write(tmp_path / "v.mp4", "libx264", x264(keyint=10))
    probe = probe_video(path, "v", keyframe_spacing=1)
    whole = pixels(path, 0, FRAMES, None)
    damage(path, 20, 23)
    for first in (0, 15, 20, 22, 25):
        with pytest.raises(BrokenVideoError, match=r"v: .*frame [0-9]+"):
            pixels(path, first, 30, probe)
    assert pixels(path, 30, FRAMES, probe) == whole[30:]  # what lies before the keyframe is not decoded
    with pytest.raises(BrokenVideoError, match=r"v: .*frame [0-9]+"):
        pixels(path, 30, FRAMES, None)


def test_a_source_starts_at_the_keyframes_of_the_index(tmp_path):
    path = write(tmp_path / "v.mp4", "libx264", x264(keyint=12, bframes=2), count=210)
    settings = {"name": "mine", "source": "videos", "root": "{data}", "image_size": 16}
    everything = open_source(DatasetConfig(**settings), tmp_path, "train").read(0)
    stored = (tmp_path / CACHE_NAME).read_bytes()
    with contextlib.closing(sqlite3.connect(tmp_path / CACHE_NAME)) as database:
        ((keyframes,),) = database.execute("SELECT keyframes FROM video")
    keyframes = tuple(Keyframe(*pair) for pair in json.loads(keyframes))
    # At a distance of 64 frames or more: multiples of 12 from there on.
    assert [keyframe.position for keyframe in keyframes] == [72, 144]
    assert probe_video(path, "v").keyframes == keyframes

    source = open_source(DatasetConfig(**settings), tmp_path, "train")
    stepped = open_source(DatasetConfig(**settings, frame_step=30), tmp_path, "train")
    assert (tmp_path / CACHE_NAME).read_bytes() == stored
    damage(path, 30, 40)  # only decoding from a keyframe avoids these frames
    for start in (72, 100, 144, 209):
        assert (np.stack(list(source.iterate(0, start))) == everything[start:]).all()
    assert (source.read(0, [150, 80, 150]) == everything[[150, 80, 150]]).all()
    assert (source.read(0, [209, 5, 74]) == everything[[209, 5, 74]]).all()  # what lies between is skipped
    assert (source.restarts(0).tolist(), stepped.restarts(0).tolist()) == ([72, 144], [3, 5])
    assert (np.stack(list(stepped.iterate(0, 3))) == everything[90::30]).all()
    with pytest.raises(BrokenVideoError):
        next(source.iterate(0, 71))


class Misled:
    """An open file whose demuxer seeks to a wrong place."""

    def __init__(self, container: InputContainer, offset: int) -> None:
        self.container, self.offset = container, offset
        self.streams, self.decode = container.streams, container.decode

    def seek(self, pts: int, stream: VideoStream) -> None:
        self.container.seek(pts + self.offset, stream=stream)


@pytest.mark.parametrize(("frames_off", "found"), [(-10, True), (-20, True), (10, False), (1000, False)])
def test_seeking_that_leads_elsewhere_is_noticed(tmp_path, frames_off, found):
    path = write(tmp_path / "v.mp4", "libx264", x264(keyint=10))
    keyframe = probe_video(path, "v", keyframe_spacing=1).keyframes[2]
    from_start = pixels(path, 0, FRAMES, None)
    with av.open(str(path)) as container:
        units_per_frame = 1024
        frames = frames_from(Misled(container, frames_off * units_per_frame), "v", keyframe)
        assert (frames is not None) == found
        if found:
            numbered = [(number, frame.to_ndarray().tobytes()) for number, frame in frames]
            assert numbered == list(enumerate(from_start))[30:]


@pytest.mark.parametrize("recovery_points", [False, True])
def test_without_a_keyframe_at_that_place_decoding_begins_at_the_start(tmp_path, recovery_points):
    """A frame of the index that is no keyframe, and packets that are flagged as one but are only recovery points."""
    options = x264(keyint=12, intra_refresh=1) if recovery_points else x264(keyint=10)
    path = write(tmp_path / "v.mp4", "libx264", options)
    keyframes = [Keyframe(25, 25 * 1024)]
    if recovery_points:
        with av.open(str(path)) as container:
            flagged = [packet.pts for packet in container.demux(video=0) if packet.size and packet.is_keyframe]
        keyframes = [Keyframe(pts // 1024, pts) for pts in flagged[1:] if pts // 1024 <= 30]
        assert keyframes
    wrong = Probe(FRAMES, 10.0, 48, 32, tuple(keyframes))
    with av.open(str(path)) as container:
        assert frames_from(container, "v", keyframes[-1]) is None
    assert pixels(path, 30, FRAMES, wrong) == pixels(path, 30, FRAMES, None)


AVC, HEVC = ("h264", b"\1d\0\n" + b"%c" + bytes(8)), ("hevc", b"\1" + bytes(20) + b"%c" + bytes(8))


@pytest.mark.parametrize(
    ("codec", "size_bytes", "kinds", "restarts"),
    [
        (AVC, 4, [9, 7, 8, 6, 5, 5], True),
        (AVC, 2, [6, 5], True),
        (AVC, 1, [5], True),
        (AVC, 4, [6, 1, 1], False),
        (AVC, 4, [5, 1], False),
        (AVC, 4, [2, 5], False),
        (AVC, 4, [7, 8], False),
        (AVC, 4, [], False),
        (HEVC, 4, [35, 32, 33, 34, 39, 19], True),
        (HEVC, 2, [20], True),
        (HEVC, 1, [39, 21, 21], True),
        (HEVC, 4, [1], False),
        (HEVC, 4, [21, 9], False),
        (HEVC, 4, [22], False),
        (HEVC, 4, [32, 33, 34], False),
        (("h264", b""), 4, [5], False),  # the size of sizes is unknown
        (("h264", b"\0\0\0\1" + bytes(20)), 4, [5], False),
        (("hevc", b"\1" + bytes(10)), 4, [19], False),
        (("mpeg4", b""), 4, [5], False),
        (("vp8", b""), 4, [5], False),
        (("vp9", b""), 4, [], True),
        (("mjpeg", b""), 4, [], True),
    ],
)
def test_which_packets_decoding_may_start_from(codec, size_bytes, kinds, restarts):
    name, extradata = codec
    extradata = extradata.replace(b"%c", bytes([0xFC | (size_bytes - 1)]))
    # Units of 200 or more bytes, so that a size that is read wrong leads elsewhere.
    length = 200 if size_bytes == 1 else 40000 if size_bytes == 2 else 70000
    headers = [kind << 1 if name == "hevc" else kind | 0x60 for kind in kinds]
    data = b"".join(length.to_bytes(size_bytes, "big") + bytes([header]) + bytes(length - 1) for header in headers)
    assert can_restart(av.Codec(name, "r"), extradata, data) == restarts


@pytest.mark.parametrize(
    ("timestamps", "restarts", "positions"),
    [
        ([0, 2, 1, 3, 5, 4], [0, 3], [3]),
        ([-4, -2, -3, 10, 40, 20], [-4, 10], [3]),
        ([0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3]),
        ([0, 3, 1, 2, 4], [0, 3], [3]),  # 1 and 2 are shown before the keyframe that they come after
        ([0, 1, None, 3], [0, 3], []),
        ([0, 1, 1, 3], [0, 3], []),
        ([0, 1, 2, 3], [2], []),
        ([0, 1, 2, 3], [], []),
        ([2, 0, 1, 3], [2, 3], []),
        ([2, 0, 1, 3], [0, 3], []),
        ([None, 1, 2, 3], [None, 2], []),
    ],
)
def test_keyframes_are_numbered_by_timestamps(timestamps, restarts, positions):
    found = choose_keyframes(timestamps, restarts, spacing=1)
    assert [keyframe.position for keyframe in found] == positions
    assert all(sorted(timestamps)[keyframe.position] == keyframe.pts for keyframe in found)


def test_an_index_that_contradicts_the_frames_is_an_error(tmp_path):
    path = write(tmp_path / "v.mp4", "libx264", x264(keyint=10))
    probe = probe_video(path, "v", keyframe_spacing=1)
    assert [keyframe.position for keyframe in probe.keyframes] == [10, 20, 30, 40]
    for wrong in (probe.keyframes[1]._replace(position=19), probe.keyframes[1]._replace(pts=1)):
        lying = Probe(FRAMES, 10.0, 48, 32, (probe.keyframes[0], wrong, *probe.keyframes[2:]))
        for first in (0, 15):
            with pytest.raises(BrokenVideoError, match=f"v: frame {wrong.position} .*timestamp"):
                pixels(path, first, FRAMES, lying)
        assert len(pixels(path, 0, 19, lying)) == 19


def test_a_size_that_changed_before_the_start_is_an_error(tmp_path):
    path = write_pictures(tmp_path / "v.mkv", [(48, 32)] * 5 + [(64, 32)] * 5)
    probe = probe_video(path, "v", keyframe_spacing=1)
    assert len(pixels(path, 2, 5, probe)) == 3
    for known in (probe, None):
        with pytest.raises(BrokenVideoError, match=r"v: .*48x32.*64x32"):
            pixels(path, 7, 9, known)
