"""Video files, through PyAV: counting frames, and decoding frames in order.

The number of frames is that of the decoder. Where each packet is known to give one frame, or to give none, packets are
counted; other files are decoded once, for the index (see `gives_frames`).

Decoding starts at a keyframe close to the first requested frame if this gives, bit for bit, the same frames as decoding
from the start of the file. `can_restart` and `choose_keyframes` have the conditions. If one of them is not met, or if
seeking leads elsewhere, decoding begins at the start of the file.
"""

import contextlib
import hashlib
import itertools
import os
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from stage1_autoencoder.videos.display import AS_STORED, Display
from stage1_autoencoder.videos.source import (
    MOST_PIXELS,
    UNKNOWN_FPS,
    BrokenVideoError,
    UnreadableVideoError,
    is_of_the_system,
    plausible_rate,
)

VIDEO_EXTENSIONS = frozenset(
    ".mp4 .m4v .mov .3gp .mkv .webm .avi .wmv .asf .flv .ogv .mpg .mpeg .vob .ts .mts .m2ts .mxf .y4m "
    ".gif .apng .webp".split()
)

SINGLE_PICTURE = "a single picture; put the frames of a video into a folder of its own, as .png or .jpg"

# What FFmpeg may open: containers that hold their frames, no playlists (concat, HLS, DASH, SDP) that name other files;
# raw streams; and single pictures, to say what they are.
_FORMATS = (
    "mov,matroska,avi,asf,flv,ogg,mpeg,mpegts,mxf,yuv4mpegpipe,gif,apng,nut,ivf,dv,"
    "mpegvideo,m4v,h264,hevc,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"
)
_LIMITS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file", "max_pixels": str(MOST_PIXELS)}

# Smallest distance of the keyframes in the index, so that short videos have none and long ones a short list.
KEYFRAME_SPACING = 64

# Containers whose demuxer finds the same packets with the same timestamps after seeking.
_SEEKABLE = frozenset({"mov", "matroska"})

# Codecs, beside intra-only ones, of which each packet gives one frame if all before it were decoded.
_ONE_FRAME_EACH = frozenset({"h264", "hevc", "av1", "gif", "apng", "png", "ffv1"})

