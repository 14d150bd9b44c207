"""`jaxgpt emergence`: from a table of scores to how suddenly each task's score rises, where, and how surely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments import flags
from experiments.fitting import read_table
from experiments.keep import column, kept
from jaxgpt.config import BadInput

if TYPE_CHECKING:
    import numpy
    import pandas

LEAST_SIZES = 3
ABOVE = 0.1  # over chance, at any size: what is counted as apparent emergence
ALPHA = 0.05  # chance that any of all tasks survives correction by luck; what survives is never "not resolved"
SMALLER = ("brier", "edit_distance", "hamming", "loss")  # columns whose scores are better when smaller
LEGEND = (
    "threshold: where the score is halfway from chance to its ceiling; N90 / N10: how many times larger the scale is "
    "at 90 % of that way than at 10 %, 1 of a jump",
    "B: breakthroughness, range over median step, below 0 where scores fall; line, logistic: B of a straight line and "
    "of a smooth logistic curve over as many sizes, without noise",
    "smooth: the B that 95 % of smooth curves stay below with so many questions (noise makes B smaller); power: share "
    "of sudden steps beyond that",
    "linearity / step: 1 of a straight line, -1 of a falling one",
    "p: share of random orders of the same scores with a B as large; a clean jump has a large p too, so p does not "
    "rank suddenness",
)


@dataclass(frozen=True)
class Scores:
    """A task's scores. scale_M: sizes, rising; score_MxS: the seeds' scores at each; n_M: questions at each, all seeds
    together; chance: of guessing. rows: (scale, score, n, seed) of each row, as `analysis.thresholds` takes them."""

    task: str
    scale_M: numpy.ndarray
    score_MxS: list[numpy.ndarray]
    n_M: numpy.ndarray | None
    chance: float | None
    rows: Mapping[str, Any]

    @property
    def mean_M(self) -> numpy.ndarray:
        import numpy as np

        return np.asarray([score_S.mean() for score_S in self.score_MxS])

    @property
    def seeds(self) -> int:
        """At the size that has the fewest."""
        return min(map(len, self.score_MxS))

    @property
    def asked_M(self) -> numpy.ndarray | None:
        """Different questions at each size: seeds answer the same ones, so more seeds are not more questions."""
        import numpy as np

        return None if self.n_M is None else np.rint(self.n_M / [len(score_S) for score_S in self.score_MxS])


def emergence(flags: flags.Emergence) -> dict[str, Any]:
    """Reads and measures: the numbers for machines. Raises BadInput and FitError, one line each."""
    if not 0 < flags.level < 1:
        raise BadInput(f"--level {flags.level} is not allowed; it must lie between 0 and 1")
    if flags.resamples < 20:
        raise BadInput(f"--resamples {flags.resamples} is not allowed; it must be at least 20")
    table, notes = read_table(flags.table)
    if flags.keep is not None:
        rows_M = kept(table, flags.keep)
        notes.append(f"--keep left {int(rows_M.sum())} of {len(rows_M)} rows")
        table = table.loc[rows_M]
    if flags.score in SMALLER:
        notes.append(f"--score {flags.score}: smaller is better, but scores are expected to rise; give a column of "
                     f"1 - {flags.score}")  # fmt: skip
    table, left_out = without_empty(table, flags)
    found = read(table, flags)
    tasks = [measure(scores, flags.method, flags.level, flags.resamples) for scores in found]
    luck = _luck(found, tasks, flags.level)
    for task, chances in zip(tasks, luck.pop("tasks", []), strict=False):
        task |= chances
    return {
        "table": {"file": str(flags.table), "keep": flags.keep, "rows": len(table)}, "level": flags.level,
        "resamples": flags.resamples, "notes": notes + left_out, "tasks": tasks, "luck": luck or None,
    }  # fmt: skip


# --- the table -----------------------------------------------------------------------------------------------------


def without_empty(table: pandas.DataFrame, flags: flags.Emergence) -> tuple[pandas.DataFrame, list[str]]:
    """The table without rows that have no scale and without tasks that have no score at all, and what to say of it.

    Raises BadInput where nothing is left.
    """
    notes = []
    sized_R = column(table, flags.scale, "--scale").notna()
    if not sized_R.all():
        notes.append(f"{int((~sized_R).sum())} of {len(table)} rows are left out: --scale {flags.scale} is empty there")
    scored_R = column(table, flags.score, "--score").notna()
    task_R = column(table, flags.task, "--task")
    with_scores = set(task_R[sized_R & scored_R])
    without = [task for task in dict.fromkeys(task_R[sized_R].dropna()) if task not in with_scores]
    if len(table) and not with_scores:
        raise BadInput(f"--score {flags.score} and --scale {flags.scale}: no row holds both")
    if without:
        notes.append(f"left out, --score {flags.score} is empty in all their rows: {', '.join(map(str, without))}")
    return table.loc[sized_R & ~task_R.isin(without)], notes


def read(table: pandas.DataFrame, flags: flags.Emergence) -> list[Scores]:
    """The scores of each task, in the table's order. Raises BadInput that names the column, the row and the value."""
    import numpy as np

    if not len(table):
        raise BadInput(f"{flags.table} has no rows")
    task_R = _words(table, flags.task, "--task", flags)
    scale_R = _numbers(table, flags.scale, "--scale", flags, lambda v: v > 0, "positive finite numbers")
    share = flags.chance is not None or flags.n is not None
    inside = (lambda v: (v >= 0) & (v <= 1)) if share else np.isfinite
    allowed = "shares from 0 to 1 go with --chance and --n" if share else "finite numbers"
    columns: dict[str, Any] = {
        "score": _numbers(table, flags.score, "--score", flags, inside, allowed),
        "chance": _numbers(table, flags.chance, "--chance", flags, lambda v: (v >= 0) & (v < 1),
                           "shares from 0 to below 1"),
        "n": _numbers(table, flags.n, "--n", flags, lambda v: (v >= 1) & (v == np.rint(v)),
                      "whole numbers, 1 or more,"),
        "seed": None if flags.seed is None else _words(table, flags.seed, "--seed", flags),
    }  # fmt: skip
    found = []
    for task in dict.fromkeys(task_R):
        rows_R = task_R == task
        here = {name: None if values is None else values[rows_R] for name, values in columns.items()}
        found.append(_scores_of(task, scale_R[rows_R], here, flags))
    return found


