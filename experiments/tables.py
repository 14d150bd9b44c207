"""Runs as a person sees them in the terminal: a table of those that are done, under way and still to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxgpt.config import RunConfig, fields, from_dict


def unfinished(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows for the runs that a sweep folder plans and has not finished."""
    from jaxgpt import lease, store

    for run_id, run in store.planned(folder).items():
        if store.read_row(folder, run_id, warn=lambda _: None):  # the table has warned already
            continue
        config, curve = from_dict(run["config"], RunConfig), store.read_curve(folder, run_id)
        status = "under way" if lease.holder(folder, run_id) else "stopped" if curve else "to do"
        if curve:
            status += f" at step {curve[-1]['step']:,} of {config.train.steps:,}"
        yield planned_row(run_id, config, status)


def planned_row(run_id: str, config: RunConfig, status: str) -> dict[str, Any]:
    """What is known of a run before it is done, under the names that a finished run's row has."""
    from jaxgpt import flops
    from jaxgpt.config import flatten, to_dict

    n = flops.parameters(config.model)
    sizes: dict[str, float] = {
        "params_total": n.total,
        "params_non_embedding": n.non_embedding,
        "tokens": config.tokens,
    }
    sizes["flops_6nd"] = flops.flops_6nd(n.total, config.tokens)
    return {"run_id": run_id, "status": status} | sizes | flatten(to_dict(config))


LEGEND = "N: all parameters; D: training tokens; C: 6ND FLOPs; loss: nats per token ± standard error"


def runs_table(rows: list[dict[str, Any]]) -> Table:
    """Runs for people: id, state, the settings in which they differ, N, D, C, loss, time."""
    from analysis.plots import short

    differ = [f.path for f in fields(RunConfig) if len({_setting(row.get(f.path)) for row in rows}) > 1]
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("run", lambda row: row["run_id"]),
        ("state", lambda row: row["status"]),
        *((path.partition(".")[2], lambda row, path=path: _setting(row.get(path))) for path in differ),
        ("N", lambda row: short(row["params_total"])),
        ("D", lambda row: short(row["tokens"])),
        ("C", lambda row: f"{row['flops_6nd']:.1e}"),
    ]
    if any(_is_number(row.get("final_loss")) for row in rows):
        columns += [
            ("loss", _loss),
            ("bits/byte", lambda row: _plain(row.get("final_bits_per_byte"), ".3f")),
            ("seconds", lambda row: _plain(row.get("wall_seconds"), ".1f")),
        ]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, _ in columns:
        table.add_column(
            name, justify="left" if name in ("run", "state") else "right", no_wrap=name in ("run", "C", "loss")
        )
    for row in sorted(rows, key=lambda row: (row["params_total"], row["tokens"])):
        table.add_row(*(cell(row) for _, cell in columns))
    return table


def _loss(row: dict[str, Any]) -> str:
    error = f"±{row['final_loss_sem']:.3f}" if _is_number(row.get("final_loss_sem")) else ""
    return _plain(row.get("final_loss"), ".3f") + error


def _setting(value: Any) -> str:
    """A setting as one would write it; a table's NaN is a null."""
    if value is None or value != value:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value


def _plain(value: Any, form: str) -> str:
    return format(value, form) if _is_number(value) else "–"


def count(words: Sequence[str]) -> str:
    """['done', 'done', 'to do'] -> '2 done, 1 to do'."""
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)) or "none"
