"""One video file, through PyAV: counting its frames without decoding them, and decoding them in order."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from stage1_autoencoder.videos.base import BrokenVideoError

VIDEO_EXTENSIONS = frozenset({".mp4", ".avi", ".mov", ".webm", ".gif", ".mkv"})

# For videos that do not tell their frame rate; it sets no more than the speed at which previews play.
UNKNOWN_FPS = 10.0


@dataclass(frozen=True)
class Probe:
    """What the index keeps of a video: frames (before `frame_step`), frames a second, native size in pixels."""

    frames: int
    fps: float
    width: int
    height: int


def _open(path: Path, video_id: str) -> InputContainer:
    try:
        # Tags in odd encodings say nothing about frames.
        return av.open(os.path.abspath(path), metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:
        raise BrokenVideoError(video_id, f"cannot be opened as a video ({error.strerror})") from error


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
        try:
            for packet in container.demux(stream):
                if packet.size > 0:  # the last one is empty and flushes the decoder
                    packets += 1
                    shown += not packet.is_discard
                    if packet.is_corrupt:
                        raise BrokenVideoError(video_id, f"is cut off or damaged at frame {packets}")
                if first is None:
                    first = next(iter(packet.decode()), None)
        except av.error.FFmpegError as error:
            raise BrokenVideoError(video_id, f"is damaged after {packets} frames ({error.strerror})") from error
        if first is None:
            raise BrokenVideoError(video_id, "has no frame that can be decoded")
        in_mp4_table = stream.frames if "mp4" in container.format.name else 0
        if packets < in_mp4_table:
            raise BrokenVideoError(video_id, f"is cut off: {packets} of its {in_mp4_table} frames are there")
        rate = float(stream.average_rate or stream.guessed_rate or UNKNOWN_FPS)
    if missing := _missing_bytes(path):
        raise BrokenVideoError(video_id, f"is cut off: {missing}")
    return Probe(shown, rate, first.width, first.height)


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


def decode_video(path: Path, video_id: str, first: int, stop: int, step: int) -> Iterator[av.VideoFrame]:
    """Decode frames first, first + step, ... before `stop` of a video file, in presentation order.

    Yields:
        frames as the decoder made them, in the video's own size and pixel format.
    Raises:
        BrokenVideoError: decoding fails, the size changes on the way, or the video ends too early.
    """
    last = first + (stop - 1 - first) // step * step
    position = -1
    with _open(path, video_id) as container:
        stream = _video_stream(container, video_id)
        size = None
        try:
            for position, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:
                    raise BrokenVideoError(video_id, f"frame {position} is damaged")
                if (frame.width, frame.height) != (size := size or (frame.width, frame.height)):
                    raise BrokenVideoError(
                        video_id,
                        f"changes from {size[0]}x{size[1]} to {frame.width}x{frame.height} at frame {position}; "
                        "cut it into one file a size",
                    )
                if position >= first and (position - first) % step == 0:
                    yield frame
                if position >= last:
                    return
        except av.error.FFmpegError as error:
            raise BrokenVideoError(video_id, f"cannot be decoded after frame {position} ({error.strerror})") from error
    raise BrokenVideoError(video_id, f"ends after {position + 1} frames, but frame {last} was expected by its index")
