"""Every kind of video that people have: frames, geometry and colors as FFmpeg shows them. The files are made here."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import av
import av.filter
import numpy as np
import pytest
from PIL import Image, ImageSequence

from stage1_autoencoder.videos import open_video
from stage1_autoencoder.videos.config import DatasetConfig, Fit
from tests.stage1_autoencoder.videos.conftest import fitted

SIDE = 32
SIZES = ((16, 32), (32, 16))
FITS = get_args(Fit)
EXACT = "flags=accurate_rnd+full_chroma_int+full_chroma_inp+bicubic"
# Levels by which colors may differ: chroma is interpolated before or after resizing, and pixels that are not square are
# cut at whole decoded pixels.
TOLERANCE = 2.0


def picture(number: int, width: int, height: int) -> np.ndarray:
    """A smooth picture [h, w, 3] whose four corners differ; its brightness tells its number, of 15 at most."""
    y, x = np.mgrid[:height, :width] / 100
    waves = [np.sin(3 * x + 2 * y), np.sin(4 * y - x), np.cos(2 * x - 3 * y)]
    return np.stack([60 + 8 * number + 18 * wave for wave in waves], -1).round().astype(np.uint8)


def pictures(count: int, width: int = 96, height: int = 64) -> list[np.ndarray]:
    return [picture(number, width, height) for number in range(count)]


def half_transparent(count: int, color: int = 255) -> list[np.ndarray]:
    """Pictures [h, w, 4] that fade out to the right; where they are transparent they have a color all the same."""
    faded = []
    for pixels in pictures(count):
        alpha = np.linspace(255, 0, pixels.shape[1]).round().astype(np.uint8)
        alpha = np.broadcast_to(alpha[None, :, None], (*pixels.shape[:2], 1))
        faded.append(np.concatenate([np.where(alpha == 0, np.uint8(color), pixels), alpha], -1))
    return faded


def write(
    path: Path,
    codec: str,
    frames: Sequence[np.ndarray],
    pixel_format: str = "yuv420p",
    rate: int = 25,
    aspect: Fraction | None = None,
    turn: dict[str, Any] | None = None,
    first: int = 0,
    color_range: int | None = None,
    colorspace: int | None = None,
    **options: str,
) -> None:
    """Encode frames, at times from `first` on, in the container of the file's extension."""
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if color_range is not None:
            stream.codec_context.color_range = color_range
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        if turn is not None:
            stream.set_display_rotation(**turn)
        for number, pixels in enumerate(frames, first):
            kind = {2: "gray", 3: "rgb24", 4: "rgba"}[pixels.shape[2] if pixels.ndim == 3 else 2]
            frame = av.VideoFrame.from_ndarray(pixels, kind)
            frame = frame.reformat(format=pixel_format, dst_color_range=color_range, dst_colorspace=colorspace)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def packets_of(path: Path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def copy_packets(source: Path, target: Path, change: Callable[[int, bytes], bytes | None]) -> None:
    """Copy a file packet by packet without decoding; `change` gives a packet's new bytes, or None to omit it."""
    with av.open(str(source)) as whole, av.open(str(target), "w") as container:
        copy = container.add_stream_from_template(whole.streams.video[0])
        packets = (packet for packet in whole.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            if (data := change(number, bytes(packet))) is not None:
                changed = av.Packet(data)
                changed.stream, changed.pts, changed.dts = copy, packet.pts, packet.dts
                changed.time_base, changed.is_keyframe = packet.time_base, packet.is_keyframe
                container.mux(changed)


def x264(**settings: int) -> dict[str, str]:
    settings = {"scenecut": 0, "min-keyint": 1, "threads": 1} | {k.replace("_", "-"): v for k, v in settings.items()}
    return {"x264-params": ":".join(f"{key}={value}" for key, value in settings.items())}


# asm=0: x265's assembler writes past its buffers where pictures are small.
X265 = "log-level=none:asm=0:pools=none:frame-threads=1:scenecut=0:keyint=8:min-keyint=8:bframes=3"


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the file or folder.
        make: writes it at the given path.
        frames: numbers of the pictures that are shown; every kind has them in order.
        size: (width, height) as shown.
        filters: what FFmpeg's filters have to do to show it.
        program: the FFmpeg program can read it, turned by its own rules.
        decoder: the name of FFmpeg's decoder that shows all of it, where it is not the one that FFmpeg takes.
    """

    title: str
    name: str
    make: Callable[[Path], None]
    frames: Sequence[int] = range(6)
    size: tuple[int, int] = (96, 64)
    filters: str = "null"
    program: bool = True
    decoder: str | None = None


KINDS: list[Kind] = []


def kind(title: str, name: str, codec: str, *, count: int = 6, size: tuple[int, int] = (96, 64), **settings) -> None:
    shown = {
        key: settings.pop(key) for key in ("frames", "shown_as", "filters", "program", "decoder") if key in settings
    }
    shown["size"] = shown.pop("shown_as", size)
    alpha = settings.pop("alpha", False)

    def make(path: Path) -> None:
        write(path, codec, half_transparent(count) if alpha else pictures(count, *size), **settings)

    KINDS.append(Kind(title, name, make, **{"frames": range(count)} | shown))


# Containers and codecs.
kind("H.264", "v.mp4", "libx264")
kind("H.264 with B-frames", "v.mp4", "libx264", count=12, **x264(keyint=6, bframes=3))
kind("H.264 in QuickTime", "v.mov", "libx264")
kind("H.264 in Flash", "v.flv", "libx264")
kind("H.264 in a transport stream", "v.ts", "libx264", **x264(bframes=2))
kind("H.264 of a camcorder", "v.mts", "libx264", **x264(bframes=2, tff=1))
kind("HEVC", "v.mkv", "libx265", **{"x265-params": X265})
kind("VP8", "v.webm", "libvpx", deadline="realtime")
kind("VP9", "v.webm", "libvpx-vp9", deadline="realtime")
kind("AV1", "v.mkv", "libsvtav1", preset="12")
kind("MPEG-4", "v.m4v", "mpeg4")
kind("MPEG-4 in AVI", "v.avi", "mpeg4", bf="2")
kind("Microsoft MPEG-4", "v.avi", "msmpeg4v2")
kind("Windows Media", "v.wmv", "wmv2")
kind("Windows Media 1", "v.asf", "wmv1")
kind("Flash video", "v.flv", "flv")
kind("VP8 in Ogg", "v.ogv", "libvpx", deadline="realtime")
kind("MPEG-1", "v.mpg", "mpeg1video", bf="2")
kind("MPEG-2", "v.mpeg", "mpeg2video", bf="2")
kind("MPEG-2 of a DVD", "v.vob", "mpeg2video", bf="2")
kind("MPEG-2 in a Blu-ray stream", "v.m2ts", "mpeg2video")
kind("MPEG-2 in MXF", "v.mxf", "mpeg2video")
kind("H.263 of an old phone", "v.3gp", "h263", size=(176, 144), shown_as=(192, 144))
kind("Motion JPEG", "v.avi", "mjpeg", pixel_format="yuvj420p")
kind("raw frames", "v.y4m", "wrapped_avframe")
kind("raw RGB", "v.avi", "rawvideo", pixel_format="bgr24")
kind("FFV1", "v.mkv", "ffv1", pixel_format="bgr0")

# Which way up.
TURNS = {
    "turned by 90 degrees": ({"degrees": 90}, "transpose=cclock", True),
    "turned by 180 degrees": ({"degrees": 180}, "hflip,vflip", False),
    "turned by 270 degrees": ({"degrees": -90}, "transpose=clock", True),
    "mirrored": ({"degrees": 0, "hflip": True}, "hflip", False),
    "upside down": ({"degrees": 0, "vflip": True}, "vflip", False),
    "turned by 90 degrees and mirrored": ({"degrees": 90, "hflip": True}, "transpose=cclock,hflip", True),
    "turned by 270 degrees and mirrored": ({"degrees": -90, "hflip": True}, "transpose=clock,hflip", True),
}
for title, (turn, filters, sideways) in TURNS.items():
    kind(title, "v.mp4", "libx264", turn=turn, filters=filters, shown_as=(64, 96) if sideways else (96, 64))
    # The square is cut at an odd offset, from the left and the top of what is shown.
    odd = {"size": (85, 50), "shown_as": (50, 85) if sideways else (85, 50)}
    kind(f"{title}, odd size", "v.mov", "png", pixel_format="rgb24", turn=turn, filters=filters, **odd)
kind("HEVC of a phone", "v.mov", "libx265", turn={"degrees": -90}, filters="transpose=clock", shown_as=(64, 96),
     **{"x265-params": X265})  # fmt: skip

# Pixels that are not square.
kind("wide pixels", "v.mp4", "libx264", aspect=Fraction(16, 15), shown_as=(102, 64))
kind("very wide pixels", "v.mkv", "libx264", size=(72, 64), aspect=Fraction(2), shown_as=(144, 64))
kind("narrow pixels", "v.mp4", "libx264", aspect=Fraction(8, 9), shown_as=(85, 64))
kind("narrow pixels, higher than wide", "v.avi", "mpeg4", size=(96, 80), aspect=Fraction(1, 2), shown_as=(48, 80))
kind("wide pixels of MPEG-2", "v.mpg", "mpeg2video", size=(64, 60), aspect=Fraction(5, 4), shown_as=(80, 60))
kind("wide pixels, turned", "v.mp4", "libx264", aspect=Fraction(4, 3), turn={"degrees": 90}, shown_as=(64, 128),
     filters="transpose=cclock")  # fmt: skip

# Colors.
kind("10 bits", "v.mp4", "libx264", pixel_format="yuv420p10le")
kind("10 bits of HEVC", "v.mp4", "libx265", pixel_format="yuv420p10le", **{"x265-params": X265})
kind("ProRes, 10 bits", "v.mov", "prores_ks", pixel_format="yuv422p10le")
kind("4:2:2", "v.mkv", "libx264", pixel_format="yuv422p")
kind("4:4:4", "v.mkv", "libx264", pixel_format="yuv444p")
kind("full range", "v.mp4", "libx264", color_range=2)
kind("limited range", "v.mp4", "libx264", color_range=1)
kind("BT.709", "v.mp4", "libx264", colorspace=1, color_range=1)
kind("BT.709, full range", "v.mkv", "libx264", colorspace=1, color_range=2)
kind("BT.2020, 10 bits", "v.mkv", "libx264", pixel_format="yuv420p10le", colorspace=9, color_range=1)
kind("grey", "v.mkv", "ffv1", pixel_format="gray")
kind("grey, 16 bits", "v.mkv", "ffv1", pixel_format="gray16le")
kind("RGB, 16 bits", "v.mov", "png", pixel_format="rgb48be")
kind("transparent", "v.mov", "qtrle", pixel_format="argb", alpha=True)
kind("transparent PNG", "v.mov", "png", pixel_format="rgba", alpha=True)
kind("transparent YUV, 10 bits", "v.mov", "prores_ks", pixel_format="yuva444p10le", alpha=True)
kind("transparent YUV, limited range", "v.mkv", "ffv1", pixel_format="yuva420p", alpha=True)
kind("transparent VP9", "v.webm", "libvpx-vp9", pixel_format="yuva420p", alpha=True, decoder="libvpx-vp9",
     deadline="realtime", crf="4", b="0")  # fmt: skip
kind("transparent VP8", "v.webm", "libvpx", pixel_format="yuva420p", alpha=True, decoder="libvpx",
     deadline="realtime", crf="4", b="2M", **{"auto-alt-ref": "0"})  # fmt: skip
kind("animated PNG", "v.apng", "apng", pixel_format="rgb24")
kind("animated PNG, transparent", "v.apng", "apng", pixel_format="rgba", alpha=True)


def saved_by_pillow(frames: Callable[[], list[np.ndarray]], **options: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        first, *others = (Image.fromarray(pixels) for pixels in frames())
        first.save(path, save_all=True, append_images=others, duration=40, **options)

    return make


def cut_out_circle() -> list[np.ndarray]:
    """Pictures [h, w, 4] with a sharp edge, since pixels of a GIF are either opaque or transparent."""
    y, x = np.mgrid[:64, :96]
    inside = ((x - 40) ** 2 + (y - 30) ** 2 < 500)[..., None]
    return [np.concatenate([pixels, np.uint8(255) * inside], -1) for pixels in pictures(6)]


KINDS += [
    Kind("GIF", "v.gif", saved_by_pillow(lambda: pictures(6))),
    Kind("GIF, transparent", "v.gif", saved_by_pillow(cut_out_circle, disposal=2)),
    Kind("animated WebP", "v.webp", saved_by_pillow(lambda: pictures(6), lossless=True), program=False),
    Kind(
        "animated WebP, transparent",
        "v.webp",
        saved_by_pillow(lambda: half_transparent(6), lossless=True),
        program=False,
    ),
]


def without_first(count: int, name: str, codec: str, first: int, **settings: Any) -> Callable[[Path], None]:
    """A file that was cut behind its first packets, without decoding."""

    def make(path: Path) -> None:
        whole = path.with_name(f"whole_{name}")
        write(whole, codec, pictures(count), **settings)
        keys = [number for number, packet in enumerate(packets_of(whole)) if packet.is_keyframe]
        start = keys[1] + first
        copy_packets(whole, path, lambda number, data: data if number >= start else None)

    return make


def hidden(path: Path) -> None:
    """VP8 with frames that are not to be shown, as its encoder makes them to predict others from."""
    write(path.with_name("shown.webm"), "libvpx", pictures(6), deadline="realtime", **{"lag-in-frames": "0"})
    hide = lambda number, data: bytes([data[0] & ~0x10]) + data[1:] if number in (2, 4) else data  # noqa: E731
    copy_packets(path.with_name("shown.webm"), path, hide)


def not_coded(path: Path) -> None:
    """MPEG-4 with packets that say that nothing changed, as programs write them for frames that came too late."""
    write(path.with_name("coded.avi"), "mpeg4", pictures(6))
    # Start code, P-VOP, no whole seconds, marker, time, marker, not coded. The time has 5 bits for 25 steps per second.
    bits = "01" + "0" + "1" + "00011" + "1" + "0" + "01111"
    nothing = b"\0\0\1\xb6" + int(bits, 2).to_bytes(2, "big")
    copy_packets(path.with_name("coded.avi"), path, lambda number, data: nothing if number in (2, 4) else data)


def empty(path: Path) -> None:
    """Empty packets, which repeat a frame, as Theora has them; of the formats that we can write, NUT keeps them."""
    write(path.with_name("full.nut"), "mjpeg", pictures(6), pixel_format="yuvj420p", qmin="1", qmax="2")
    change = lambda number, data: b"" if number in (1, 4) else data  # noqa: E731
    copy_packets(path.with_name("full.nut"), path.with_suffix(".nut"), change)
    path.with_suffix(".nut").rename(path)


def trimmed(path: Path) -> None:
    """An edit list that begins to play at the third frame, as trimming without encoding does."""
    whole = path.with_name("whole.mp4")
    write(whole, "libx264", pictures(9), **x264(keyint=20, bframes=2))
    options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    with av.open(str(whole)) as source, av.open(str(path), "w", options=options) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                shift = int(Fraction(3, 25) / stream.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                container.mux(packet)


OPEN = x264(keyint=6, bframes=2, b_adapt=0, open_gop=1)
MPEG2 = {"bf": "2", "g": "6", "qmin": "1", "qmax": "2"}
OPEN_265 = {"x265-params": f"{X265}:open-gop=1"}
KINDS += [
    Kind("VP8 with hidden frames", "v.webm", hidden, [0, 1, 3, 5]),
    Kind("MPEG-4 with frames that are not coded", "v.avi", not_coded, [0, 1, 3, 5]),
    Kind("empty packets", "v.ogv", empty, [0, 2, 3, 5]),
    Kind("edit list", "v.mp4", trimmed, range(3, 9)),
    Kind("open groups, cut", "v.mkv", without_first(15, "v.mkv", "libx264", 0, **OPEN), range(6, 15)),
    Kind("open groups, cut, MP4", "v.mp4", without_first(15, "v.mp4", "libx264", 0, **OPEN), range(6, 15)),
    Kind("open groups, cut, stream", "v.ts", without_first(15, "v.ts", "libx264", 0, **OPEN), range(6, 15)),
    Kind("open groups of HEVC, cut", "v.mkv", without_first(15, "v.mkv", "libx265", 0, **OPEN_265), range(8, 15)),
    Kind("open groups of MPEG-2, cut", "v.mpg", without_first(15, "v.mpg", "mpeg2video", 0, **MPEG2), range(3, 15)),
    Kind("cut anywhere, stream", "v.ts", without_first(15, "v.ts", "libx264", -2, **x264(keyint=6)), range(6, 15)),
]  # fmt: skip


def frame_folder(save: Callable[[Path, np.ndarray], None], **settings: Any) -> dict[str, Any]:
    def make(path: Path) -> None:
        path.mkdir()
        for number, pixels in enumerate(pictures(6)):
            save(path / f"{number}", pixels)

    return {"name": "v", "make": make} | settings


# Subsampled chroma is interpolated differently by Pillow and by FFmpeg.
BEST_JPEG = {"quality": 100, "subsampling": 0}


def as_picture(mode: str, suffix: str, **options: Any) -> Callable[[Path, np.ndarray], None]:
    return lambda path, pixels: Image.fromarray(pixels).convert(mode).save(path.with_suffix(suffix), **options)


def save_turned(orientation: int, path: Path, pixels: np.ndarray) -> None:
    """A picture that is stored as a camera held otherwise stores it, with the tag that turns it back."""
    stored = {2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1)}
    stored |= {6: np.rot90(pixels, 1), 7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(path.with_suffix(".jpg"), exif=exif, **BEST_JPEG)


def save_faded(mode: str, path: Path, pixels: np.ndarray) -> None:
    alpha = np.broadcast_to(np.linspace(255, 0, pixels.shape[1]).astype(np.uint8), pixels.shape[:2])
    Image.fromarray(np.dstack([pixels, alpha])).convert(mode).save(path.with_suffix(".png"))


def save_16_bits(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path.with_suffix(".png"))


def save_cut_out_palette(path: Path, pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels).quantize(64)
    image.save(path.with_suffix(".png"), transparency=bytes(range(0, 256, 4)))


KINDS += [
    Kind("grey PNG", **frame_folder(as_picture("L", ".png"))),
    Kind("PNG with a palette", **frame_folder(as_picture("P", ".png"))),
    Kind("PNG with a transparent palette", **frame_folder(save_cut_out_palette)),
    Kind("PNG, 16 bits", **frame_folder(save_16_bits)),
    Kind("transparent PNG frames", **frame_folder(lambda *args: save_faded("RGBA", *args))),
    Kind("transparent grey PNG", **frame_folder(lambda *args: save_faded("LA", *args))),
    Kind("JPEG", **frame_folder(as_picture("RGB", ".jpg", **BEST_JPEG))),
    Kind("grey JPEG", **frame_folder(as_picture("L", ".jpg", quality=100))),
    Kind("CMYK JPEG", **frame_folder(as_picture("CMYK", ".jpg", **BEST_JPEG))),
    *(
        Kind(
            f"JPEG with EXIF orientation {number}",
            **frame_folder(lambda *args, number=number: save_turned(number, *args), program=False),
        )
        for number in range(2, 9)
    ),
]


def over_black(rgba: np.ndarray) -> np.ndarray:
    return rgba[..., :3] * (rgba[..., 3:] / 255)


def shown_by_libraries(kind: Kind, path: Path) -> list[np.ndarray]:
    """All frames [h, w, 3] as FFmpeg's filters show them, told how to turn; without our own reading of files."""
    if path.suffix == ".webp":
        with Image.open(path) as image:
            return [over_black(np.asarray(frame.convert("RGBA"))) for frame in ImageSequence.Iterator(image)]
    if path.is_dir():
        return [shown_picture(file) for file in sorted(path.iterdir())]
    width, height = kind.size
    graph, frames = None, []
    with av.open(str(path)) as container:
        decoder = (
            av.CodecContext.create(kind.decoder, "r") if kind.decoder else container.streams.video[0].codec_context
        )
        for packet in container.demux(video=0):
            try:
                decoded = decoder.decode(packet)
            except (av.error.InvalidDataError, av.error.ArgumentError):  # cut streams and empty packets
                continue
            for frame in decoded:
                if graph is None:
                    graph = av.filter.Graph()
                    tags = f"colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
                    size = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}"
                    source = graph.add("buffer", f"{size}:time_base=1/1:{tags}")
                    steps = [step.partition("=") for step in kind.filters.split(",")]
                    steps += [("scale", "", f"{width}:{height}:{EXACT}"), ("format", "", "rgba")]
                    nodes = [
                        graph.add(name, arguments) if arguments else graph.add(name) for name, _, arguments in steps
                    ]
                    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
                graph.push(frame)
                frames.append(over_black(graph.pull().to_ndarray()))
    return frames


def shown_picture(path: Path) -> np.ndarray:
    """A picture [h, w, 3] on black: EXIF by hand, since the filters do not know it; the rest by FFmpeg's decoders."""
    with Image.open(path) as image:
        orientation = image.getexif().get(0x0112, 1)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    pixels = over_black(frame.reformat(format="rgba").to_ndarray())
    back = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1)}
    back |= {6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels, 1)}
    return back[orientation]


