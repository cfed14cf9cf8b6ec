"""Video files, through PyAV: counting frames without decoding them, and decoding frames in order.

Decoding starts at a keyframe close to the first requested frame if this gives, bit for bit, the same frames as decoding
from the start of the file. `can_restart` and `choose_keyframes` have the conditions. If one of them is not met, or if
seeking leads elsewhere, decoding begins at the start of the file.
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
from av.container import InputContainer
from av.video.stream import VideoStream

from stage1_autoencoder.videos.source import UNKNOWN_FPS, BrokenVideoError

VIDEO_EXTENSIONS = frozenset({".mp4", ".avi", ".mov", ".webm", ".gif", ".mkv"})

# Smallest distance of the keyframes in the index, so that short videos have none and long ones a short list.
KEYFRAME_SPACING = 64

# Containers whose demuxer finds the same packets with the same timestamps after seeking.
_SEEKABLE = frozenset({"mov", "matroska"})


class Keyframe(NamedTuple):
    """Where decoding can start: number of the frame in presentation order, timestamp in the stream's units."""

    position: int
    pts: int


@dataclass(frozen=True)
class Probe:
    """What the index stores about a video.

    Attributes:
        frames: number of frames before `frame_step`.
        fps: frames per second.
        width, height: native size in pixels.
        keyframes: those at which decoding may start, in order; none where this may not be exact.
    """

    frames: int
    fps: float
    width: int
    height: int
    keyframes: tuple[Keyframe, ...] = ()


def _open(path: Path, video_id: str, **options: str) -> InputContainer:
    try:
        # Metadata in unknown encodings does not affect frames.
        return av.open(os.path.abspath(path), metadata_errors="ignore", options=options)
    except (av.error.FFmpegError, OSError) as error:
        if isinstance(error, av.error.InvalidDataError) and _begins_as_mp4(path):
            reason = "cannot be opened as a video: it begins as an mp4, but its index is missing, so it is cut off"
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
        raise BrokenVideoError(video_id, "uses a codec that this build of FFmpeg cannot decode")
    # Measured: threads that decode ahead halve the rate at 160x120 and gain nothing up to 1280x720.
    stream.codec_context.thread_count = 1
    return stream


def probe_video(path: Path, video_id: str, keyframe_spacing: int = KEYFRAME_SPACING) -> Probe:
    """Count the frames of a video file by reading its packets; only the first frame is decoded.

    Frame counts in headers are ignored, because they can be wrong.

    Args:
        keyframe_spacing: smallest distance of the keyframes in the result, in frames.
    Raises:
        BrokenVideoError: not a video, no video stream, no frame that decodes, damaged, or cut off.
    """
    with _open(path, video_id) as container:
        stream = _video_stream(container, video_id)
        codec, extradata = stream.codec_context.codec, stream.codec_context.extradata or b""
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
                    # Seeking may skip edits, and new parameters for the decoder.
                    steady = steady and not packet.is_discard and not packet.has_sidedata("new_extradata")
                    timestamps.append(packet.pts)
                    if steady and packet.is_keyframe and can_restart(codec, extradata, packet):
                        restarts.append(packet.pts)
                if first is None:
                    first = next(iter(packet.decode()), None)
        except av.error.FFmpegError as error:
            raise BrokenVideoError(video_id, f"is damaged after {packets} frames ({error.strerror})") from error
        if first is None:
            raise BrokenVideoError(video_id, "has no frame that can be decoded")
        in_mp4_table = stream.frames if "mp4" in container.format.name else 0
        # An edit list may drop whole groups of pictures, which the demuxer then skips.
        if packets < in_mp4_table and (packets := _unedited_packets(path, video_id)) < in_mp4_table:
            raise BrokenVideoError(video_id, f"is cut off: it has {packets} of its {in_mp4_table} frames")
        rate = float(stream.average_rate or stream.guessed_rate or UNKNOWN_FPS)
    if missing := _missing_bytes(path):
        raise BrokenVideoError(video_id, f"is cut off: {missing}")
    # A field of an interlaced frame may have a packet of its own.
    seekable = steady and not first.interlaced_frame
    keyframes = choose_keyframes(timestamps, restarts, keyframe_spacing) if seekable else ()
    return Probe(shown, rate, first.width, first.height, keyframes)


def _unedited_packets(path: Path, video_id: str) -> int:
    """Count the packets of an mp4 file, including those that its edit list drops."""
    with _open(path, video_id, ignore_editlist="1") as container:
        stream = _video_stream(container, video_id)
        try:
            return sum(packet.size > 0 and not packet.is_corrupt for packet in container.demux(stream))
        except av.error.FFmpegError:
            return 0


def can_restart(codec: av.Codec, extradata: bytes, packet: av.Packet | bytes) -> bool:
    """Whether no frame that is shown from this keyframe on depends on an earlier packet.

    This holds for the keyframes of VP9 and AV1, and for all frames of intra-only codecs. The keyframes of H.264 and
    HEVC have to be parsed, because recovery points are flagged too. Codecs with other state than pictures, or with
    packets without a picture (MPEG-4 part 2, VP8), never qualify.

    Args:
        extradata: the configuration of the decoder, from the container.
        packet: the keyframe, or its bytes.
    """
    if codec.canonical_name in ("vp9", "av1") or codec.intra_only:
        return True
    # Each unit of the stream follows its size; the decoder's configuration has the number of bytes of the size.
    if codec.canonical_name == "h264" and len(extradata) > 6 and extradata[0] == 1:
        kinds = [unit[0] & 31 for unit in _units(memoryview(packet), (extradata[4] & 3) + 1)]
        slices = [kind for kind in kinds if 1 <= kind <= 5]
        return bool(slices) and all(kind == 5 for kind in slices)  # of an instantaneous refresh
    if codec.canonical_name == "hevc" and len(extradata) > 22 and extradata[0] == 1:
        kinds = [unit[0] >> 1 & 63 for unit in _units(memoryview(packet), (extradata[21] & 3) + 1)]
        slices = [kind for kind in kinds if kind < 32]
        # Of random access points: pictures that depend on earlier ones are shown before it, and pictures that are shown
        # after it refer to neither.
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


