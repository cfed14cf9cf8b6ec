"""Video files: counting frames without relying on headers, decoding in presentation order, and damage."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from stage1_autoencoder.videos.preprocessing import FramePreprocessor
from stage1_autoencoder.videos.source import BrokenVideoError
from stage1_autoencoder.videos.video_files import decode_video, gives_frames, probe_video
from tests.stage1_autoencoder.videos.conftest import write_pictures

CODECS = [
    ("v.avi", "mpeg4", {}),
    ("b_frames.avi", "mpeg4", {"bf": "2"}),
    ("v.mp4", "libx264", {}),
    ("v.mov", "mpeg4", {}),
    ("v.mkv", "libx264", {}),
    ("v.webm", "libvpx-vp9", {"deadline": "realtime"}),
    ("v.gif", "gif", {}),
    ("v.avi", "mjpeg", {}),
]


def decoded(path, first, stop, step=1):
    preprocess = FramePreprocessor((16, 16), "crop")
    return [preprocess(frame) for frame in decode_video(path, "v", first, stop, step)]


@pytest.mark.parametrize(("name", "codec", "options"), CODECS)
def test_counts_and_decodes_every_frame_in_order(make_video, read_numbers, name, codec, options):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    path = make_video(name, 13, codec, **options)
    probe = probe_video(path, "v")
    assert (probe.frames, probe.width, probe.height) == (13, 64, 48)
    assert probe.fps == pytest.approx(10, rel=0.02)
    if codec == "gif":  # 8 bits for three colours: no flat greys to read numbers from
        assert len(decoded(path, 0, 13)) == 13
    else:
        assert read_numbers(decoded(path, 0, 13)) == list(range(13))
        assert read_numbers(decoded(path, 3, 12, 4)) == read_numbers(decoded(path, 3, 13, 4)) == [3, 7, 11]
        assert read_numbers(decoded(path, 12, 13)) == [12]


@pytest.mark.parametrize("wrong", [3, 1000])
def test_a_wrong_count_in_the_header_is_ignored(make_video, wrong):
    path = make_video("v.avi", 9)
    content = bytearray(path.read_bytes())
    header = content.index(b"strh") + 8
    assert struct.unpack_from("<I", content, header + 32) == (9,)
    struct.pack_into("<I", content, header + 32, wrong)
    struct.pack_into("<I", content, content.index(b"avih") + 8 + 16, wrong)
    path.write_bytes(content)
    assert probe_video(path, "v").frames == 9


def test_an_intact_mp4_whose_table_claims_more_frames(make_video, read_numbers):
    path = make_video("v.mp4", 6, "libx264")
    content = bytearray(path.read_bytes())
    table = content.index(b"stts") + 8  # number of entries, then frames and duration of each
    assert struct.unpack_from(">II", content, table) == (1, 6)
    struct.pack_into(">I", content, table + 4, 9)
    path.write_bytes(content)
    assert probe_video(path, "v").frames == 6
    assert read_numbers(decoded(path, 0, 6)) == list(range(6))


@pytest.mark.parametrize("movflags", ["faststart", "frag_keyframe+empty_moov"])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_an_mp4_that_begins_with_its_table_and_is_cut_off(tmp_path, share, movflags):
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w", options={"movflags": movflags}) as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    assert probe_video(path, "v").frames == 12
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BrokenVideoError, match=r"v: .*(cut off|damaged)"):
        probe_video(path, "v")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
@pytest.mark.parametrize(
    ("name", "codec"),
    [("v.avi", "mpeg4"), ("v.mp4", "libx264"), ("v.mkv", "libx264"), ("v.avi", "mjpeg"), ("v.gif", "gif")],
)
def test_cut_off_files_are_noticed_when_counting(encode_frames, tmp_path, name, codec, share):
    noise = np.random.default_rng(0).integers(0, 256, (12, 49, 65, 3), np.uint8)[:, :48, :64]
    path = encode_frames(tmp_path / name, list(noise), codec)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BrokenVideoError, match=r"cut off|damaged|cannot be opened|no video stream") as caught:
        probe_video(path, "v")
    if name == "v.mp4" and share < 0.9:  # what tells where frames are lies at the end
        assert "index is missing" in caught.value.reason


@pytest.mark.parametrize("content", [b"not a video at all" * 50, b"", None])
def test_files_that_are_not_videos(tmp_path, content):
    path = tmp_path / "notes.mp4"
    if content is not None:
        path.write_bytes(content)
    for read in (lambda: probe_video(path, "notes"), lambda: next(decode_video(path, "notes", 0, 1, 1))):
        with pytest.raises(BrokenVideoError, match=r"notes: cannot be (opened|read)") as caught:
            read()
        assert caught.value.video_id == "notes"


def test_a_file_with_sound_alone(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BrokenVideoError, match=r"sound: .*no video stream"):
        probe_video(path, "sound")


def test_pictures_and_music_with_a_cover_are_no_videos(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.jpg")
    (tmp_path / "picture.jpg").rename(tmp_path / "picture.mp4")
    with pytest.raises(BrokenVideoError, match=r"picture: .*single picture"):
        probe_video(tmp_path / "picture.mp4", "picture")
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 16, 16, "yuvj420p", Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.rate, silence.pts = 8000, 0
        for packet in (*sound.encode(silence), *sound.encode(), *cover.encode(av.VideoFrame(16, 16, "yuvj420p"))):
            container.mux(packet)
    with pytest.raises(BrokenVideoError, match=r"song: .*no video stream"):
        probe_video(path, "song")


def flat_packet(size: int, start: int, end: int = 0) -> av.Packet:
    return av.Packet(bytes([start, *bytes(size - 2), end]))


@pytest.mark.parametrize(
    ("codec", "packet", "frames"),
    [
        ("vp8", flat_packet(50, 0x10), 1),
        ("vp8", flat_packet(50, 0x00), 0),
        ("vp9", flat_packet(50, 0x82), 1),  # shown
        ("vp9", flat_packet(50, 0x88), 1),  # an earlier one is shown
        ("vp9", flat_packet(50, 0x80), None),
        ("vp9", flat_packet(50, 0x80, 0xC9), 1),  # several in one packet
        ("vp9", flat_packet(50, 0xB2), None),  # profile 3
        ("mpeg4", flat_packet(17, 0), 1),
        ("mpeg4", flat_packet(16, 0), None),
        ("mjpeg", flat_packet(50, 0), 1),
        ("gif", flat_packet(50, 0), 1),
        ("h264", flat_packet(50, 0), 1),
        ("mpeg2video", flat_packet(50, 0), None),
        ("wmv2", flat_packet(50, 0), None),
    ],
)
def test_how_many_frames_a_packet_gives(codec, packet, frames):
    assert gives_frames(av.Codec(codec, "r"), b"", packet, first=False) == frames
    if codec != "mjpeg":  # it is no keyframe, and the first
        assert gives_frames(av.Codec(codec, "r"), b"", packet, first=True) is None


@pytest.mark.parametrize(
    ("codec", "kind", "at_start", "inside"),
    [
        ("hevc", 19, 1, 1),  # nothing after it depends on what is before it
        ("hevc", 20, 1, 1),
        ("hevc", 21, None, 1),  # the frames that do are dropped at the start,
        ("hevc", 16, None, None),  # and after a broken link everywhere
        ("h264", 5, 1, 1),
        ("h264", 1, None, 1),  # a recovery point
    ],
)
def test_keyframes_after_which_frames_are_dropped(codec, kind, at_start, inside):
    extradata = b"\1" + bytes(20) + b"\xff" + bytes(8) if codec == "hevc" else b"\1d\0\n\xff" + bytes(8)
    unit = bytes([kind << 1 if codec == "hevc" else kind | 0x60]) + bytes(40)
    packet = av.Packet(len(unit).to_bytes(4, "big") + unit)
    packet.is_keyframe = True
    for first, frames in ((True, at_start), (False, inside)):
        assert gives_frames(av.Codec(codec, "r"), extradata, packet, first) == frames


def test_damage_inside_is_noticed_when_decoding(encode_frames, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)
    path = encode_frames(tmp_path / "v.mp4", list(noise), "libx264")
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    path.write_bytes(content)
    assert probe_video(path, "v").frames == 12
    with pytest.raises(BrokenVideoError, match=r"v: .*frame [0-9]+"):
        decoded(path, 0, 12)


def test_size_that_changes_is_an_error(tmp_path):
    path = write_pictures(tmp_path / "v.avi", [(64, 48)] * 4 + [(32, 48)] * 2)
    assert probe_video(path, "v").frames == 6
    assert len(decoded(path, 0, 4)) == 4
    with pytest.raises(BrokenVideoError, match=r"v: .*64x48.*32x48.*frame 4.*one file per size"):
        decoded(path, 0, 6)


def trimmed(source: Path, target: Path, start: int) -> Path:
    """The same packets with an edit list that begins to play at frame `start`, as trimming without encoding does."""
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1", "movflags": "faststart"}
    with av.open(str(source)) as whole, av.open(str(target), "w", options=options) as container:
        stream = whole.streams.video[0]
        copy = container.add_stream_from_template(stream)
        for packet in whole.demux(stream):
            if packet.size:
                shift = int(start / 10 / stream.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                container.mux(packet)
    return target


@pytest.mark.parametrize("start", [2, 5, 7, 11])  # in the first group of pictures, and behind it
def test_edit_lists_are_followed(make_video, tmp_path, read_numbers, start):
    x264 = {"x264-params": "keyint=5:bframes=2:scenecut=0:threads=1"}
    path = trimmed(make_video("whole.mp4", 16, "libx264", **x264), tmp_path / "cut.mp4", start)
    probe = probe_video(path, "cut")
    assert probe.frames == 16 - start
    assert read_numbers(decoded(path, 0, probe.frames)) == list(range(start, 16))
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(BrokenVideoError, match="cut off"):
        probe_video(path, "cut")


def test_videos_of_no_frame_and_of_one(tmp_path, make_video, encode_frames):
    with av.open(str(tmp_path / "none.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(BrokenVideoError, match="none: "):
        probe_video(tmp_path / "none.mp4", "none")
    path = make_video("one.gif", 1, "gif")
    assert probe_video(path, "one").frames == 1
    assert len(decoded(path, 0, 1)) == 1


def test_a_file_without_read_permission(tmp_path, make_video, monkeypatch):
    path = make_video("v.avi", 3)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(BrokenVideoError, match=r"v: .*Permission denied"):
        probe_video(path, "v")
