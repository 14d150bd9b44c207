"""What a figure shows, as numbers: its axes and, by series, the points, so that a page can say what is under the mouse.

Works for any figure: lines, error bars, scatter and bars in data coordinates are found by themselves. A series is
called by its own label, or else by the legend's entries that look like it. Bands, images and guides that span an axis
(axhline) carry no points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_POINTS = 4000  # of a figure; beyond it each series is thinned evenly, ends kept


@dataclass(frozen=True)
class _Look:
    """What tells series apart: colour (hex), and marker with whether it is hollow (None: a line without markers)."""

    colour: str
    marker: tuple[str, bool] | None


@dataclass(frozen=True)
class _Series:
    """name: of its own, or "". points_Px2 in data coordinates; bars_Px2: ends of the error bars where it has some."""

    name: str
    look: _Look
    points_Px2: np.ndarray
    bars_Px2: np.ndarray | None = None


def described(figure) -> dict[str, Any]:
    """The axes of a figure that has been drawn, in the units of its SVG (points, y downwards); fit for JSON.

    {"axes": [{"title", "x", "y" (labels), "box": [left, top, width, height], "series": [{"name", "colour", "points":
    [[left, top, x, y] or [left, top, x, y, low, high], ...]}]}]}. x and y are numbers, or the tick's text where an axis
    has named places. Points outside the axes are left out.
    """
    found = [(axes, list(_series(axes))) for axes in _all_axes(figure)]
    looks = {one.look.colour for _, many in found for one in many}
    most = max(2, MOST_POINTS // max(1, sum(len(many) for _, many in found)))
    entries = {axes: [entry for legend in _legends(figure, axes) for entry in _entries(legend)] for axes, _ in found}
    described = []
    for axes, many in found:
        x_name, y_name = _names(axes.xaxis), _names(axes.yaxis)
        series = []
        for one in many:
            points = _points(figure, axes, one, most, x_name, y_name)
            if points:
                name = one.name or ", ".join(_matching(one.look, entries[axes], looks))
                series.append({"name": _plain(name), "colour": one.look.colour, "points": points})
        left, bottom, width, height = axes.get_position().bounds
        box = _svg(figure, np.array([[left, bottom + height], [left + width, bottom]]))
        described.append({
            "title": _plain(next((t for at in ("left", "center", "right") if (t := axes.get_title(at))), "")),
            "x": _plain(_label(axes, "x")), "y": _plain(_label(axes, "y")),
            "box": [*_round(box[0], 1), *_round(box[1] - box[0], 1)], "series": series,
        })  # fmt: skip
    return {"axes": described}


def _all_axes(figure) -> list[Any]:
    shown = [axes for axes in figure.axes if axes.get_visible()]
    return shown + [inset for axes in shown for inset in axes.child_axes if hasattr(inset, "xaxis")]


def _series(axes) -> Iterator[_Series]:
    """Everything in data coordinates that has points, in the order in which it was drawn."""
    from matplotlib.collections import PathCollection
    from matplotlib.container import BarContainer, ErrorbarContainer

    bars = [c for c in axes.containers if isinstance(c, ErrorbarContainer) and c.lines[0] is not None]
    of_bars, caps = {c.lines[0]: c for c in bars}, {cap for c in bars for cap in c.lines[1]}
    for line in axes.lines:
        if line in caps or line.get_transform() is not axes.transData or not line.get_visible():
            continue
        points_Px2 = np.column_stack([np.asarray(line.get_xdata(orig=False)), np.asarray(line.get_ydata(orig=False))])
        container = of_bars.get(line)
        yield _Series(_own_name(container or line), _look(line), points_Px2, _bar_ends(container, len(points_Px2)))
    for scatter in axes.collections:
        if isinstance(scatter, PathCollection) and scatter.get_offset_transform() is axes.transData:
            yield _Series(_own_name(scatter), _look(scatter), np.asarray(scatter.get_offsets()))
    for container in axes.containers:
        if isinstance(container, BarContainer) and container.patches:
            across, up = (1, 0.5) if container.orientation == "horizontal" else (0.5, 1)
            ends_Px2 = [(p.get_x() + across * p.get_width(), p.get_y() + up * p.get_height()) for p in container]
            yield _Series(_own_name(container), _look(container.patches[0]), np.array(ends_Px2))


def _own_name(artist) -> str:
    label = str(artist.get_label() or "")
    return "" if label.startswith("_") else label


def _bar_ends(container, points: int) -> np.ndarray | None:
    """(P, 2) low and high of the vertical error bars; None unless each point has one."""
    if container is None or not container.has_yerr:
        return None
    segments = container.lines[2][-1].get_segments()  # the horizontal ones stand before them
    if len(segments) != points:
        return None
    return np.array([segment[:, 1] if len(segment) == 2 else (np.nan, np.nan) for segment in segments])


def _look(artist) -> _Look:
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D

    if not isinstance(artist, Line2D):
        faces = np.atleast_2d(artist.get_facecolor())
        hollow = not len(faces) or not faces[0][-1]
        colours = np.atleast_2d(artist.get_edgecolor()) if hollow else faces
        return _Look(to_hex(colours[0]) if len(colours) else "#000000", None)
    marker = artist.get_marker()
    if marker in (None, "", " ", "None", "none"):
        return _Look(to_hex(artist.get_color()), None)
    hollow = str(artist.get_markerfacecolor()) == "none"
    drawn = artist.get_linestyle() not in ("", " ", "None", "none")
    colour = artist.get_markeredgecolor() if hollow else artist.get_color() if drawn else artist.get_markerfacecolor()
    return _Look(to_hex(colour), (str(marker), hollow))


# --- names from legends ---------------------------------------------------------------------------------------------


def _legends(figure, axes) -> list[Any]:
    return [*([axes.get_legend()] if axes.get_legend() else []), *figure.legends]


def _entries(legend) -> Iterator[tuple[str, list[_Look]]]:
    """(text, looks of what is drawn beside it) of each entry: a legend is boxes within boxes, down to these pairs."""
    from matplotlib.offsetbox import DrawingArea, TextArea

    boxes = [legend]
    while boxes:
        inside = boxes.pop().get_children()
        drawn = [box for box in inside if isinstance(box, DrawingArea)]
        texts = [box for box in inside if isinstance(box, TextArea)]
        if len(drawn) == len(texts) == 1:
            kinds = [a for a in drawn[0].get_children() if hasattr(a, "get_marker") or hasattr(a, "get_facecolor")]
            yield texts[0].get_text(), [_look(artist) for artist in kinds]
        else:
            boxes += [box for box in reversed(inside) if hasattr(box, "get_children")]


def _matching(look: _Look, entries, looks: set[str]) -> list[str]:
    """Texts of the entries that look so. An entry may stand for a colour only, or, in a colour that no series has, for
    a marker only."""
    exact = [text for text, drawn in entries if look in drawn]
    if exact:
        return exact[:1]

    def fits(other: _Look) -> bool:
        if other.colour == look.colour:
            return other.marker is None or look.marker is None
        return other.marker is not None and other.marker == look.marker and other.colour not in looks

    return [text for text, drawn in entries if any(map(fits, drawn))]


# --- numbers --------------------------------------------------------------------------------------------------------


def _points(figure, axes, one: _Series, most: int, x_name, y_name) -> list[list[Any]]:
    points_Px2 = np.asarray(np.ma.filled(np.ma.asarray(one.points_Px2, float), np.nan))
    with np.errstate(all="ignore"):  # what a logarithmic axis cannot show is left out below
        shown_Px2 = figure.transFigure.inverted().transform(axes.transData.transform(points_Px2))
    edge = 1e-3  # a point on the frame is inside
    low, high = axes.get_position().get_points()
    inside = np.all((shown_Px2 >= low - edge) & (shown_Px2 <= high + edge), axis=1) & np.isfinite(points_Px2).all(
        axis=1
    )
    (kept,) = np.nonzero(inside)
    if len(kept) > most:
        kept = kept[np.unique(np.linspace(0, len(kept) - 1, most).round().astype(int))]
    svg_Px2 = _svg(figure, shown_Px2)
    points = []
    for p in kept:
        x, y = points_Px2[p]
        bars = [] if one.bars_Px2 is None or not np.isfinite(one.bars_Px2[p]).all() else one.bars_Px2[p]
        points.append([*_round(svg_Px2[p], 1), x_name(x), y_name(y), *(_significant(end) for end in bars)])
    return points


def _svg(figure, shown_Px2: np.ndarray) -> np.ndarray:
    """Fractions of the figure, y upwards, as points of its SVG, y downwards."""
    width, height = figure.get_size_inches() * 72
    return np.column_stack([shown_Px2[:, 0] * width, (1 - shown_Px2[:, 1]) * height])


def _round(numbers, digits: int) -> list[float]:
    return [round(float(number), digits) for number in numbers]


def _significant(number: float) -> float:
    return float(f"{number:.5g}")


def _names(axis):
    """A function from a value on this axis to what a reader is told: the tick's own text where ticks have names."""
    from matplotlib.category import StrCategoryFormatter
    from matplotlib.ticker import FixedFormatter

    names = {}
    if isinstance(axis.get_major_formatter(), (FixedFormatter, StrCategoryFormatter)):
        places = axis.get_majorticklocs()
        texts = axis.get_major_formatter().format_ticks(places)
        names = {_significant(place): _plain(text) for place, text in zip(places, texts, strict=True) if text}
    return lambda value: names.get(_significant(value), _significant(value))


def _label(axes, which: str) -> str:
    """The axis label, or that of the first axes with the same limits: one label often stands for a row of panels."""

    def of(each) -> str:
        return getattr(each, f"get_{which}label")()

    limits = getattr(axes, f"get_{which}lim")()
    alike = [each for each in axes.figure.axes if getattr(each, f"get_{which}lim")() == limits]
    return next((of(each) for each in (axes, *alike) if of(each)), "")


def _plain(text: str) -> str:
    """Without the marks of mathematical text: "$10^{\\,3}$" -> "10^3"."""
    for mark in ("\\mathdefault", "\\mathrm", "\\,", "$", "{", "}"):
        text = text.replace(mark, "")
    return " ".join(text.replace("\\", "").split())
