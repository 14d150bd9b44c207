"""One reproduction from start to end: run it, compute the verdicts, leave the files that DESIGN.md names."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.claims import record
from experiments.registry import SCALES, Job, Outcome, Paper, Scale, find
from jaxgpt import store
from jaxgpt.config import BadInput


@dataclass(frozen=True)
class Reproduction:
    """A finished reproduction: the paper, what came out, its claims as in claims.json, and where the files are."""

    paper: Paper
    outcome: Outcome
    claims: list[dict[str, Any]]
    folder: Path


def reproduce(
    name: str, scale: Scale = "laptop", *, results: Path | str = "results", max_minutes: float | None = None
) -> Reproduction:
    """Does what is missing of a paper's runs, measures, and writes claims.json, summary.csv, figure and run.json.

    Raw runs go to `<results>/raw/<name>/<scale>`. Raises BadInput for an unknown paper or scale, and what `sweep`
    raises; Unfinished when `max_minutes` ended it before all runs were done.
    """
    paper = find(name)
    if scale not in SCALES:
        raise BadInput(f"scale={scale} is not allowed; it must be {', '.join(SCALES)}")
    if scale not in paper.takes:
        raise BadInput(f"scale={scale} is not there for {name}; it has {', '.join(paper.takes)}")
    began, raw, folder = time.monotonic(), Path(results) / "raw" / name / scale, outcome_folder(results, name, scale)
    _check(folder)
    store.prepare(raw)
    _make(folder)
    outcome = paper.run(Job(scale, raw, folder / "figure", max_minutes))
    claims = [record(claim, outcome.measured[claim.id], scale) for claim in paper.claims]
    store.write_json(folder / "claims.json", claims)
    store.write_bytes(folder / "summary.csv", outcome.summary.to_csv(index=False, lineterminator="\n").encode())
    store.write_json(folder / "run.json", {
        "command": f"jaxgpt reproduce {shlex.quote(name)}" + ("" if scale == "laptop" else f" --scale {scale}"),
        "scale": scale, **_provenance(outcome, raw), "device": outcome.device, "corpus_sha256": outcome.corpus_sha256,
        "seconds_training": outcome.seconds_training, "seconds_this_call": round(time.monotonic() - began, 1),
    })  # fmt: skip
    return Reproduction(paper, outcome, claims, folder)


def _provenance(outcome: Outcome, raw: Path) -> dict[str, Any]:
    """For run.json: what trained the runs that the summary names (`code_versions` and, by package, `versions`; lists of
    the distinct ones), and what made claims and figures of them now (`analysis_code_version`, `analysis_versions`).
    """
    columns = {name: list(column) for name, column in outcome.summary.items()}
    folders = [raw, *sorted(raw.parents[1].glob(f"*/{raw.name}"))]  # papers share sweeps
    found = ((store.read_row(folder, run_id, warn=lambda _: None) for folder in folders)
             for run_id in columns.get("run_id", []))  # fmt: skip
    rows = [next((row for row in each if row), {}) for each in found]
    versions = [row["versions"] for row in rows if "versions" in row]
    return {
        "code_versions": list(dict.fromkeys(columns.get("code_version", []))),
        "versions": {name: list(dict.fromkeys(v.get(name) for v in versions)) for name in (versions or [{}])[0]},
        "analysis_code_version": store.code_version(),
        "analysis_versions": store.package_versions(),
    }


def outcome_folder(results: Path | str, name: str, scale: Scale) -> Path:
    """Where a reproduction leaves its files. Laptop and paper scale are for committing, smoke is not."""
    results = Path(results)
    return {"smoke": results / "raw" / name / "smoke" / "outcome", "laptop": results / name,
            "paper": results / name / "paper"}[scale]  # fmt: skip


def _check(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise BadInput(f"{folder}: {nearest} is a file; a folder is needed")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store.store_error(folder, error) from error


def show(done: Reproduction, console: Console) -> None:
    """Prints the summary, the claims with their verdicts, and, as the last line, the figure's path."""
    for title, frame in done.outcome.tables:
        table = Table(*map(str, frame.columns), title=title, title_justify="left")
        for row in frame.itertuples(index=False):
            table.add_row(*map(str, row))
        console.print(table)
    console.print(claims_table(done.claims))
    console.print(
        f"Wrote claims.json, summary.csv, run.json and the figure (PNG, SVG) to {done.folder}", soft_wrap=True
    )
    if any(claim["scale"] != "smoke" for claim in done.claims):
        console.print("`jaxgpt report` puts it on the page of all results")
    else:
        console.print(
            "smoke only shows that it runs: models this small say nothing on the paper, whatever the verdicts"
        )
    # Plain print: rich would break a long path.
    sys.stdout.write(f"{done.outcome.figures[0]}\n")


def claims_table(claims: list[dict[str, Any]]) -> Table:
    """What the source states, what we measured with its interval, and the verdict."""
    table = Table(title="Claims", title_justify="left", caption_justify="left")
    for column in ("claim", "stated", "measured", "interval", "seeds", "verdict"):
        table.add_column(column, overflow="fold", justify="left" if column in ("claim", "verdict") else "right")
    for c in claims:
        unit = f" {c['unit']}" if c["unit"] != "1" else ""
        low, high = map(number, c["interval"])
        interval = low if low == high == number(None) else f"{c['level']:.0%}: {low} to {high}"
        stated = f"{c['expected']:g} ± {c['margin']:g}{unit}"
        claim = f"{c['statement']} ({c['source']})"
        table.add_row(
            claim,
            stated,
            number(c["measured"]),
            interval,
            str(c["seeds"]),
            c["verdict"] + (c["remark"] and f": {c['remark']}"),
        )
    table.caption = (
        "reproduced: interval inside stated ± margin; contradicted (far from the source's scale: not seen at this "
        "scale): disjoint from it; else inconclusive"
    )
    return table


def number(value: float | None) -> str:
    """A measured number for people; a dash where there is none."""
    return "–" if value is None or value != value else f"{value:.3g}"
