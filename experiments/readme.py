"""Writes the README's table of papers from the registry and results/: `python -m experiments.readme`."""

from __future__ import annotations

from pathlib import Path

from experiments.registry import papers
from experiments.reproduction import number, outcome_folder
from jaxgpt import store

BEGIN = "<!-- papers: made by `python -m experiments.readme` from results/, never typed -->\n"
END = "<!-- end of papers -->\n"


def table(results: Path) -> str:
    """The papers and, of each that has been run at laptop scale, its claims: Markdown."""
    lines = ["| paper | claim | stated | measured | verdict |", "|---|---|---|---|---|"]
    for paper in papers().values():
        path = outcome_folder(results, paper.name, "laptop") / "claims.json"
        if not path.exists():
            lines.append(f"| `{paper.name}` | {paper.title} ({paper.source}) | | | not run yet |")
            continue
        for c in store.read_json(path):
            interval = f"{number(c['measured'])} ({number(c['interval'][0])} to {number(c['interval'][1])})"
            stated = f"{c['expected']:g} ± {c['margin']:g}"
            statement = c["statement"].replace("|", "\\|")  # a bar would end the cell
            lines.append(f"| `{paper.name}` | {statement} | {stated} | {interval} | {c['verdict']} |")
    return "\n".join(lines) + "\n"


def updated(readme: str, results: Path) -> str:
    """The README's text with a fresh table."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + "\n" + table(results) + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "README.md"
    path.write_text(updated(path.read_text(), path.parent / "results"))
