"""A figure's SVG made fit to stand in a page beside others: small, with ids of its own, and without anything that runs
or loads.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from dataclasses import dataclass
from html import escape
from typing import Any
from xml.etree import ElementTree

DRAWN = {
    *("svg", "g", "path", "use", "defs", "clipPath", "rect", "circle", "ellipse", "line", "polyline", "polygon"),
    *("image", "text", "tspan", "linearGradient", "radialGradient", "stop", "marker", "pattern", "mask"),
}
PNG_HEADER = b"\x89PNG\r\n\x1a\n"


class SvgError(ValueError):
    """A figure that cannot be shown, and why, in one line."""


@dataclass(frozen=True)
class Drawing:
    """markup: what stands inside the <svg> element. width, height: of its view box, whose corner is 0 0.
    points: what analysis.hover wrote into it, or None.
    """

    markup: str
    width: float
    height: float
    points: dict[str, Any] | None = None


def drawing(svg: str, prefix: str) -> Drawing:
    """An SVG as matplotlib writes it, its ids prefixed; scripts, styles, links, comments and unused ids are dropped.

    Raises SvgError where it is no SVG or has no view box at 0 0.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise SvgError(f"the figure is not a readable SVG: {error}") from None
    found = re.fullmatch(r"0 0 (\d+(?:\.\d+)?) (\d+(?:\.\d+)?)", root.get("viewBox", ""))
    if _local(root.tag) != "svg" or found is None or not float(found[1]) * float(found[2]):
        raise SvgError("the figure is not an SVG with a view box from 0 0")
    used = set(re.findall(r"#([^\s\"')]+)", svg))
    markup = "".join(_written(child, prefix, used) for child in root)
    return Drawing(markup, float(found[1]), float(found[2]), _points(root))


def picture(png: bytes, like: Drawing | None = None) -> Drawing:
    """A PNG in place of the drawing `like`, with its size and points. Raises SvgError where it is no PNG."""
    if not png.startswith(PNG_HEADER) or len(png) < 24:
        raise SvgError("the figure is not a PNG")
    width, height = (float(int.from_bytes(png[at : at + 4], "big")) for at in (16, 20))
    if like is not None:
        width, height = like.width, like.height
    data = b64encode(png).decode()
    markup = f'<image width="{width:g}" height="{height:g}" href="data:image/png;base64,{data}"/>'
    return Drawing(markup, width, height, like and like.points)


def _points(root: ElementTree.Element) -> dict[str, Any] | None:
    text = next((e.text or "" for e in root.iter() if _local(e.tag) == "description"), "")
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("axes"), list) else None


def _local(name: Any) -> str:
    """A name without its namespace: "{http://...}path" -> "path"."""
    return str(name).rpartition("}")[2]


def _written(element: ElementTree.Element, prefix: str, used: set[str]) -> str:
    tag = _local(element.tag)
    if tag not in DRAWN:
        return ""
    attributes = ""
    for name, value in element.items():
        if name == "id" and value not in used:
            continue
        # An HTML page reads names in any case: ONCLICK runs as onclick does.
        value = _kept(_local(name).lower(), value, prefix)
        if value is not None:
            attributes += f' {_local(name)}="{escape(value)}"'
    text = escape(element.text) if element.text and tag in ("text", "tspan") else ""
    inside = text + "".join(_written(child, prefix, used) + escape((child.tail or "").strip()) for child in element)
    if tag == "g" and not (attributes and inside):
        return inside
    return f"<{tag}{attributes}>{inside}</{tag}>" if inside else f"<{tag}{attributes}/>"


def _kept(name: str, value: str, prefix: str) -> str | None:
    """The attribute's value in the page; None where it would run, load or serve nothing."""
    if name == "id":
        return f"{prefix}{value}"
    if name == "href":
        if value.startswith("#"):
            return f"#{prefix}{value[1:]}"
        return value if value.startswith("data:image/png;") else None
    if name.startswith("on") or re.search(r"url\((?!#)|\\", value, re.IGNORECASE):
        return None
    value = value.replace("url(#", f"url(#{prefix}")
    if name in ("d", "x", "y", "width", "height"):  # not transforms, whose scales are small numbers
        value = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
        value = re.sub(r"\s*([A-Za-z])\s*", r"\1", value.strip())
    return value
