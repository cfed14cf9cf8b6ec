"""What a report is made of: markup that can't be broken into, scales, charts, and frames taken back out of pictures."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.prediction.pictures import GREY, RED, Strip, animation, clip_strips, reconstruction_sheet, save_gif
from pipelines.report.charts import HEIGHT, LEFT, MOST_POINTS, RIGHT, TOP, WIDTH, Line, chart, smoothed, thinned
from pipelines.report.embedding import LONGEST_SIDE, encode_all, fitting_frames, sheet, smaller
from pipelines.report.markup import Html, details, el, facts, join, table
from pipelines.report.recorded_pictures import read_clip, read_reconstructions
from pipelines.report.scales import Scale, interval_text, linear_ticks, log_ticks, number_text, spread, tick_text

EVIL = "<script>alert(1)</script>\"'&"


def test_text_is_escaped_wherever_it_goes():
    built = [
        el("p", EVIL), el("p", [EVIL, [EVIL]]), el("p", title=EVIL), table([EVIL], [[EVIL, EVIL]], EVIL),
        facts([(EVIL, EVIL)]), details(EVIL, EVIL),
    ]  # fmt: skip
    for markup in built:
        assert "<script" not in markup
        assert "&lt;script&gt;" in markup
        assert not re.search(r'="[^"]*"\'', markup), "a quote ended its attribute"
    assert el("p", el("b", EVIL)).startswith("<p><b>&lt;script")  # markup is not escaped twice


def test_attributes_and_children():
    assert (
        el("a", "x", class_="y", data_row=3, hidden=True, open=False, id=None)
        == '<a class="y" data-row="3" hidden>x</a>'
    )
    assert el("img", src="data:,") == '<img src="data:,">'
    assert el("circle", r=2) == '<circle r="2"/>'
    assert join([None, False, 0, 1.5, Html("<b>")]) == "01.5<b>"
    assert facts([("a", ""), ("b", None), ("c", 0)]).count("<dt>") == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (12.6, 38.2), (-3, 7e6), (0.8462, 0.8471), (1e-7, 3e-7)])
def test_linear_ticks_are_round_and_within(low, high):
    ticks = linear_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)
    assert round(steps[0] / 10.0 ** np.floor(np.log10(steps[0]) + 1e-6), 6) in (1, 2, 5)


@pytest.mark.parametrize(("low", "high"), [(1, 1000), (0.05, 0.6), (2, 3), (1e-6, 10), (300, 320)])
def test_log_ticks(low, high):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(set(ticks))


def test_scales_map_their_ends():
    for logarithmic in (False, True):
        scale = Scale(2, 32, 100, 200, logarithmic)
        assert [scale(2), scale(32)] == pytest.approx([100, 200])
    assert Scale(2, 32, 100, 200, True)(8) == pytest.approx(150)  # 8 is as many times 2 as 32 is 8
    assert Scale(2, 32, 200, 100)(17) == pytest.approx(150)
    assert Scale(2, 32, 100, 200, True)(0) == pytest.approx(100)


def test_the_spread_holds_all_values():
    low, high = spread([3.0, 5.0], False)
    assert low < 3 < 5 < high
    low, high = spread([0.0, 0.01, 100.0], True)
    assert 0 < low < 0.01 < 100 < high
    for values in ([], [4.0], [0.0, 0.0]):
        for logarithmic in (False, True):
            low, high = spread(values, logarithmic)
            assert low < high


def test_numbers_as_text():
    assert [tick_text(v) for v in (0, 0.25, 12, 1000, 2500, 35000, 2e6, 2e-5)] == [
        "0", "0.25", "12", "1k", "2.5k", "35k", "2M", "2e-5",
    ]  # fmt: skip
    assert [number_text(v) for v in (None, 0.12345, 1234567.0)] == ["-", "0.1235", "1,234,567"]
    assert interval_text((1, 2.345), 2) == "1.00 to 2.35"
    assert interval_text(None) == interval_text((None, 1.0)) == ""


def numbers_of(markup: str, attribute: str) -> list[float]:
    return [float(value) for text in re.findall(rf' {attribute}="([^"]*)"', markup) for value in re.split("[ ,]", text)]


def test_a_chart_lies_within_its_drawing_and_rises_where_values_rise():
    line = Line("ours", [1, 2, 3], [1.0, 4.0, 9.0], "s1", [(0.5, 1.5), (3.0, 5.0), (8.0, 12.0)], marks=True)
    drawn = chart("Title", [line], "step", "PSNR [dB]", better="higher")
    (points,) = re.findall(r'<polyline class="line s1" points="([^"]*)"', drawn)
    x, y = np.array([pair.split(",") for pair in points.split()], float).T
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) < 0).all()  # pixels count downwards
    band = numbers_of(re.search("<polygon[^>]*>", drawn)[0], "points")
    for places, low, high in (
        (x, LEFT, WIDTH - RIGHT),
        (y, TOP, HEIGHT),
        (band[::2], LEFT, WIDTH),
        (band[1::2], TOP, HEIGHT),
    ):
        assert low <= min(places) <= max(places) <= high
    assert "higher is better" in drawn
    assert "PSNR [dB]" in drawn
    assert drawn.count("<circle") == 3


def test_gaps_break_a_line():
    line = Line("ours", range(6), [1.0, 2.0, None, 3.0, 4.0, None], "s1")
    drawn = chart("t", [line], "x", "y")
    assert [len(points.split()) for points in re.findall(r'polyline[^>]* points="([^"]*)"', drawn)] == [2, 2]


def test_one_point_constants_and_nothing():
    assert "<circle" in chart("t", [Line("a", [5], [1.0], "s1")], "x", "y")
    assert "<polyline" in chart("t", [Line("a", [1, 2], [0.0, 0.0], "s1")], "x", "y", log_y=True)
    assert chart("t", [Line("a", [1, 2], [None, None], "s1")], "x", "y") == ""
    assert chart("t", [], "x", "y") == ""


def test_what_the_pointer_reads_are_the_values():
    lines = [Line(EVIL, [1, 2], [0.5, None], "s1"), Line("raw", [1, 2], [1.0, 2.0], "s1", faint=True)]
    drawn = chart("t", lines, "x", "y")
    assert "<script" not in drawn
    text = re.search(r'data-chart="([^"]*)"', drawn)[1].replace("&quot;", '"').replace("&#x27;", "'")
    (line,) = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))["lines"]
    assert line["name"] == EVIL
    assert [point[1:] for point in line["points"]] == [["1", "0.5"]]


def test_long_lines_are_thinned_to_means_between_extremes():
    y = np.random.default_rng(0).normal(size=10_007).tolist()
    line = thinned(Line("a", range(len(y)), y, "s1"))
    assert len(line.x) == len(line.y) == len(line.band) <= MOST_POINTS
    size = -(-len(y) // MOST_POINTS)
    assert line.y[0] == pytest.approx(np.mean(y[:size]))
    assert line.band[0] == (min(y[:size]), max(y[:size]))
    short = Line("a", [1, 2], [1.0, 2.0], "s1")
    assert thinned(short) is short


def test_smoothing_is_a_centred_mean_that_passes_over_gaps():
    x = range(100)
    np.testing.assert_allclose(smoothed(x, [2.0 * v for v in x], 0.1)[5:95], 2.0 * np.arange(5, 95))
    assert smoothed(range(3), [1.0, None, 3.0], 0.5) == [1.0, 2.0, 3.0]
    assert smoothed(range(3), [None] * 3) == [None] * 3


def noise(*shape: int, levels: int = 6, seed: int = 0) -> np.ndarray:
    """Few grey values, so that a GIF holds all of them."""
    grey = np.random.default_rng(seed).integers(0, levels, shape) * 40
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_frames_come_back_out_of_a_clip(tmp_path: Path, side: int):
    truth, ours, other = (noise(5, side, side, seed=seed) for seed in range(3))
    strips = [*clip_strips(truth, ours, 2), Strip("sample 2", other, 2, RED)]
    save_gif(tmp_path / "a.gif", animation([("a", strips)]), fps=10)
    found = read_clip(tmp_path / "a.gif", side, 5)
    for video, expected in zip(found, (truth, ours, other), strict=True):
        assert video.shape == expected.shape
        assert np.abs(video.astype(int) - expected).max() <= 8


@pytest.mark.parametrize("equal", [(0, 1), (3, 4), (0, 1, 2, 3, 4), (2, 3, 4)])
def test_frames_that_are_alike_come_back_too(tmp_path: Path, equal: tuple[int, ...]):
    truth = noise(5, 32, 32)
    truth[list(equal)] = truth[equal[0]]
    strips = [Strip("truth", truth, 0, GREY), Strip("prediction", truth, 0, RED)]
    save_gif(tmp_path / "a.gif", animation([("a", strips)]), fps=25)
    assert np.abs(read_clip(tmp_path / "a.gif", 32, 5)[1].astype(int) - truth).max() <= 8


def test_other_pictures_are_refused(tmp_path: Path):
    save_gif(tmp_path / "a.gif", animation([("a", clip_strips(noise(4, 32, 32), noise(4, 32, 32), 1))]), fps=10)
    (tmp_path / "b.gif").write_bytes(b"GIF89a, cut short")
    for name, side, length in (("a", 64, 4), ("a", 32, 5), ("b", 32, 4), ("none", 32, 4)):
        with pytest.raises(ValueError, match=re.escape(f"{name}.gif: ")):
            read_clip(tmp_path / f"{name}.gif", side, length)


@pytest.mark.parametrize(("count", "side"), [(3, 64), (8, 32), (11, 32), (16, 128)])
def test_images_come_back_out_of_a_sheet(tmp_path: Path, count: int, side: int):
    truth = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reconstructed = (truth + 0.1).clamp(-1, 1)
    reconstruction_sheet(truth, reconstructed, "title").save(tmp_path / "s.png")
    found = read_reconstructions(tmp_path / "s.png", side)
    assert len(found) == count
    for column, images in zip(found, zip(truth, reconstructed, strict=True), strict=True):
        for shown, image in zip(column, images, strict=False):
            assert (shown == image.add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()).all()
    for name, wrong in (("s.png", side + 4), ("none.png", side)):
        with pytest.raises(ValueError, match=re.escape(name)):
            read_reconstructions(tmp_path / name, wrong)


def test_pictures_are_lossless_where_there_is_room_and_fit_where_there_is_not():
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    (encoded,) = encode_all([picture], 10**6)
    assert (np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")) == picture).all()
    budget = len(encoded)
    fitted = encode_all([picture, picture], budget)
    assert 0 < sum(map(len, fitted)) <= budget
    assert encode_all([picture], 100) is None


def test_sheets_stay_small_enough_for_a_phone():
    for length, side in ((30, 64), (40, 256), (1000, 256), (16, 1024), (5, 97)):
        kept, divisor = fitting_frames(length, side)
        assert side % divisor == 0
        assert len(kept) * side // divisor <= LONGEST_SIDE
        assert (kept[0], kept[-1]) == (0, length - 1)
        assert len(kept) == length or length == 1000
    video = noise(3, 8, 8)
    assert (smaller(video, 1) == video).all()
    np.testing.assert_allclose(smaller(video, 8)[:, 0, 0, 0], video[..., 0].mean((1, 2)), atol=0.5)
    assert (sheet([video, video])[8:16, 16:24] == video[2]).all()
