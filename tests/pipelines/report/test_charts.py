"""Charts of the report: scales, ticks and numbers as text, and the SVG that is drawn of lines."""

import html
import json
import re

import numpy as np
import pytest

from pipelines.report import charts
from pipelines.report.charts import HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, Chart, Line, Scale
from pipelines.report.page import template_environment

EVIL = "<script>alert(1)</script>\"'&"


def drawn(made: Chart) -> str:
    return str(template_environment().get_template("macros.html").module.chart(made))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (12.6, 38.2), (-3, 7e6), (0.8462, 0.8471), (1e-7, 3e-7)])
def test_linear_ticks_are_round_and_within(low, high):
    ticks = Scale(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 8
    assert low <= min(ticks) <= max(ticks) <= high
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)
    assert round(steps[0] / 10.0 ** np.floor(np.log10(steps[0]) + 1e-6), 6) in (1, 2, 5)


@pytest.mark.parametrize(("low", "high"), [(1, 1000), (0.05, 0.6), (2, 3), (1e-6, 10), (300, 320)])
def test_logarithmic_ticks_are_within(low, high):
    ticks = Scale(low, high, 0, 100, logarithmic=True).ticks()
    assert 2 <= len(ticks) <= 12
    assert low <= min(ticks) <= max(ticks) <= high
    assert ticks == sorted(set(ticks))


def test_scales_map_values_to_positions():
    for logarithmic in (False, True):
        np.testing.assert_allclose(Scale(2, 32, 100, 200, logarithmic)([2, 32]), [100, 200])
    assert Scale(2, 32, 100, 200, True)(8) == 150  # 8 / 2 = 32 / 8
    assert Scale(2, 32, 200, 100)(17) == 150
    assert Scale(2, 32, 100, 200, True)(0) == 100


def test_numbers_as_text():
    assert [charts.tick_text(v) for v in (0.0, 0.25, 2500.0, 2e6, 2e-5)] == ["0", "0.25", "2,500", "2,000,000", "2e-05"]
    assert [charts.number_text(v) for v in (None, float("nan"), 0.12345, 1234567.0)] == [
        "-",
        "-",
        "0.1235",
        "1,234,567",
    ]
    assert charts.interval_text((1, 2.345), 2) == "1.00 to 2.35"
    assert charts.interval_text(None) == charts.interval_text((float("nan"), 1.0)) == ""


def test_a_chart_is_within_its_drawing_and_rises_where_values_rise():
    line = Line("ours", [1, 2, 3], [1.0, 4.0, 9.0], "s1", [(0.5, 1.5), (3.0, 5.0), (8.0, 12.0)])
    markup = drawn(Chart("Title", [line], "step", "PSNR [dB]", better="higher"))
    polyline, polygon = (
        np.array(re.findall(r"([\d.]+),([\d.]+)", re.search(rf'<{tag} [^>]* points="[^"]*"', markup)[0]), float).T
        for tag in ("polyline", "polygon")
    )
    assert (np.diff(polyline[0]) > 0).all()
    assert (np.diff(polyline[1]) < 0).all()  # positions count downwards
    for x, y in (polyline, polygon):
        assert LEFT <= x.min() <= x.max() <= WIDTH - RIGHT
        assert TOP <= y.min() <= y.max() <= HEIGHT
    assert polygon.shape == (2, 6)
    assert "higher is better" in markup
    assert "PSNR [dB]" in markup
    assert markup.count("<circle") == 3
    assert not re.search(r'(x\d?|y\d?|cx|cy)="(nan|inf)', markup)


@pytest.mark.parametrize("band", [True, False])
def test_bars_stand_on_zero_and_touch_each_other(band):
    shares = np.array([0.5, 0.1, 0.4])
    ends = np.stack([shares - 0.05, shares + 0.05], axis=1) if band else None
    made = Chart("t", [Line("a", range(3), shares, "s1", ends, bars=True)], "x", "y")
    found = re.findall(
        r'<rect class="(\w+) s1" x="([\d.]+)" width="([\d.]+)" y="([\d.]+)" height="([\d.]+)"', drawn(made)
    )
    bars, bands = (np.array([numbers for kind, *numbers in found if kind == name], float) for name in ("bar", "band"))
    left, width, top, height = bars.T
    np.testing.assert_allclose(left + width, np.append(left[1:], WIDTH - RIGHT), atol=0.11)  # positions are rounded
    np.testing.assert_allclose(top + height, made.up(0.0), atol=0.11)
    np.testing.assert_allclose(height / height[0], shares / 0.5, atol=0.01)
    assert len(bands) == (3 if band else 0)
    if band:
        np.testing.assert_allclose(bands[:, 2:].sum(1), made.up(shares - 0.05), atol=0.11)
        np.testing.assert_allclose(bands[:, 2], made.up(shares + 0.05), atol=0.11)
    assert made.x_ticks == [0, 1, 2]


