"""One video file, through PyAV: counting its frames without decoding them, and decoding them in order.

Decoding starts at a keyframe close to the first frame that is wanted, if that gives the same frames, bit for bit, as
decoding from the start of the file. `_restarts` and `_keyframes` have the conditions; where one of them is not met, and
where seeking turns out to lead elsewhere, decoding starts at the start.
"""

import contextlib
import itertools
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image

from stage1_autoencoder.videos.source import BrokenVideoError
from stage1_autoencoder.videos.splits import natural_order

VIDEO_EXTENSIONS = frozenset({".mp4", ".avi", ".mov", ".webm", ".gif", ".mkv"})

# For videos that do not tell their frame rate; it sets no more than the speed at which previews play.
UNKNOWN_FPS = 10.0

# Keyframes are remembered at this distance at least, so that short videos have none and long ones a short list.
KEYFRAME_SPACING = 64

# Containers of which the demuxer finds the same packets with the same timestamps after seeking.
_SEEKABLE = frozenset({"mov", "matroska"})


class Keyframe(NamedTuple):
    """Where decoding can start: number of the frame in presentation order, timestamp in the stream's units."""

    position: int
    pts: int


@dataclass(frozen=True)
class Probe:
    """What the index keeps of a video.

    Attributes:
        frames: how many there are, before `frame_step`.
        fps: frames a second.
        width, height: native size in pixels.
        keyframes: from which decoding may start, in order; none where that is not certain to be exact.
    """

    frames: int
    fps: float
    width: int
    height: int
    keyframes: tuple[Keyframe, ...] = ()


def _open(path: Path, video_id: str, **options: str) -> InputContainer:
    try:
        # Tags in odd encodings say nothing about frames.
        return av.open(os.path.abspath(path), metadata_errors="ignore", options=options)
    except (av.error.FFmpegError, OSError) as error:
        if isinstance(error, av.error.InvalidDataError) and _begins_as_mp4(path):
            reason = "cannot be opened as a video: it begins as an mp4, but its index is missing, so it was cut off"
            raise BrokenVideoError(video_id, reason) from error
        raise BrokenVideoError(video_id, f"cannot be opened as a video ({error.strerror})") from error