# Bytes of the largest packet of MPEG-4 part 2 that may say that nothing is coded: 9, and 7 for the header of a group.
# A picture needs a bit for each of its blocks of 16x16, and so 19 bytes at 160x120.
_NOT_CODED_BYTES = 16


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
        width, height: size of the decoded frames in pixels.
        keyframes: those at which decoding may start, in order; none where this may not be exact.
        display: how the frames are shown.
    """

    frames: int
    fps: float
    width: int
    height: int
    keyframes: tuple[Keyframe, ...] = ()
    display: Display = AS_STORED


def _open(path: Path, video_id: str) -> InputContainer:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise BrokenVideoError(video_id, "cannot be opened as a video (not a regular file, but a pipe or device)")
        # Metadata in unknown encodings does not affect frames.
        return av.open(os.path.abspath(path), options=_LIMITS, metadata_errors="ignore")
    except (av.error.FFmpegError, OSError) as error:
        if isinstance(error, av.error.InvalidDataError) and _begins_as_mp4(path):
            reason = "cannot be opened as a video: it begins as an mp4, but its index is missing, so it is cut off"
            raise BrokenVideoError(video_id, reason) from error
        raise _failure(path, video_id, f"cannot be opened as a video ({error.strerror})", error) from error


def _failure(path: Path, video_id: str, reason: str, error: Exception) -> BrokenVideoError:
    """FFmpeg's error as ours. It has the system's numbers for damaged files, too: only those count that reading gives.

    Args:
        reason: if the bytes are to blame.
    """
    if is_of_the_system(error):
        try:
            with path.open("rb") as file:
                while file.read(1 << 20):
                    pass
        except OSError as unreadable:
            return UnreadableVideoError.of(video_id, unreadable)
    return BrokenVideoError(video_id, reason)


def _begins_as_mp4(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == b"ftyp"
    except OSError:
        return False


def _video_stream(container: InputContainer, video_id: str) -> VideoStream:
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:  # the cover of a piece of music
        raise BrokenVideoError(video_id, "has no video stream")
    if stream.codec_context is None:
        raise BrokenVideoError(video_id, "uses a codec that this build of FFmpeg cannot decode")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MOST_PIXELS:
        raise BrokenVideoError(video_id, f"has frames of {width}x{height}, more than {MOST_PIXELS} pixels")
    stream.codec_context.options = {"max_pixels": _LIMITS["max_pixels"]}
    # Measured: threads that decode ahead halve the rate at 160x120 and gain nothing up to 1280x720.
    stream.codec_context.thread_count = 1
    return stream


def probe_video(path: Path, video_id: str, keyframe_spacing: int = KEYFRAME_SPACING) -> Probe:
    """Count the frames of a video file by reading its packets; it is decoded only if these do not tell.

    Frame counts in headers are ignored, because they can be wrong.

    Args:
        keyframe_spacing: smallest distance of the keyframes in the result, in frames.
    Raises:
        BrokenVideoError: not a video, no video stream, no frame that decodes, damaged, or cut off.
    """
    with _open(path, video_id) as container:
        stream = _video_stream(container, video_id)
        if container.format.name.endswith("_pipe"):
            raise BrokenVideoError(video_id, f"is {SINGLE_PICTURE}")
        decoder = _decoder(stream)
        codec, extradata = decoder.codec, decoder.extradata or b""
        packets, first, begun = 0, None, False
        frames: int | None = 0  # None: unknown until they are decoded
        timestamps: list[int | None] = []
        restarts: list[int | None] = []
        steady = not _SEEKABLE.isdisjoint(container.format.name.split(",")) and decoder is stream.codec_context
        try:
            for packet in container.demux(stream):
                if packet.size > 0:  # the last one is empty and flushes the decoder
                    packets += 1
                    begun = begun or packet.is_keyframe
                    if begun and packet.is_corrupt:
                        raise BrokenVideoError(video_id, f"is cut off or damaged at frame {packets}")
                    given = gives_frames(codec, extradata, packet, first=packets == 1)
                    frames = None if frames is None or given is None else frames + given
                    # Seeking may skip edits, and new parameters for the decoder.
                    steady = steady and given == 1 and not packet.has_sidedata("new_extradata")
                    timestamps.append(packet.pts)
                    if steady and packet.is_keyframe and can_restart(codec, extradata, packet):
                        restarts.append(packet.pts)
                if first is None:
                    first = next(iter(_decode(decoder, packet, begun)), None)
        except av.error.FFmpegError as error:
            raise _failure(path, video_id, f"is damaged after {packets} frames ({error.strerror})", error) from error
        if first is None:
            raise BrokenVideoError(video_id, "has no frame that can be decoded")
        rate = plausible_rate(float(stream.average_rate or stream.guessed_rate or UNKNOWN_FPS))
        display = Display.of(stream, first)
    if missing := _missing_bytes(path):
        raise BrokenVideoError(video_id, f"is cut off: {missing}")
    if first.interlaced_frame:  # a field may have a packet of its own
        frames = None
    keyframes = choose_keyframes(timestamps, restarts, keyframe_spacing) if steady and frames is not None else ()
    if frames is None:
        frames = _count_decoded(path, video_id)
    return Probe(frames, rate, first.width, first.height, keyframes, display)


def digest_cuts(path: Path, video_id: str, stops: Collection[int], probe: Probe) -> dict[int, str]:
    """sha256 (hexadecimal), by stop, of all that the frames before it are decoded from.

    These are the packets up to that of the last such frame. What LeRobot appends to a file comes behind them, and so
    changes no earlier cut.

    Returns:
        nothing for stops behind the end, and none at all if it is unknown which packet gives which frame.
    Raises:
        BrokenVideoError: as `probe_video`.
    """
    with _open(path, video_id) as container:
        stream = _video_stream(container, video_id)
        codec, packets = stream.codec_context, list[tuple[int | None, bytes]]()
        try:
            for packet in container.demux(stream):
                if packet.size > 0:
                    packets.append((packet.pts, hashlib.sha256(packet).digest()))
        except av.error.FFmpegError as error:
            reason = f"is damaged after {len(packets)} frames ({error.strerror})"
            raise _failure(path, video_id, reason, error) from error
        shown = (codec.name, codec.colorspace, codec.color_range, probe.display, codec.extradata)
    times = [pts for pts, _ in packets if pts is not None]
    if len(set(times)) != probe.frames or len(packets) != probe.frames:
        return {}
    running, done, digests = hashlib.sha256(repr(shown).encode()), 0, dict[int, str]()
    # Packets, counted from the first one in the file, that the first 1, 2, 3 ... shown frames take.
    needed = (1 + np.maximum.accumulate(np.argsort(times))).tolist()
    for stop in sorted(stop for stop in stops if 1 <= stop <= probe.frames):
        running.update(b"".join(digest for _, digest in packets[done : needed[stop - 1]]))
        done, digests[stop] = needed[stop - 1], running.copy().hexdigest()
    return digests


def gives_frames(codec: av.Codec, extradata: bytes, packet: av.Packet, first: bool) -> int | None:
    """How many frames the decoder gives for a packet after all before it, 0 or 1; None if only decoding tells.

    Hidden frames of VP8 (alternate references) give none. Nothing is said about pictures that may refer to missing ones
    (a start that is no instantaneous refresh, leading pictures of a broken link), packets of MPEG-4 part 2 that are so
    small that nothing may be coded in them, packets that are not to be shown (edit lists), and all other codecs.

    Args:
        first: it is the first packet of the file.
    """
    name = codec.canonical_name
    if packet.is_discard:
        return None
    if codec.intra_only:
        return 1
    if first and not packet.is_keyframe:
        return None
    if name in ("h264", "hevc") and packet.is_keyframe:
        kinds = _slice_kinds(name, extradata, packet)
        if kinds & _BROKEN_LINKS[name] or (first and not (kinds and kinds <= _REFRESHES[name])):
            return None
    if name in _ONE_FRAME_EACH:
        return 1
    data = memoryview(packet)
    if name == "vp8":
        return data[0] >> 4 & 1
    if name == "vp9":
        # Several frames in one packet, of which one is shown, have an index at the end. Of a single one, bit 3 shows an
        # earlier frame, and bit 1 this one; profile 3, with both bits of 0x30 set, has another bit before them.
        several, shown = data[-1] & 0xE0 == 0xC0, data[0] & 0x30 != 0x30 and data[0] & 0x0A
        return 1 if several or shown else None
    if name == "mpeg4":
        return 1 if packet.size > _NOT_CODED_BYTES else None
    return None


def _count_decoded(path: Path, video_id: str) -> int:
    with _open(path, video_id) as container:
        frames = 0
        try:
            for _ in _decoded(container, _video_stream(container, video_id)):
                frames += 1
        except av.error.FFmpegError as error:
            raise _failure(path, video_id, f"is damaged after {frames} frames ({error.strerror})", error) from error
        return frames


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """All frames of an open file, in presentation order."""
    decoder, begun = _decoder(stream), False
    for packet in container.demux(stream):
        begun = begun or packet.is_keyframe
        yield from _decode(decoder, packet, begun)


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """The decoder of a stream; of transparent VP8 and VP9 that of libvpx, since FFmpeg's own ignores transparency."""
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.codec.canonical_name)
    if name not in av.codecs_available or stream.metadata.get("alpha_mode") != "1":
        return stream.codec_context
    decoder = av.CodecContext.create(name, "r")
    decoder.options = {"max_pixels": _LIMITS["max_pixels"]}
    decoder.thread_count = 1
    return decoder


