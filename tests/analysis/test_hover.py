"""The numbers that a figure carries: every kind of series is found, lies where it is drawn, and has its name."""

import html
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from analysis.hover import MOST_POINTS, described
from analysis.plots import save


def drawn(draw, tmp_path, **shape):
    """What is told of a figure with one row of axes after `draw(*axes)`, as its SVG carries it."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    draw(*np.atleast_1d(figure.subplots(1, **shape)))
    (_, svg) = save(figure, tmp_path / "figure")
    (found,) = re.findall(r"<dc:description>(.*?)</dc:description>", svg.read_text())
    return json.loads(html.unescape(found))["axes"], svg.read_text()


def test_points_lie_where_the_svg_draws_them(tmp_path):
    def draw(axes):
        axes.plot([1, 10, 1000], [2.0, 4.0, 3.0], "o-", label="loss")
        axes.set(xscale="log", title="Loss", xlabel="tokens $D$", ylabel="nats")

    (axes,), svg = drawn(draw, tmp_path)
    assert (axes["title"], axes["x"], axes["y"]) == ("Loss", "tokens D", "nats")
    (series,) = axes["series"]
    assert series["name"] == "loss"
    assert [point[2:] for point in series["points"]] == [[1, 2], [10, 4], [1000, 3]]
    markers = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: #1f77b4', svg)
    assert np.array([point[:2] for point in series["points"]]) == pytest.approx(np.array(markers, float), abs=0.051)
    left, top, width, height = axes["box"]
    assert all(left <= x <= left + width and top <= y <= top + height for x, y in np.array(markers, float))


def test_error_bars_scatters_and_bars_are_series_and_bands_and_guides_are_not(tmp_path):
    def draw(axes):
        axes.errorbar([1, 2], [3, 4], yerr=[0.5, 0.25], xerr=0.1, capsize=2, fmt="o", label="bars of error")
        axes.scatter([1.5], [3.5], label="scattered")
        axes.bar(["one", "two"], [2.0, 1.0], label="bars")
        axes.fill_between([0, 1], [0, 0], [1, 1], label="band")
        axes.axhline(2.5, label="guide")

    (axes,), _ = drawn(draw, tmp_path)
    told = {series["name"]: [point[2:] for point in series["points"]] for series in axes["series"]}
    assert told == {
        "bars of error": [["two", 3, 2.5, 3.5], [2, 4, 3.75, 4.25]],
        "scattered": [[1.5, 3.5]],
        "bars": [["one", 2], ["two", 1]],
    }


def test_error_bars_are_told_only_where_each_point_has_one_and_lying_bars_at_their_end(tmp_path):
    def draw(left, right):
        left.errorbar([1, 2, 3], [3, 4, 5], yerr=1, errorevery=2, fmt="o")
        left.errorbar([1, 2], [1, np.nan], yerr=[[0.5, 0.5], [0.25, 0.25]], fmt="s")
        right.barh([1, 2], [3, 4])

    (left, right), _ = drawn(draw, tmp_path, ncols=2)
    told = [[p[2:] for p in series["points"]] for series in left["series"]]
    assert told == [[[1, 3], [2, 4], [3, 5]], [[1, 1, 0.5, 1.25]]]
    assert [p[2:] for p in right["series"][0]["points"]] == [[3, 1], [4, 2]]


def test_a_series_without_a_label_is_called_as_the_legend_calls_what_looks_like_it(tmp_path):
    def draw(left, right):
        left.plot([1, 2], [1, 2], color="red", marker="o")
        left.plot([1, 2], [2, 3], color="red", marker="s")
        left.plot([1, 2], [3, 4], color="blue")
        right.plot([1, 2], [2, 1], color="green", marker="o")
        (red,), (grey,) = left.plot([], [], color="red"), left.plot([], [], color="0.3", marker="s", ls="")
        (blue,) = left.plot([], [], color="blue", marker="D")
        left.figure.legend([red, grey, blue, right.lines[0]], ["without", "output", "$N = 10^{3}$", "width 8"])
        for proxy in (red, grey, blue):
            proxy.remove()

    (left, right), _ = drawn(draw, tmp_path, ncols=2)
    assert [series["name"] for series in left["series"]] == ["without", "without, output", "N = 10^3"]
    assert [series["name"] for series in right["series"]] == ["width 8"]


def test_what_the_axes_do_not_show_is_left_out(tmp_path):
    def draw(axes):
        axes.plot([1, 2, 3, 4, -5], [1, np.nan, 3, 40, 2])
        axes.set(xscale="log", xlim=(0.5, 10), ylim=(0, 10))

    (axes,), _ = drawn(draw, tmp_path)
    assert [point[2:] for point in axes["series"][0]["points"]] == [[1, 1], [3, 3]]


def test_many_points_are_thinned_and_the_ends_stay(tmp_path):
    def draw(axes):
        for height in (1, 2):
            axes.plot(np.arange(3 * MOST_POINTS), np.full(3 * MOST_POINTS, height))

    (axes,), _ = drawn(draw, tmp_path)
    sizes = [len(series["points"]) for series in axes["series"]]
    assert sizes == [MOST_POINTS // 2] * 2
    assert [axes["series"][0]["points"][end][2] for end in (0, -1)] == [0, 3 * MOST_POINTS - 1]


def test_panels_with_the_same_limits_share_a_label_and_others_do_not(tmp_path):
    def draw(left, middle, right):
        left.set_ylabel("loss")
        for axes, top in ((left, 3), (middle, 3), (right, 4)):
            axes.plot([1], [1], "o")
            axes.set_ylim(0, top)

    axes, _ = drawn(draw, tmp_path, ncols=3)
    assert [panel["y"] for panel in axes] == ["loss", "loss", ""]


def test_a_label_cannot_break_the_svg(tmp_path):
    def draw(axes):
        axes.plot([1, 2], [1, 2], label="a < b & c --> </metadata>")

    (axes,), _ = drawn(draw, tmp_path)
    assert axes["series"][0]["name"] == "a < b & c --> </metadata>"


def test_a_figure_without_axes_tells_nothing():
    assert described(Figure()) == {"axes": []}
