"""What a table can tell: its columns, and whether they can separate a law's parameters."""

from collections.abc import Mapping

import numpy as np

from analysis.laws import Law
from analysis.solve import Problem, spread_starts

LEAST_SPREAD = 0.05  # of the log of one variable given another; less and the two count as one variable
ROUNDING = 1e-14  # of the same: what a singular table has of it by rounding alone
FLAT = 1e-10  # of the largest curvature; where the losses curve less, they do not depend on that direction


class FitError(ValueError):
    """The table cannot be fitted; the message is one line that says why and what is needed."""


def _column(name: str, values) -> np.ndarray:
    """(M,) positive finite numbers, or a FitError that names the column, the value and its row."""
    try:
        column = np.asarray(values, dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise FitError(f"column {name} is not numeric: {error}") from None
    bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
    if len(bad):
        raise FitError(f"column {name} holds {column[bad[0]]:g} (row {bad[0]}); only positive finite numbers fit")
    return column


def check_columns(law: Law, table: Mapping, loss) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the variables (V, M) and of the loss (M,), or a FitError that says what is wrong with them."""
    missing = [v for v in law.variables if v not in table]
    if missing:
        raise FitError(f"the table lacks {', '.join(missing)}; the {law.name} law needs {', '.join(law.variables)}")
    columns = {
        name: _column(name, column) for name, column in {**{v: table[v] for v in law.variables}, "loss": loss}.items()
    }
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise FitError("columns differ in length: " + ", ".join(f"{name} has {n}" for name, n in lengths.items()))
    needed = max(len(law.names) + 2, law.least_points)
    if lengths["loss"] < needed:
        raise FitError(f"{lengths['loss']} points are too few: the {law.name} law needs at least {needed}")
    rows, first, count = np.unique(np.stack(list(columns.values())), axis=1, return_index=True, return_counts=True)
    if rows.shape[1] < lengths["loss"]:
        twice = np.flatnonzero(count > 1)
        row = rows[:, twice[first[twice].argmin()]]
        same = np.flatnonzero((np.stack(list(columns.values())) == row[:, None]).all(axis=0))
        point = ", ".join(f"{name}={value:g}" for name, value in zip(columns, row, strict=True))
        raise FitError(
            f"rows {' and '.join(map(str, same))} are the same point, {point}: the bootstrap would take them for "
            "independent runs; keep one"
        )
    return np.log([columns[v] for v in law.variables]), np.log(columns["loss"])


def check_weights(weights, groups, points: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Weights (M,), ones when there are none, and labels (M,) or None."""
    weights_M = _column("weights", np.ones(points) if weights is None else weights)
    groups_M = None if groups is None else np.asarray(groups).ravel()
    for name, column in (("weights", weights_M), ("groups", groups_M)):
        if column is not None and len(column) != points:
            raise FitError(f"columns differ in length: {name} has {len(column)}, loss has {points}")
    labels = [] if groups is None else np.asarray(groups, dtype=object).ravel().tolist()  # else NaN becomes a word
    for row, label in enumerate(labels):
        if label is None or label != label:
            raise FitError(f"groups holds {label} (row {row}); every point needs a label")
    if groups_M is not None and len(np.unique(groups_M)) < 2:
        raise FitError(f"all {points} points are in one group; intervals over groups need at least 2")
    return weights_M, groups_M


def check_design(problem: Problem) -> np.ndarray:
    """Slopes (M, p) of log loss by which resamples are judged; FitError when no loss could separate the parameters."""
    law, logs_VxM = problem.law, problem.logs_VxM
    in_terms = [v for v in law.variables if any(v in powers for _, powers in law.terms)]
    logs = {v: logs_VxM[law.variables.index(v)] for v in in_terms}
    for i, first in enumerate(in_terms):
        for second in in_terms[i + 1 :]:
            spread = np.std(logs[first])
            slope = np.mean(logs[first] * logs[second]) / spread**2 if spread else 0.0
            if spread > LEAST_SPREAD > np.std(logs[second] - slope * logs[first]) and np.ptp(logs[second]) > 1e-9:
                raise FitError(
                    f"{second} is {first}^{slope:.2g} times a constant within {LEAST_SPREAD:.0%}, so their "
                    f"terms cannot be separated; vary {second} at fixed {first}"
                )
    for theta_p in _references(problem):
        slopes_Mxp = slopes(problem, theta_p)
        if determined(slopes_Mxp, np.ones((1, len(slopes_Mxp))))[0]:
            return slopes_Mxp
    for name in in_terms:
        different = len(np.unique(np.round(logs[name], 9)))
        if different < 3:
            raise FitError(f"the table has {different} different {name}; separating the parameters needs at least 3")
    raise FitError(f"these points cannot separate {', '.join(law.names)}; vary {', '.join(law.variables)} more")


def _references(problem: Problem) -> np.ndarray:
    """Coordinates (R, p) at which to ask whether a table can separate the parameters.

    First where all terms are equal and all exponents 1/2: where D follows N, the terms then coincide. A sum of power
    laws needs no other; a curve may be flat in a parameter there, but not everywhere.
    """
    middle_p = problem.law.box("start", problem.logs_VxM).mean(axis=1)
    at = {"coefficient": 0.0, "scale": 0.0, "exponent": 0.5}
    equal_1xp = np.array([[at.get(p.kind, m) for p, m in zip(problem.law.parameters, middle_p, strict=True)]])
    return equal_1xp if problem.law.curve is None else np.concatenate([equal_1xp, spread_starts(problem, 20)])


def slopes(problem: Problem, theta_p: np.ndarray) -> np.ndarray:
    """(M, p) slopes of log loss by the coordinates: central differences, good to about 1e-10."""
    step_pxp = 1e-5 * np.eye(len(theta_p))
    return ((problem.losses(theta_p + step_pxp) - problem.losses(theta_p - step_pxp)) / 2e-5).T


def determined(slopes_Mxp: np.ndarray, counts_BxM: np.ndarray) -> np.ndarray:
    """(B,) whether each weighting of the points has as many independent slopes as the law has parameters."""
    unit_Mxp = slopes_Mxp / np.maximum(np.linalg.norm(slopes_Mxp, axis=0), 1e-300)
    outer_Mxpp = (unit_Mxp[:, :, None] * unit_Mxp[:, None]).reshape(len(unit_Mxp), -1)
    gram_Bxpxp = (counts_BxM @ outer_Mxpp).reshape(len(counts_BxM), unit_Mxp.shape[1], -1)
    eigenvalue_Bxp = np.linalg.eigvalsh(gram_Bxpxp)
    # a law of many parameters is nearly singular in any table: a resample then needs a part of what the table has
    least = min(FLAT, max(1e-3 * float(np.linalg.eigvalsh(unit_Mxp.T @ unit_Mxp)[0]), ROUNDING))
    return eigenvalue_Bxp[:, 0] > least * eigenvalue_Bxp[:, -1]