def _scores_of(task: str, scale_R: numpy.ndarray, here: Mapping[str, Any], flags: flags.Emergence) -> Scores:
    import numpy as np

    what = f"--task {flags.task}={task}"
    scale_M, which_R = np.unique(scale_R, return_inverse=True)
    if len(scale_M) < LEAST_SIZES:
        raise BadInput(f"{what} has {len(scale_M)} size{'s' * (len(scale_M) > 1)} ({flags.scale}); at least "
                       f"{LEAST_SIZES} are needed")  # fmt: skip
    seen: set[tuple[float, Any]] = set()
    for at, scale in enumerate(scale_R):
        key = (float(scale), None if here["seed"] is None else here["seed"][at])
        if key in seen:
            which = f"{flags.scale}={scale:g}" + ("" if key[1] is None else f" and {flags.seed}={key[1]}")
            mend = (
                "--seed COL names the column of seeds"
                if key[1] is None
                else ("--keep can leave rows out, as --keep 'step == 1000' where a run has several checkpoints")
            )
            raise BadInput(f"{what} has two rows with {which}; {mend}")
        seen.add(key)
    chances = np.unique(here["chance"]) if here["chance"] is not None else []
    if len(chances) > 1:
        raise BadInput(f"{what} has different chances: --chance {flags.chance} is {chances[0]:g} and {chances[1]:g}")
    return Scores(
        task, scale_M, [here["score"][which_R == m] for m in range(len(scale_M))],
        None if here["n"] is None else np.bincount(which_R, here["n"]).astype(int),
        float(chances[0]) if len(chances) else None, {"scale": scale_R, **here},
    )  # fmt: skip