def _begins_as_mp4(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == b"ftyp"
    except OSError:
        return False


def _video_stream(container: InputContainer, video_id: str) -> VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise BrokenVideoError(video_id, "has no video stream")
    if stream.codec_context is None:
        raise BrokenVideoError(video_id, "is in a codec that this build of FFmpeg cannot decode")
    # Measured: threads that decode ahead halve the rate at 160x120 and gain nothing up to 1280x720.
    stream.codec_context.thread_count = 1
    return stream


def probe_video(path: Path, video_id: str) -> Probe:
    """Count the frames of a video file by walking its packets; only the first frame is decoded.

    Headers are not asked, because their counts can lie.

    Raises:
        BrokenVideoError: not a video, no video stream, no frame that decodes, damaged, or cut off.
    """
    with _open(path, video_id) as container:
        stream = _video_stream(container, video_id)
        packets, shown, first = 0, 0, None
        timestamps: list[int | None] = []
        restarts: list[int | None] = []
        steady = not _SEEKABLE.isdisjoint(container.format.name.split(","))
        try:
            for packet in container.demux(stream):
                if packet.size > 0:  # the last one is empty and flushes the decoder
                    packets += 1
                    shown += not packet.is_discard
                    if packet.is_corrupt:
                        raise BrokenVideoError(video_id, f"is cut off or damaged at frame {packets}")
                    # Edits, or new parameters of the decoder on the way, which seeking may pass over.
                    steady = steady and not packet.is_discard and not packet.has_sidedata("new_extradata")
                    timestamps.append(packet.pts)
                    if steady and packet.is_keyframe and _restarts(packet, stream):
                        restarts.append(packet.pts)
                if first is None:
                    first = next(iter(packet.decode()), None)
        except av.error.FFmpegError as error:
            raise BrokenVideoError(video_id, f"is damaged after {packets} frames ({error.strerror})") from error
        if first is None:
            raise BrokenVideoError(video_id, "has no frame that can be decoded")
        in_mp4_table = stream.frames if "mp4" in container.format.name else 0
        # An edit list may leave out whole groups of pictures, which the demuxer then passes over.
        if packets < in_mp4_table and (packets := _unedited_packets(path, video_id)) < in_mp4_table:
            raise BrokenVideoError(video_id, f"is cut off: {packets} of its {in_mp4_table} frames are there")
        rate = float(stream.average_rate or stream.guessed_rate or UNKNOWN_FPS)
    if missing := _missing_bytes(path):
        raise BrokenVideoError(video_id, f"is cut off: {missing}")
    # A field of an interlaced frame may have a packet of its own.
    keyframes = _keyframes(timestamps, restarts) if steady and not first.interlaced_frame else ()
    return Probe(shown, rate, first.width, first.height, keyframes)


def _unedited_packets(path: Path, video_id: str) -> int:
    """Count the packets of an mp4 file that are there, also those that its edit list leaves out."""
    with _open(path, video_id, ignore_editlist="1") as container:
        stream = _video_stream(container, video_id)
        try:
            return sum(packet.size > 0 and not packet.is_corrupt for packet in container.demux(stream))
        except av.error.FFmpegError:
            return 0


def _restarts(packet: av.Packet, stream: VideoStream) -> bool:
    """Tell whether nothing that is shown from this keyframe on depends on a packet before it.

    The keyframes of VP9 and AV1 are of that kind, and all frames of codecs that know no other. Those of H.264 and HEVC
    have to be looked into, because recovery points are flagged too. Codecs with other states than pictures, and with
    packets without a picture (MPEG-4 part 2, VP8), are left out.
    """
    codec, extradata = stream.codec_context.codec, stream.codec_context.extradata or b""
    if codec.canonical_name in ("vp9", "av1") or codec.intra_only:
        return True
    data = memoryview(packet)
    # Units of the stream with their sizes before them; the size's own size is in the decoder's configuration.
    if codec.canonical_name == "h264" and len(extradata) > 6 and extradata[0] == 1:
        kinds = [unit[0] & 31 for unit in _units(data, (extradata[4] & 3) + 1)]
        slices = [kind for kind in kinds if 1 <= kind <= 5]
        return bool(slices) and all(kind == 5 for kind in slices)  # of an instantaneous refresh
    if codec.canonical_name == "hevc" and len(extradata) > 22 and extradata[0] == 1:
        kinds = [unit[0] >> 1 & 63 for unit in _units(data, (extradata[21] & 3) + 1)]
        slices = [kind for kind in kinds if kind < 32]
        # Of random access points: what depends on pictures before one is shown before it, and nothing that is shown
        # after it may refer to either.
        return bool(slices) and all(16 <= kind <= 21 for kind in slices)
    return False


def _units(data: memoryview, size_bytes: int) -> Iterator[memoryview]:
    """Split a packet of H.264 or HEVC into its units."""
    at = 0
    while at + size_bytes < len(data):
        size = int.from_bytes(data[at : at + size_bytes], "big")
        if size:
            yield data[at + size_bytes : at + size_bytes + size]
        at += size_bytes + size


def _keyframes(timestamps: Sequence[int | None], restarts: Sequence[int | None]) -> tuple[Keyframe, ...]:
    """Number keyframes by the order of timestamps, and choose some.

    Args:
        timestamps: of all packets, in the order of decoding.
        restarts: those of the packets from which decoding could start.
    Returns:
        none if the order of timestamps might not be that of the frames that decoding from the start gives.
    """
    ordered = sorted(pts for pts in timestamps if pts is not None)
    if len(set(ordered)) < len(timestamps):
        return ()
    if not restarts or restarts[0] != timestamps[0] or restarts[0] != ordered[0]:
        return ()  # its first frames cannot be decoded
    chosen = [Keyframe(0, ordered[0])]
    for pts in sorted(restarts):
        if (position := bisect_left(ordered, pts)) >= chosen[-1].position + KEYFRAME_SPACING:
            chosen.append(Keyframe(position, pts))
    return tuple(chosen[1:])


def _missing_bytes(path: Path) -> str | None:
    """Tell how much of a file is missing by the size it claims at its start (AVI, Matroska) or its end mark (GIF)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(128)
        file.seek(max(0, size - 16))
        tail = file.read()
    claimed = 0
    if head.startswith(b"RIFF"):
        claimed = int.from_bytes(head[4:8], "little") + 8
        if claimed - 8 in (0, 0xFFFFFFFF):  # written by something that could not seek back
            claimed = 0
    elif head.startswith(b"\x1a\x45\xdf\xa3") and (segment := head.find(b"\x18\x53\x80\x67")) > 0:
        width = 9 - head[segment + 4].bit_length()  # of the size field, told by its leading zeros
        field = int.from_bytes(head[segment + 4 : segment + 4 + width], "big")
        length = field & ((1 << 7 * width) - 1)
        if length != (1 << 7 * width) - 1:  # all ones: unknown
            claimed = segment + 4 + width + length
    elif head.startswith(b"GIF8") and not tail.rstrip(b"\0").endswith(b";"):
        return "the end mark of a GIF is missing"
    return f"{size} of {claimed} bytes are there" if claimed > size + 1 else None


def decode_video(
    path: Path, video_id: str, first: int, stop: int, step: int, probe: Probe | None = None
) -> Iterator[av.VideoFrame]:
    """Decode frames first, first + step, ... before `stop` of a video file, in presentation order.

    Args:
        probe: what the index found out about the file; without it, decoding starts at the file's start.
    Yields:
        frames as the decoder made them, in the video's own size and pixel format.
    Raises:
        BrokenVideoError: decoding fails, the size changes on the way, the video ends too early, or its frames are not
            where the index has them. Of what lies before `first`, not all is looked at.
    """
    last = first + (stop - 1 - first) // step * step
    timestamps = {keyframe.position: keyframe.pts for keyframe in probe.keyframes} if probe else {}
    position = -1
    with contextlib.ExitStack() as stack:
        numbered, size = None, None
        if probe and (before := [keyframe for keyframe in probe.keyframes if keyframe.position <= first]):
            numbered, size = _from_keyframe(stack, path, video_id, before[-1]), (probe.width, probe.height)
        if numbered is None:
            container = stack.enter_context(_open(path, video_id))
            numbered, size = enumerate(container.decode(_video_stream(container, video_id))), None
        try:
            for position, frame in numbered:
                if frame.is_corrupt:
                    raise BrokenVideoError(video_id, f"frame {position} is damaged")
                if (frame.width, frame.height) != (size := size or (frame.width, frame.height)):
                    raise BrokenVideoError(
                        video_id,
                        f"changes from {size[0]}x{size[1]} to {frame.width}x{frame.height} at frame {position}; "
                        "cut it into one file a size",
                    )
                # Frames get their numbers by counting them here, and by their timestamps after seeking.
                if timestamps.get(position, frame.pts) != frame.pts:
                    raise BrokenVideoError(
                        video_id,
                        f"frame {position} has timestamp {frame.pts}, but {timestamps[position]} was expected by its "
                        "index; encode it again",
                    )
                if position >= first and (position - first) % step == 0:
                    yield frame
                if position >= last:
                    return
        except av.error.FFmpegError as error:
            raise BrokenVideoError(video_id, f"cannot be decoded after frame {position} ({error.strerror})") from error
    raise BrokenVideoError(video_id, f"ends after {position + 1} frames, but frame {last} was expected by its index")


def _from_keyframe(
    stack: contextlib.ExitStack, path: Path, video_id: str, keyframe: Keyframe
) -> Iterator[tuple[int, av.VideoFrame]] | None:
    """Number and decode the frames from a keyframe on; None if seeking does not lead to it."""
    container = stack.enter_context(_open(path, video_id))
    stream = _video_stream(container, video_id)
    try:
        container.seek(keyframe.pts, stream=stream)
        # Seeking may end at an earlier keyframe. Frames shown before this one may come after it, half decoded.
        frames = itertools.dropwhile(
            lambda frame: frame.pts is None or frame.pts < keyframe.pts, container.decode(stream)
        )
        found = next(frames, None)
    except av.error.FFmpegError:
        return None
    if found is None or found.pts != keyframe.pts or not found.key_frame:
        return None
    return enumerate(itertools.chain([found], frames), keyframe.position)


IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg"})


def is_frame(name: str) -> bool:
    """Tell whether a file name is that of a frame: a known extension, not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def list_frames(folder: Path) -> list[Path]:
    """List the frames of a folder in natural order (frame 2 before frame 10)."""
    names = [name for name in os.listdir(folder) if is_frame(name)]
    return [folder / names[at] for at in natural_order(names)]


def probe_folder(folder: Path, video_id: str) -> Probe:
    """Count the frames of a folder; only the header of the first one is read. Folders have no frame rate of their own.

    Raises:
        BrokenVideoError: an empty file among them, or a first frame that cannot be read.
    """
    frames = list_frames(folder)
    for frame in frames:
        if frame.stat().st_size == 0:
            raise BrokenVideoError(video_id, f"{frame.name} is empty")
    try:
        with Image.open(frames[0]) as image:
            return Probe(len(frames), UNKNOWN_FPS, *image.size)
    except OSError as error:
        raise BrokenVideoError(video_id, f"{frames[0].name} cannot be read as a picture") from error


def decode_folder(folder: Path, video_id: str, first: int, stop: int, step: int) -> Iterator[av.VideoFrame]:
    """Decode frames first, first + step, ... before `stop` of a folder of frames; the others are not opened.

    Yields:
        rgb24 frames in the pictures' own size.
    Raises:
        BrokenVideoError: a picture cannot be decoded or has another size than the first one, or frames are missing.
    """
    try:
        frames = list_frames(folder)
    except OSError as error:
        raise BrokenVideoError(video_id, f"cannot be listed ({error.strerror})") from error
    if len(frames) < stop:
        raise BrokenVideoError(video_id, f"has {len(frames)} frames, but its index expects {stop}")
    size = None
    for path in frames[first:stop:step]:
        try:
            with Image.open(path) as image:
                pixels = _to_rgb(image)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            raise BrokenVideoError(video_id, f"{path.name} cannot be decoded ({error})") from error
        if pixels.shape != (size := size or pixels.shape):
            raise BrokenVideoError(
                video_id,
                f"{path.name} is {pixels.shape[1]}x{pixels.shape[0]}, the frames before it {size[1]}x{size[0]}; "
                "frames of one video must have one size",
            )
        yield av.VideoFrame.from_ndarray(pixels, "rgb24")


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Decode a picture of any mode to [h, w, 3] uint8."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255 instead of scaling it
        grey = np.asarray(image).astype(np.uint16) >> 8
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    return np.ascontiguousarray(image.convert("RGB"))