def choose_keyframes(
    timestamps: Sequence[int | None], restarts: Sequence[int | None], spacing: int
) -> tuple[Keyframe, ...]:
    """Number keyframes by the order of timestamps, and choose some at least `spacing` frames apart.

    Args:
        timestamps: of all packets, in decoding order.
        restarts: those of the packets from which decoding can start.
    Returns:
        empty if the order of timestamps may differ from the order of the frames when decoding from the start.
    """
    ordered = sorted(pts for pts in timestamps if pts is not None)
    if len(set(ordered)) < len(timestamps):
        return ()
    if not restarts or restarts[0] != timestamps[0] or restarts[0] != ordered[0]:
        return ()  # the first frames cannot be decoded
    chosen = [Keyframe(0, ordered[0])]
    for pts in sorted(restarts):
        if (position := bisect_left(ordered, pts)) >= chosen[-1].position + spacing:
            chosen.append(Keyframe(position, pts))
    return tuple(chosen[1:])


def _missing_bytes(path: Path) -> str | None:
    """How much of a file is missing, by the size in its header (AVI, Matroska) or its end mark (GIF)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(128)
        file.seek(max(0, size - 16))
        tail = file.read()
    claimed = 0
    if head.startswith(b"RIFF"):
        claimed = int.from_bytes(head[4:8], "little") + 8
        if claimed - 8 in (0, 0xFFFFFFFF):  # unknown to the program that wrote it
            claimed = 0
    elif head.startswith(b"\x1a\x45\xdf\xa3") and (segment := head.find(b"\x18\x53\x80\x67")) > 0:
        width = 9 - head[segment + 4].bit_length()  # of the size field, told by its leading zeros
        field = int.from_bytes(head[segment + 4 : segment + 4 + width], "big")
        length = field & ((1 << 7 * width) - 1)
        if length != (1 << 7 * width) - 1:  # all ones: unknown
            claimed = segment + 4 + width + length
    elif head.startswith(b"GIF8") and not tail.rstrip(b"\0").endswith(b";"):
        return "the end mark of a GIF is missing"
    return f"it has {size} of {claimed} bytes" if claimed > size + 1 else None


def decode_video(
    path: Path, video_id: str, first: int, stop: int, step: int, probe: Probe | None = None
) -> Iterator[av.VideoFrame]:
    """Decode frames first, first + step, ... before `stop` of a video file, in presentation order.

    Args:
        probe: the file's entry in the index; without it, decoding begins at the start of the file.
    Yields:
        frames from the decoder, in the video's own size and pixel format.
    Raises:
        BrokenVideoError: decoding fails, the size changes, the video ends too early, or its frames contradict the
            index. Frames before `first` are checked only if they are decoded.
    """
    last = first + (stop - 1 - first) // step * step
    timestamps = {keyframe.position: keyframe.pts for keyframe in probe.keyframes} if probe else {}
    position = -1
    with contextlib.ExitStack() as stack:
        numbered, size = None, None
        if probe and (before := [keyframe for keyframe in probe.keyframes if keyframe.position <= first]):
            container = stack.enter_context(_open(path, video_id))
            numbered, size = frames_from(container, video_id, before[-1]), (probe.width, probe.height)
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
                        "split it into one file per size",
                    )
                # Frames are counted here, but numbered by their timestamps after seeking.
                if timestamps.get(position, frame.pts) != frame.pts:
                    raise BrokenVideoError(
                        video_id,
                        f"frame {position} has timestamp {frame.pts}, but its index expects {timestamps[position]}; "
                        "encode the video again",
                    )
                if position >= first and (position - first) % step == 0:
                    yield frame
                if position >= last:
                    return
        except av.error.FFmpegError as error:
            raise BrokenVideoError(video_id, f"cannot be decoded after frame {position} ({error.strerror})") from error
    raise BrokenVideoError(video_id, f"ends after {position + 1} frames, but its index expects frame {last}")


def frames_from(
    container: InputContainer, video_id: str, keyframe: Keyframe
) -> Iterator[tuple[int, av.VideoFrame]] | None:
    """Number and decode the frames of an open file from a keyframe on; None if seeking does not lead to it."""
    stream = _video_stream(container, video_id)
    try:
        container.seek(keyframe.pts, stream=stream)
        # Seeking may end at an earlier keyframe. Frames that are shown before this one may follow it, half decoded.
        frames = itertools.dropwhile(
            lambda frame: frame.pts is None or frame.pts < keyframe.pts, container.decode(stream)
        )
        found = next(frames, None)
    except av.error.FFmpegError:
        return None
    if found is None or found.pts != keyframe.pts or not found.key_frame:
        return None
    return enumerate(itertools.chain([found], frames), keyframe.position)
