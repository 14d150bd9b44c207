"""`jaxgpt report`: reads what reproductions left in results/ and writes the results page."""

from __future__ import annotations

import csv
import io
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis.report import ClaimRow, Result, page
from experiments.registry import Paper, papers
from experiments.reproduction import outcome_folder
from jaxgpt import store
from jaxgpt.config import BadInput

FILES = ("claims.json", "run.json", "summary.csv", "figure.svg", "figure.png")
NUMBERS = {"expected", "margin", "level", "seeds"}
WORDS = {"statement", "source", "unit", "scope", "verdict"}


def report(results: Path, out: Path, console: Console) -> None:
    """Writes the page of everything below `results` to `out`, and prints its path as the last line.

    What is missing or broken is named on stderr and in the page. Raises BadInput where there is no reproduction at all.
    """
    found = collect(results)
    if not found:
        raise BadInput(f"results={results} holds no reproduction; `jaxgpt reproduce demo` makes one")
    for result in found:
        for problem in result.problems:
            sys.stderr.write(f"jaxgpt: {problem}\n")
    done = {result.name for result in found}
    not_run = {name: paper.title for name, paper in papers().items() if name not in done}
    store.write_bytes(out, page(found, not_run).encode())
    claims = sum(len(result.claims) for result in found)
    console.print(f"claims: {claims}, papers: {len(done)}; open this file in a browser:", soft_wrap=True)
    sys.stdout.write(f"{out}\n")  # rich would break a long path


def collect(results: Path) -> list[Result]:
    """Every reproduction below `results`, at laptop scale and at paper scale, by name.

    What is missing or broken is named in a result's `problems`, a line each.
    """
    names = sorted(path.name for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    found = []
    for name in names:
        for scale in ("laptop", "paper"):
            folder = outcome_folder(results, name, scale)
            if name != "raw" and any((folder / file).exists() for file in FILES):
                found.append(_result(folder, name, scale, papers().get(name)))
    return found


def _result(folder: Path, name: str, scale: Any, paper: Paper | None) -> Result:
    problems: list[str] = []

    def read(file: str, reader: Any, otherwise: Any, *, needed: bool = True) -> Any:
        path = folder / file
        try:
            return reader(path)
        except FileNotFoundError:
            if needed:
                problems.append(f"{path} is missing")
        except BadInput as error:
            problems.append(" ".join(str(error).split()))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            problems.append(f"{path} cannot be read: {error}")
        return otherwise

    claims = read("claims.json", _claims, ())
    run = read("run.json", _run, {})
    summary = read("summary.csv", _summary, ())
    svg = read("figure.svg", lambda path: path.read_text(encoding="utf-8"), None, needed=False)
    png = read("figure.png", Path.read_bytes, None, needed=False)
    title, source, takes = (paper.title, paper.source, paper.takes.get(scale, "")) if paper else (name, "", "")
    return Result(name, title, source, scale, claims, run, summary, svg, png, takes, tuple(problems))


def _claims(path: Path) -> tuple[ClaimRow, ...]:
    entries = store.read_json(path)
    if not isinstance(entries, list):
        raise BadInput(f"{path} is not allowed; it must hold a list of claims")
    return tuple(_claim(path, number, entry) for number, entry in enumerate(entries, start=1))


def _claim(path: Path, number: int, entry: Any) -> ClaimRow:
    """Raises BadInput that names the field which is missing or wrong."""
    where = f"{path}: claim {number}"
    if not isinstance(entry, dict):
        raise BadInput(f"{where} is not an object with fields")
    for field in sorted(NUMBERS | WORDS):
        value = entry.get(field)
        if not (isinstance(value, str) if field in WORDS else _number(value) is not None):
            raise BadInput(f"{where} has {field}={value!r}; it must be {'text' if field in WORDS else 'a number'}")
    if not entry["margin"] > 0:
        raise BadInput(f"{where} has margin={entry['margin']!r}; it must be above 0")
    interval = entry.get("interval")
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    return ClaimRow(
        row=entry["row"] if isinstance(entry.get("row"), int) else None,
        measured=_number(entry.get("measured")),
        low=_number(low),
        high=_number(high),
        remark=str(entry.get("remark") or ""),
        **{field: entry[field] for field in NUMBERS | WORDS},
    )


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if fits else None


def _run(path: Path) -> dict[str, Any]:
    run = store.read_json(path)
    if not isinstance(run, dict):
        raise BadInput(f"{path} is not allowed; it must hold an object with fields")
    return run


def _summary(path: Path) -> tuple[tuple[str, ...], ...]:
    """The header and the rows, each as long as the header."""
    rows = [tuple(row) for row in csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)]
    if not rows:
        return ()
    width = len(rows[0])
    for number, row in enumerate(rows, start=1):
        if len(row) != width:
            raise BadInput(f"{path}: line {number} has {len(row)} cells; the header has {width}")
    return tuple(rows)
