"""Writes the README's table of papers from the registry and results/: `python -m experiments.readme`."""

from __future__ import annotations

from pathlib import Path

from experiments.claims import VERDICTS
from experiments.registry import papers
from experiments.reproduction import outcome_folder
from experiments.tables import count
from jaxgpt import store

BEGIN = "<!-- papers: made by `python -m experiments.readme` from results/, never typed -->\n"
END = "<!-- end of papers -->\n"


def table(results: Path) -> str:
    """The papers, and how the claims of each came out at laptop scale: Markdown, one line each."""
    lines, group = ["| paper | what is put to the test | claims at laptop scale |", "|---|---|---|"], ""
    for paper in papers().values():
        if paper.group != group:
            group = paper.group
            lines.append(f"| **{group}** | | |")
        folder = outcome_folder(results, paper.name, "laptop")
        said = "not run yet"
        if (folder / "claims.json").exists():
            verdicts = [claim["verdict"] for claim in store.read_json(folder / "claims.json")]
            said = f"[{count(sorted(verdicts, key=VERDICTS.index))}](results/{paper.name}/claims.json)"
        lines.append(f"| `{paper.name}` | {paper.title} ({paper.source}) | {said} |")
    return "\n".join(lines) + "\n"


def updated(readme: str, results: Path) -> str:
    """The README's text with a fresh table."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + "\n" + table(results) + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "README.md"
    path.write_text(updated(path.read_text(), path.parent / "results"))
