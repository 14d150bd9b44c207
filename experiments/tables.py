"""Runs as a person sees them in the terminal: a table of those that are done, under way and still to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxgpt.config import RunConfig, fields, from_dict

if TYPE_CHECKING:
    from jaxgpt.profile import Profile


def unfinished(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows for the runs that a sweep folder plans and has not finished."""
    from jaxgpt import store

    for run_id, run in store.planned(folder).items():
        if store.read_row(folder, run_id, warn=lambda _: None):  # the table has warned already
            continue
        config, curve = from_dict(run["config"], RunConfig), store.read_curve(folder, run_id)
        yield planned_row(run_id, config, status(folder, run_id, config, curve))


def status(folder: Path, run_id: str, config: RunConfig, curve: Sequence[dict[str, Any]]) -> str:
    """How a run without a row stands, as in "stopped at step 1,000 of 2,000"."""
    from jaxgpt import lease

    words = "under way" if lease.holder(folder, run_id) else "stopped" if curve else "to do"
    return words + (f" at step {curve[-1]['step']:,} of {config.train.steps:,}" if curve else "")


def planned_row(run_id: str, config: RunConfig, status: str) -> dict[str, Any]:
    """What is known of a run before it is done, under the names that a finished run's row has."""
    from jaxgpt import flops
    from jaxgpt.config import flatten, to_dict

    n = flops.parameters(config.model)
    sizes: dict[str, float] = {
        "params_total": n.total,
        "params_non_embedding": n.non_embedding,
        "params_active": n.active,
        "tokens": config.tokens,
    }
    sizes["flops_6nd"] = flops.flops_6nd(n.total, config.tokens)
    return {"run_id": run_id, "status": status} | sizes | flatten(to_dict(config))


LEGEND = "N: all parameters; D: training tokens; C: 6ND FLOPs; loss: nats per token ± standard error"


MOST_COLUMNS = 6  # of settings in a table of runs
STACKED = "not at its default"


def runs_table(rows: list[dict[str, Any]]) -> Table:
    """Runs for people: id, state, the settings and numbers of their task in which they differ, N, D, C, loss, time."""
    from analysis.plots import short

    numbers: dict[str, set[float]] = {}  # what a row lacks, of another task or not yet known, is no difference
    for name, value in ((name, value) for row in rows for name, value in row.items() if is_number(value)):
        if name.startswith("numbers."):
            numbers.setdefault(name, set()).add(value)
    own = [name for name, values in numbers.items() if len(values) > 1]
    differ = [f for f in fields(RunConfig) if len({setting(row.get(f.path)) for row in rows}) > 1]
    settings: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        (f.path.partition(".")[2], lambda row, path=f.path: setting(row.get(path))) for f in differ
    ]
    if len(differ) > MOST_COLUMNS:  # they would leave no room for the numbers

        def stacked(row: dict[str, Any]) -> str:
            changed = [f for f in differ if f.path in row and setting(row[f.path]) != setting(f.default)]
            return " ".join(f"{f.path.partition('.')[2]}={setting(row[f.path])}" for f in changed)

        settings = [(STACKED, stacked)]
    settings += [(name.partition(".")[2], lambda row, name=name: plain(row.get(name), "g")) for name in own]
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("run", lambda row: row["run_id"]),
        ("state", lambda row: row["status"]),
        *([("population", lambda row: row["population"])] if all("population" in row for row in rows) else []),
        *settings,
        ("N", lambda row: short(row["params_total"])),
        ("D", lambda row: short(row["tokens"])),
        ("C", lambda row: f"{row['flops_6nd']:.1e}"),
    ]
    if any(is_number(row.get("final_loss")) for row in rows):
        columns += [
            ("loss", _loss),
            ("bits/byte", lambda row: plain(row.get("final_bits_per_byte"), ".3f")),
            ("seconds", lambda row: plain(row.get("wall_seconds"), ".1f")),
        ]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, _ in columns:
        left, number = name in ("run", "state", STACKED), name in ("run", "N", "D", "C", "loss", "bits/byte", "seconds")
        table.add_column(name, justify="left" if left else "right", no_wrap=number, overflow="fold")
    for row in sorted(rows, key=lambda row: (row["params_total"], row["tokens"])):
        table.add_row(*(cell(row) for _, cell in columns))
    return table


def _loss(row: dict[str, Any]) -> str:
    error = f"±{row['final_loss_sem']:.3f}" if is_number(row.get("final_loss_sem")) else ""
    return plain(row.get("final_loss"), ".3f") + error


def setting(value: Any) -> str:
    """A setting as one would write it; a table's NaN is a null."""
    if value is None or value != value:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> bool:
    """Whether there is something to print; a table's NaN is a null."""
    return isinstance(value, (int, float)) and value == value


def plain(value: Any, form: str) -> str:
    """A number, or a dash where there is none."""
    return format(value, form) if is_number(value) else "–"


def profile_table(found: Profile) -> Table:
    """What a step costs, for people."""
    per_step = found.dispatch_seconds / found.steps_per_dispatch
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_header=False, title_justify="left",
                  title=f"a step on {found.device}, {found.dtype}")  # fmt: skip
    compiled = "read from the cache" if found.from_cache else "compiled"
    steps = f"{found.steps_per_dispatch} step{'s' * (found.steps_per_dispatch > 1)}"
    unknown = f"no published peak for {found.device} with {found.dtype}"
    rows = [
        ("program", f"traced in {found.trace_seconds:.2f} s, {compiled} in {found.compile_seconds:.2f} s"),
        ("step", f"{1e3 * per_step:.3g} ms, {found.tokens_per_second:,.0f} tokens/s"),
        ("dispatch", f"{steps} in {1e3 * found.dispatch_seconds:.3g} ms; Python goes on after "
                     f"{1e3 * found.host_seconds:.3g} ms"),
        ("device", "the trace names no operation" if found.device_seconds is None else
                   f"busy {1e3 * found.device_seconds:.3g} ms of a traced step"),
        ("FLOPs", f"{plain(found.flops_exact, '.3g')} (matrix products, causal); "
                  f"XLA counts {plain(found.xla_flops, '.3g')}"),
        ("speed", f"{plain(found.flops_per_second, '.3g')} FLOPs/s; MFU: "
                  + (unknown if found.mfu is None else f"{100 * found.mfu:.1f} %")),
        ("memory", ", ".join(f"{name} {bytes / 1e6:,.1f} MB" for name, bytes in found.memory.items())
                   or "XLA tells no plan"),
        ("time by kind", ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in found.shares.items())
                         or "the trace names no operation"),
    ]  # fmt: skip
    for name, value in rows:
        table.add_row(name, value)
    return table


def count(words: Sequence[str]) -> str:
    """['done', 'done', 'to do'] -> '2 done, 1 to do'."""
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)) or "none"