def _decode(decoder: VideoCodecContext, packet: av.Packet, begun: bool) -> list[av.VideoFrame]:
    """Decode a packet. Before the first keyframe some cannot be, where a file was cut out of another."""
    if packet.size == 0 and packet.dts is not None:  # Theora repeats a frame; the last packet flushes the decoder
        return []
    try:
        return decoder.decode(packet)
    except av.error.InvalidDataError:
        if begun:
            raise
        return []


def can_restart(codec: av.Codec, extradata: bytes, packet: av.Packet | bytes) -> bool:
    """Whether no frame that is shown from this keyframe on depends on an earlier packet.

    This holds for the keyframes of VP9 and AV1, and for all frames of intra-only codecs. The keyframes of H.264 and
    HEVC have to be parsed, because recovery points are flagged too. Codecs with other state than pictures, or with
    packets without a picture (MPEG-4 part 2, VP8), never qualify.

    Args:
        extradata: the configuration of the decoder, from the container.
        packet: the keyframe, or its bytes.
    """
    name = codec.canonical_name
    if name in ("vp9", "av1") or codec.intra_only:
        return True
    kinds = _slice_kinds(name, extradata, packet)
    return bool(kinds) and kinds <= _ACCESS_POINTS[name]


# Kinds of slices from which decoding can start. H.264: of instantaneous refreshes. HEVC: of random access points;
# pictures that depend on earlier ones are shown before it, and pictures that are shown after it refer to neither.
_ACCESS_POINTS = {"h264": frozenset({5}), "hevc": frozenset(range(16, 22))}
# Those that are followed by no picture which depends on earlier ones; and those where such pictures are dropped.
_REFRESHES = {"h264": frozenset({5}), "hevc": frozenset({19, 20})}
_BROKEN_LINKS = {"h264": frozenset[int](), "hevc": frozenset({16, 17, 18})}