def test_gaps_break_a_line_and_its_band():
    y = [1.0, 2.0, None, 3.0, float("nan"), float("inf"), 4.0, 5.0]
    markup = drawn(Chart("t", [Line("ours", range(8), y, "s1", [(0, 6)] * 8)], "x", "y"))
    lengths = {tag: [len(points.split()) for points in re.findall(rf'{tag}[^>]* points="([^"]*)"', markup)]
               for tag in ("polyline", "polygon")}  # fmt: skip
    assert lengths == {"polyline": [2, 2], "polygon": [4, 2, 4]}
    assert markup.count("<circle") == 5
    alone = drawn(Chart("t", [Line("ours", range(100), [1.0, None] + [2.0] * 98, "s1")], "x", "y"))
    assert alone.count("<circle") == 1  # a long line has dots only where a point stands alone
    without = drawn(Chart("t", [Line("ours", [1, 2], [1.0, 2.0], "s1", [(None, None)] * 2)], "x", "y"))
    assert "<polygon" not in without
    assert "nan" not in without


def test_one_point_constants_and_nothing():
    assert "<circle" in drawn(Chart("t", [Line("a", [5], [1.0], "s1")], "x", "y"))
    assert "<circle" in drawn(Chart("t", [Line("a", [5], [1.0], "s1")], "x", "y", log_x=True, log_y=True))
    assert "<polyline" in drawn(Chart("t", [Line("a", [1, 2], [0.0, 0.0], "s1")], "x", "y", log_y=True))
    assert not Chart("t", [Line("a", [1, 2], [None, None], "s1")], "x", "y").lines
    assert not Chart("t", [Line("a", [], [], "s1")], "x", "y").lines
    assert not Chart("t", [], "x", "y").lines


def test_the_script_reads_the_values_and_text_is_escaped():
    markup = drawn(Chart(EVIL, [Line(EVIL, [1, 2], [0.5, None], "s1")], EVIL, EVIL))
    assert "<script" not in markup
    assert not re.search(r'="[^"]*"\'', markup), "a quote ended its attribute"
    (line,) = json.loads(html.unescape(re.search(r'data-chart="([^"]*)"', markup)[1]))["lines"]
    assert line["name"] == EVIL
    assert [point[1:] for point in line["points"]] == [["1", "0.5"]]


def test_the_numbers_are_a_table():
    made = Chart("t", [Line("a", [1, 2], [0.5, None], "s1"), Line("b", [2, 3], [1.0, 2.0], "s2")], "x", "y")
    assert re.findall(r'<t[hd](?: scope="row"| class="number")>([^<]*)<', drawn(made)) == [
        "1", "0.5", "", "2", "-", "1", "3", "", "2",
    ]  # fmt: skip
    long = Chart("t", [Line("a", range(1, 203), range(202), "s1")], "x", "y")
    assert [x for x, _ in long.rows()] == [1, *range(6, 199, 6), 202]  # round numbers, and the ends


def test_long_lines_are_thinned_to_means_between_extremes():
    y = np.random.default_rng(0).normal(size=10_007)
    y[: -(-len(y) // MAX_POINTS)] = np.nan  # a gap in the place of the first point
    line = Line("a", range(len(y)), y, "s1").thinned()
    assert len(line.x) == len(line.y) == len(line.band) <= MAX_POINTS
    size = -(-len(y) // MAX_POINTS)
    assert np.isnan(line.y[0])
    assert line.y[1] == pytest.approx(np.mean(y[size : 2 * size]))
    assert line.y[-1] == pytest.approx(np.mean(y[len(y) // size * size :]))
    assert line.band[1].tolist() == [y[size : 2 * size].min(), y[size : 2 * size].max()]
    short = Line("a", [1, 2], [1.0, 2.0], "s1")
    assert short.thinned() is short