def _place(table: pandas.DataFrame, at: int, flags: flags.Emergence) -> str:
    """Where a user finds a row of the table: the line of a text file, the header being line 1, and its task."""
    index = table.index[at]
    header = {".csv": 2, ".jsonl": 1}.get(flags.table.suffix)
    where = f"row {index}" if header is None else f"line {index + header}"
    return f"{where} of {flags.table.name} ({flags.task}={table[flags.task].iloc[at]})"


def _numbers(
    table: pandas.DataFrame, name: str | None, flag: str, flags: flags.Emergence, fits: Any, allowed: str
) -> Any:  # fmt: skip
    """A column of numbers that fit, or BadInput; None without a name."""
    import numpy as np
    import pandas

    if name is None:
        return None
    values = column(table, name, flag)
    numbers = np.asarray(pandas.to_numeric(values, errors="coerce"), dtype=np.float64)
    bad = np.flatnonzero(~(np.isfinite(numbers) & fits(numbers)))
    if len(bad):
        held = values.iloc[bad[0]]
        shown = "nothing" if pandas.isna(held) else held
        raise BadInput(f"{flag} {name}: {_place(table, bad[0], flags)} holds {shown}; only {allowed} fit")
    return numbers


def _words(table: pandas.DataFrame, name: str, flag: str, flags: flags.Emergence) -> numpy.ndarray:
    import numpy as np

    values = column(table, name, flag)
    empty = np.flatnonzero(values.isna())
    if len(empty):
        raise BadInput(f"{flag} {name}: {_place(table, empty[0], flags)} holds nothing; every row needs a label")
    return np.asarray(values.astype(str), dtype=object)


# --- measures ------------------------------------------------------------------------------------------------------


def measure(scores: Scores, method: str, level: float, resamples: int) -> dict[str, Any]:
    """What is told of a task. Intervals are over seeds where every size has several, else over questions where their
    number is known, else null. Raises FitError."""
    from analysis import emergence

    mean_M = scores.mean_M
    b = emergence.breakthroughness(scores.scale_M, mean_M)
    straight = emergence.linearity(scores.scale_M, mean_M)
    null = emergence.nulls(len(mean_M), mean_M, level=level)
    draws_BxM, source = _draws(scores, resamples)

    def span(value: float | None, of: Any) -> list[float] | None:
        if value is None or draws_BxM is None:
            return None
        found = emergence.interval(value, of(draws_BxM), level)
        return None if found is None else list(found)

    root = span(straight.root_mean_square, emergence.linearities)
    steps = len(mean_M) - 1
    told = {
        "task": scores.task, "sizes": len(mean_M), "seeds": scores.seeds, "chance": scores.chance,
        "scales": scores.scale_M.tolist(), "scores": mean_M.tolist(),
        "breakthroughness": b.value, "breakthroughness_interval": span(b.value, emergence.breakthroughs),
        "linearity": straight.root_mean_square, "linearity_interval": root,
        "linearity_per_step": straight.per_step,
        "linearity_per_step_interval": None if root is None else [end / steps for end in root],
        "intervals_over": source,
        "line": null.line, "logistic": null.logistic, "permuted_interval": _ends(null.low, null.high), "p": null.p,
    }  # fmt: skip
    told |= _against_smooth(scores)
    told |= _threshold(scores, method, level, resamples)
    told["modes"] = _modes(scores)
    told["flags"] = _flags(scores, b, straight, told)
    return told


def _against_smooth(scores: Scores) -> dict[str, Any]:
    """The null of B under the noise of the task's own questions, from chance (or its worst) to its best score."""
    from analysis.emergence import against_smooth

    if scores.n_M is None:
        return {"smooth_95": None, "power": None}
    best, worst = float(scores.mean_M.max()), float(scores.mean_M.min())
    low = min(worst if scores.chance is None else scores.chance, best)
    found = against_smooth(low, best, scores.n_M)
    return {"smooth_95": _finite(found.smooth), "power": found.power}


