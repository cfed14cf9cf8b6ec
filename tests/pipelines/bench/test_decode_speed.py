"""What decoding is measured on and against: videos of the kind that is said, the same frames, the best bare rate."""

import dataclasses
from pathlib import Path

import av
import pytest

from pipelines.bench import decode_speed as bench_decode
from pipelines.bench.decode_speed import KINDS, Kind, decode_measurements
from stage1_autoencoder.videos import open_source

SMALL = Kind("mpeg4", 64, 48, frames=20, videos=2, image_size=32, frame_step=3)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(bench_decode, "REPEATS", 1)


@pytest.mark.parametrize("kind", [SMALL, dataclasses.replace(SMALL, codec="h264")], ids=["mpeg4", "h264"])
def test_videos_are_of_the_kind_and_move(kind: Kind, tmp_path: Path) -> None:
    paths = bench_decode.write_videos(tmp_path / "train", kind, 3)
    assert len({path.read_bytes() for path in paths}) == 1
    with av.open(str(paths[0])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.codec.canonical_name, stream.width, stream.height) == (kind.codec, 64, 48)
    source = open_source(bench_decode._dataset(tmp_path, kind), tmp_path, "train")
    assert [video.frames for video in source.videos] == [7] * 3
    frames = source.read(0).astype(int)
    assert abs(frames[1:] - frames[:-1]).mean() > 2
    assert frames.std() > 20


def test_all_sides_decode_every_frame(tmp_path: Path) -> None:
    paths = bench_decode.write_videos(tmp_path / "train", SMALL, 3)
    assert bench_decode.bare_in_parallel(paths, 2) == bench_decode.bare_with_threads(paths) == 60
    bench_decode.drain(open_source(bench_decode._dataset(tmp_path, SMALL), tmp_path, "train"), 2)


@pytest.mark.parametrize(
    ("seconds", "ratio", "mode"),
    [([2.0, 1.5, 1.8], 0.75, "a thread a video"), ([2.0, 1.9, 1.6], 0.8, "threads of the codec")],
)
def test_held_against_the_faster_of_pyavs_modes(seconds, ratio, mode, tmp_path, monkeypatch, two_cores) -> None:
    monkeypatch.setattr(bench_decode, "in_turn", lambda *functions, repeats: seconds)
    monkeypatch.setattr(bench_decode, "KINDS", (SMALL,))
    (measurement,) = decode_measurements(tmp_path)
    assert measurement.ratio == pytest.approx(ratio)
    assert measurement.at_least == 0.8
    assert measurement.reached == (ratio >= 0.8)
    assert measurement.value == 80 / 2.0  # frames decoded a second, of 2 videos a core
    assert f"PyAV alone ({mode}): {80 / min(seconds[1:]):.0f}/s" in measurement.reference
    assert measurement.name.startswith("decode mpeg4 64x48 to 32, every 3th (")


def test_truly_measured_and_cleaned_up(tmp_path, monkeypatch, two_cores) -> None:
    monkeypatch.setattr(bench_decode, "KINDS", (SMALL, SMALL))
    rows = list(decode_measurements(tmp_path))
    assert [row.ratio > 0 for row in rows] == [True, True]
    assert not list(tmp_path.iterdir())


def test_kinds_have_the_sizes_of_data_sets() -> None:
    sizes = [(kind.width, kind.height, kind.image_size, kind.frame_step) for kind in KINDS]
    for size in ((160, 120, 64, 1), (480, 320, 128, 5), (1280, 720, 128, 1)):
        assert size in sizes