def _slice_kinds(name: str, extradata: bytes, packet: av.Packet | bytes) -> frozenset[int]:
    """The kinds of slices in a packet of H.264 or HEVC as mp4 has them; none if they are not known."""
    # Each unit of the stream follows its size; the decoder's configuration has the number of bytes of the size.
    if name == "h264" and len(extradata) > 6 and extradata[0] == 1:
        kinds = (unit[0] & 31 for unit in _units(memoryview(packet), (extradata[4] & 3) + 1))
        return frozenset(kind for kind in kinds if 1 <= kind <= 5)
    if name == "hevc" and len(extradata) > 22 and extradata[0] == 1:
        kinds = (unit[0] >> 1 & 63 for unit in _units(memoryview(packet), (extradata[21] & 3) + 1))
        return frozenset(kind for kind in kinds if kind < 32)
    return frozenset()


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
    """How much of a file is missing, by the sizes of its parts (AVI, Matroska, mp4) or its end mark (GIF)."""
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
    elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        claimed = _mp4_bytes(path)
    return f"it has {size} of {claimed} bytes" if claimed > size + 1 else None


def _mp4_bytes(path: Path) -> int:
    """Where the last box of an mp4 file ends that has frames or tells where they are."""
    end = at = 0
    with path.open("rb") as file:
        while len(header := file.read(16)) >= 8 and header[4:8].isalnum():
            size = int.from_bytes(header[:4], "big")
            if size == 1:
                size = int.from_bytes(header[8:], "big")
            if size < 8:  # 0: up to the end of the file
                break
            at += size
            if header[4:8] in (b"moov", b"moof", b"mdat"):
                end = at
            file.seek(at)
    return end


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
            numbered, size = enumerate(_decoded(container, _video_stream(container, video_id))), None
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
            reason = f"cannot be decoded after frame {position} ({error.strerror})"
            raise _failure(path, video_id, reason, error) from error
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