def _draws(scores: Scores, resamples: int) -> tuple[numpy.ndarray | None, str | None]:
    from analysis.emergence import resampled, reseeded

    if scores.seeds > 1:
        return reseeded(scores.score_MxS, resamples, 0), "seeds"
    if scores.n_M is not None:
        return resampled(scores.mean_M, scores.n_M, resamples, 0), "questions"
    return None, None


def _threshold(scores: Scores, method: Any, level: float, resamples: int) -> dict[str, Any]:
    from analysis.emergence import falls
    from analysis.thresholds import threshold

    rows = scores.rows
    found = threshold(rows["scale"], rows["score"], chance=scores.chance or 0.0, n_M=rows["n"], seed_M=rows["seed"],
                      method=method, level=level, resamples=resamples)  # fmt: skip
    sure, fall_p, remark = found.location is not None, falls(rows["scale"], rows["score"]), found.remark
    if not sure and fall_p <= ALPHA:
        remark = f"no threshold: scores fall with scale (rank correlation, p = {fall_p:.2g})"
    return {
        "method": found.method, "threshold": _finite(found.location),
        "threshold_interval": _ends(found.low, found.high) if sure else None,
        "sharpness": _finite(found.sharpness) if sure else None,
        "sharpness_interval": _ends(*found.sharpness_interval) if sure else None,
        "ceiling": _finite(found.ceiling), "ceiling_interval": _ends(*found.ceiling_interval) if sure else None,
        "threshold_p": _finite(found.p), "fall_p": fall_p, "threshold_remark": remark,
    }  # fmt: skip


def _modes(scores: Scores) -> list[dict[str, Any]]:
    """The sizes whose seeds fall into two groups."""
    from analysis.modes import modes

    found = []
    for at, (scale, score_S) in enumerate(zip(scores.scale_M, scores.score_MxS, strict=True)):
        if len(score_S) < 2:
            continue
        n = None if scores.n_M is None else float(scores.n_M[at]) / len(score_S)
        one = modes(score_S, n)
        if one.groups == 2:
            found.append({
                "scale": float(scale), "seeds": len(score_S), "means": list(one.means), "weights": list(one.weights),
                "separation": one.separation, "p": one.p,
            })  # fmt: skip
    return found


def _flags(scores: Scores, b: Any, straight: Any, told: Mapping[str, Any]) -> list[str]:
    """What to know before a number is believed, in words."""
    from analysis.emergence import unresolved_steps
    from analysis.modes import LEAST_FOR_ONE

    found = []
    if b.flagged or straight.flagged:
        found.append(f"no B: {b.flagged or straight.flagged}")
    elif b.value > 0 and b.value <= (told["smooth_95"] or told["logistic"]):
        found.append("B of a smooth curve or less")
    elif b.value > 0:
        found.append("sudden: B beyond 95 % of smooth curves" if told["smooth_95"] else "B above a smooth curve's")
    if b.value is not None and scores.n_M is not None and unresolved_steps(scores.mean_M, scores.n_M) >= 0.5:
        found.append("half of the steps lie within their noise")
    if told["threshold_remark"]:
        found.append(told["threshold_remark"])
    if told["modes"]:
        where = ", ".join(_size(one["scale"]) for one in told["modes"])
        if scores.n_M is None and min(one["seeds"] for one in told["modes"]) < LEAST_FOR_ONE:
            found.append(f"seeds may fall into two groups at {where}: too few seeds to say without --n")
        else:
            found.append(f"seeds fall into two groups at {where}: their mean is nobody's score")
    return found