def shown_by_program(kind: Kind, path: Path) -> list[np.ndarray]:
    """All frames [h, w, 3] as the FFmpeg program shows them, turned by its own rules."""
    width, height = kind.size
    files = str(path / f"%d{next(path.iterdir()).suffix}") if path.is_dir() else str(path)
    decoder = ["-c:v", kind.decoder] if kind.decoder else []
    command = ["ffmpeg", "-v", "error", *decoder, "-i", files, "-map", "0:v:0", "-vsync", "passthrough"]
    command += ["-vf", f"scale={width}:{height}:{EXACT},format=rgba", "-f", "rawvideo", "-"]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return [over_black(rgba) for rgba in np.frombuffer(output, np.uint8).reshape(-1, height, width, 4)]


def steps_of(squares: Sequence[np.ndarray]) -> list[int]:
    """By how many pictures each frame is ahead of the one before, by its brightness."""
    return np.diff([square.mean() / 8 for square in squares]).round().astype(int).tolist()


@pytest.mark.parametrize("kind", [pytest.param(kind, id=f"{kind.title} ({kind.name})") for kind in KINDS])
def test_frames_geometry_and_colors_are_those_of_ffmpeg(tmp_path, kind):
    """Against the libraries that we read files with, and against the FFmpeg program where one is installed."""
    path = tmp_path / kind.name
    kind.make(path)
    turn = KINDS.index(kind)  # squares, and one of six other ways to fit
    ways: list[tuple[tuple[int, int], Fit]] = [((SIDE, SIDE), "crop"), (SIZES[turn % 2], FITS[turn % 3])]
    datasets = [DatasetConfig(name="mine", source="videos", image_size=list(size), fit=fit) for size, fit in ways]
    source, other = (open_video(dataset, path) for dataset in datasets)
    (video,) = source.videos
    assert (video.frames, video.size) == (len(kind.frames), kind.size)
    frames = list(source.iterate(0))
    if "transparent" not in kind.title:
        assert steps_of(frames) == np.diff(kind.frames).tolist()
    judges = [shown_by_libraries]
    if kind.program and shutil.which("ffmpeg"):
        judges.append(shown_by_program)
    for judge in judges:
        right = judge(kind, path)
        assert len(frames) == len(right)
        for (frame_size, fit), found in zip(ways, (frames, list(other.iterate(0))), strict=True):
            for ours, theirs in zip(found, right, strict=True):
                assert np.abs(ours - fitted(theirs, frame_size, fit)).max() <= TOLERANCE, (frame_size, fit)
