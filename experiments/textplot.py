"""A curve in the terminal: dots of braille characters, 2 x 4 to a character, or stars where these cannot be shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # the bit of each dot, by row and column (Unicode 2800)


def plot(points: Sequence[tuple[float, float]], width: int, height: int, *, braille: bool = True) -> list[str]:
    """Lines of text that show y over x, `width` characters wide and `height` + 2 lines high, axes and labels included.

    Points in order of x, joined by lines; one that is not finite breaks the line. [] for less than two finite points.
    """
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) < 2:
        return []
    (left, right), (low, high) = (_range([p[axis] for p in finite]) for axis in (0, 1))
    margin = max(len(f"{y:.3g}") for y in (low, high))
    columns = max(2, width - margin - 2)
    across, down = (2, 4) if braille else (1, 1)

    def dot(x: float, y: float) -> tuple[int, int]:
        return (
            round((x - left) / (right - left) * (columns * across - 1)),
            round((high - y) / (high - low) * (height * down - 1)),
        )

    lit: set[tuple[int, int]] = set()
    before: tuple[int, int] | None = None
    for x, y in points:
        here = dot(x, y) if math.isfinite(x) and math.isfinite(y) else None
        if here is not None:
            lit |= _line(before or here, here)
        before = here
    rows = [_row(lit, row, columns, braille) for row in range(height)]
    labels = {0: f"{high:.3g}", height - 1: f"{low:.3g}"}
    corner, bar, line = ("└", "│", "─") if braille else ("+", "|", "-")
    text = [f"{labels.get(i, ''):>{margin}} {bar}{row}".rstrip() for i, row in enumerate(rows)]
    ends = f"{left:,.10g}", f"{right:,.10g}"
    return [*text, f"{'':>{margin}} {corner}{line * columns}",
            f"{'':>{margin}}  {ends[0]}{ends[1]:>{max(1, columns - len(ends[0]))}}"]  # fmt: skip


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 1, high + 1)


def _line(a: tuple[int, int], b: tuple[int, int]) -> set[tuple[int, int]]:
    steps = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    return {
        (round(a[0] + (b[0] - a[0]) * i / steps), round(a[1] + (b[1] - a[1]) * i / steps)) for i in range(steps + 1)
    }


def _row(lit: set[tuple[int, int]], row: int, columns: int, braille: bool) -> str:
    if not braille:
        return "".join("*" if (column, row) in lit else " " for column in range(columns))
    cells = (
        sum(DOTS[y][x] for y in range(4) for x in range(2) if (2 * column + x, 4 * row + y) in lit)
        for column in range(columns)
    )
    return "".join(chr(0x2800 + bits) if bits else " " for bits in cells)