def _luck(found: list[Scores], told: list[dict[str, Any]], level: float) -> dict[str, Any]:
    """How many tasks guessing would lift `ABOVE` over chance, how many are, and how many of these survive correction
    and do not fall with scale."""
    import numpy as np

    from analysis import emergence

    flagged, p_T, single_T, task_T = [], [], [], []
    for one in found:
        asked_M = one.asked_M
        if one.chance is None or asked_M is None:
            return {}
        chance, n, mean = [one.chance], asked_M[None], one.mean_M
        p_T.append(float(emergence.chance_flags(chance, n, len(mean), ABOVE).task_T[0]))
        here = emergence.survivors([mean], chance, n)
        single_T.append(float(here.single_T[0]))
        task_T.append(float(here.task_T[0]))
        flagged.append(bool((mean >= one.chance + ABOVE - 1e-9).any()))
    family_T = emergence.holm(np.asarray(task_T))
    low, high = emergence.number_of(p_T, level)
    falls_T = [one["fall_p"] <= ALPHA for one in told]
    return {
        "above_chance": ABOVE, "alpha": ALPHA, "flagged": sum(flagged), "expected_by_luck": sum(p_T),
        "by_luck_interval": [low, high],
        "survive": sum(
            f and bool(p <= ALPHA) and not falls for f, p, falls in zip(flagged, family_T, falls_T, strict=True)
        ),
        "tasks": [
            {"above_chance": f, "p_luck_single": s, "p_luck_task": t, "p_luck_family": float(p)}
            for f, s, t, p in zip(flagged, single_T, task_T, family_T, strict=True)
        ],
    }  # fmt: skip


def _finite(value: float | None) -> float | None:
    import math

    return None if value is None or not math.isfinite(value) else float(value)


def _ends(low: float | None, high: float | None) -> list[float | None]:
    """An interval for JSON: null where it is open."""
    return [_finite(low), _finite(high)]


# --- the terminal --------------------------------------------------------------------------------------------------


def show(found: Mapping[str, Any], console: Console) -> None:
    """A line per task, what the columns mean, and how many tasks luck would lift over chance."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    numbers = ("B", "line", "logistic", "smooth", "power", "p", "linearity / step", "threshold", "N90 / N10")
    for name in ("task", *numbers, "to know"):
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=name in numbers, overflow="fold")
    for one in found["tasks"]:
        straight = one["linearity_per_step"]
        table.add_row(
            one["task"], _spanned(one["breakthroughness"], one["breakthroughness_interval"]),
            _size(one["line"]), _size(one["logistic"]),
            _spanned(one["smooth_95"], None), "–" if one["power"] is None else f"{one['power']:.2f}",
            "–" if one["p"] is None else f"{one['p']:.2g}",
            "–" if straight is None else f"{straight:.2f}", _spanned(one["threshold"], one["threshold_interval"]),
            _spanned(one["sharpness"], one["sharpness_interval"]), "; ".join(one["flags"]),
        )  # fmt: skip
    console.print(table)
    sources = {one["intervals_over"] for one in found["tasks"]} - {None}
    over = f"in brackets {found['level']:.0%} intervals over {' or '.join(sorted(sources))}" if sources else ""
    lines = [*found["notes"], *LEGEND, *filter(None, (over,))]
    if found["luck"]:
        luck = found["luck"]
        low, high = luck["by_luck_interval"]
        lines.append(
            f"{luck['flagged']} of {len(found['tasks'])} tasks score {luck['above_chance']:g} above chance at some "
            f"size; guessing alone would lift {luck['expected_by_luck']:.1f} ({low} to {high}); {luck['survive']} "
            f"survive when one corrects for looking at every size of every task (family-wise {luck['alpha']:g}) and "
            "leaves out what falls with scale"
        )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _spanned(value: float | None, ends: list[float | None] | None) -> str:
    if value is None:
        return "–"
    if ends is None:
        return _size(value)
    low, high = ("open" if end is None else _size(end) for end in ends)
    return f"{_size(value)} ({low} to {high})"


def _size(value: float) -> str:
    from analysis.plots import short

    return short(value)
