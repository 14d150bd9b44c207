"""`--keep`: which rows of a table count, as a comparison of columns with numbers, read and never executed."""

from __future__ import annotations

import ast
import difflib
import operator
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxgpt.config import BadInput

if TYPE_CHECKING:
    import numpy
    import pandas

COMPARISONS = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip
ALLOWED = "columns, numbers and 'words' compared by < <= > >= == !=, joined by and, or, not; `names with spaces`"


def kept(table: pandas.DataFrame, condition: str) -> numpy.ndarray:
    """Which rows fulfil `condition`, such as "loss < 3.4 and model.d_model >= 32"; booleans of shape (M,).

    Raises BadInput for anything else than comparisons, for an unknown column, and where no row is left.
    """
    import numpy as np

    quoted: list[str] = []

    def stand_in(found: re.Match) -> str:
        quoted.append(found[1])
        return f"_quoted_{len(quoted) - 1}"

    try:
        source = re.sub(r"`([^`]*)`", stand_in, condition).strip()
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        raise BadInput(f"--keep {condition!r} cannot be read; it may hold {ALLOWED}") from None
    names = {f"_quoted_{i}": name for i, name in enumerate(quoted)}
    try:
        rows = _truth(tree, _Where(table, names, condition, source))
    except RecursionError:
        raise BadInput(f"--keep {condition!r} is nested too deeply to be read") from None
    if not rows.any():
        raise BadInput(f"--keep {condition!r} leaves none of the {len(table)} rows")
    return np.asarray(rows, dtype=bool)


@dataclass(frozen=True)
class _Where:
    """What an expression is read against: the table, names in backticks, the user's words, and these as parsed."""

    table: pandas.DataFrame
    names: dict[str, str]
    condition: str
    source: str

    def text(self, node: ast.expr) -> str:
        """What the user wrote there."""
        return ast.get_source_segment(self.source, node) or ""

    def in_quotes(self, node: ast.expr) -> str:
        """The whole condition with quotes around this."""
        line = self.source.encode()  # offsets are in bytes
        parts = line[: node.col_offset], line[node.col_offset : node.end_col_offset], line[node.end_col_offset :]
        before, word, after = (part.decode() for part in parts)
        whole = before.replace('"', "'") + f"'{word}'" + after.replace('"', "'")
        return re.sub(r"_quoted_\d+", lambda found: f"`{self.names[found[0]]}`", whole)

    def refuse(self) -> BadInput:
        return BadInput(f"--keep {self.condition!r} is not allowed; it may hold {ALLOWED}")


def _truth(node: ast.AST, where: _Where) -> numpy.ndarray:
    """Booleans (M,) of a comparison or of comparisons joined by and, or, not."""
    import numpy as np

    if isinstance(node, ast.BoolOp):
        parts = [_truth(part, where) for part in node.values]  # noqa: PD011
        return np.all(parts, axis=0) if isinstance(node.op, ast.And) else np.any(parts, axis=0)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~_truth(node.operand, where)
    if not isinstance(node, ast.Compare):
        raise where.refuse()
    sides = [_side(side, where) for side in _checked([node.left, *node.comparators], where)]
    rows = np.ones(len(where.table), dtype=bool)
    for left, by, right in zip(sides, node.ops, sides[1:], strict=False):
        if type(by) not in COMPARISONS:
            raise where.refuse()
        try:
            rows &= np.asarray(COMPARISONS[type(by)](left, right), dtype=bool)
        except TypeError:
            raise BadInput(f"--keep {where.condition!r} compares words with numbers") from None
    return rows


def _checked(sides: list[ast.expr], where: _Where) -> list[ast.expr]:
    """What is compared. A word without quotes beside a column of words raises BadInput that corrects the expression.

    A shell takes the outer quotes away, and `task == jump` is left.
    """
    import pandas

    columns = [where.table.get(_name(side, where)) for side in sides]
    if any(column is not None and not pandas.api.types.is_numeric_dtype(column) for column in columns):
        for side, column in zip(sides, columns, strict=True):
            text = where.text(side)
            unquoted = not isinstance(side, ast.Constant) and not re.search("['\"]|_quoted_", text)
            if column is None and unquoted:
                raise BadInput(f'--keep {where.condition!r}: {text} is no column; words stand in quotes of their own: '
                               f'--keep "{where.in_quotes(side)}"')  # fmt: skip
    return sides


def _name(node: ast.AST, where: _Where) -> str:
    """The column that an expression names, also a dotted one such as train.seed; '' if it is no name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join([where.names.get(node.id, node.id), *parts]) if isinstance(node, ast.Name) else ""


def _side(node: ast.AST, where: _Where) -> Any:
    """A column, a number or a word."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = _side(node.operand, where)
        if not isinstance(value, str):
            return -value
    name = _name(node, where)
    if not name:
        raise where.refuse()
    return column(where.table, name, "--keep")


def column(table: pandas.DataFrame, name: str, flag: str) -> Any:
    """A column by name. Raises BadInput that names the flag, the nearest column and those there are."""
    if name not in table.columns:
        columns = [str(c) for c in table.columns]
        near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
        raise BadInput(f"{flag} {name}: the table has no such column; {hint}it has {shown}")
    return table[name]
