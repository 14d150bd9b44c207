"""The `jaxgpt` command. Each sub-command is a frozen dataclass (its flags) and a function (what it does).

Numbers go to stdout, progress and notes to stderr. Bad input: one line, exit code 2, nothing written.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import itertools
import json
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from analysis.fit import FitError
from experiments.registry import Scale, Unfinished
from experiments.tables import LEGEND, count, planned_row, runs_table, unfinished
from jaxgpt.config import BadInput, RunConfig, fields, flatten, override, parse_settings
from jaxgpt.store import StoreError, out_of_space, store_error

DESCRIPTION = """jaxgpt: a JAX research codebase for the science of scale.

Reproduce a paper (jaxgpt reproduce demo), train a model (jaxgpt train model.d_model=128), sweep over sizes, data and
seeds (jaxgpt sweep model.d_model=32,64 train.steps=200,400), look at what is there (jaxgpt runs) and take it away
(jaxgpt export). Kill anything at any time: the same command goes on where it was."""


OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Settings = Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[FIELD=VALUE ...]", help_behavior_hint="")]
Zips = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FIELD,FIELD")]


def _minutes(words: list[str]) -> float:
    with contextlib.suppress(ValueError):
        if float(words[0]) >= 0:
            return float(words[0])
    raise ValueError(f"{words[0]} is not allowed; it must be a number of minutes, 0 or more")


Minutes = Annotated[float | None, tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="MINUTES", instance_from_str=_minutes, str_from_instance=lambda minutes: [str(minutes)],
    is_instance=lambda minutes: minutes is None or isinstance(minutes, float),
)]  # fmt: skip


@dataclass(frozen=True)
class List:
    """The papers, what each takes, and what has come out so far."""

    results: Path = Path("results")
    """folder of the results"""
    json: OptionalFile = None
    """write the same here, for machines"""


@dataclass(frozen=True)
class Reproduce:
    """Train what a paper needs, measure, and print its claims with verdicts. Goes on where it was stopped."""

    name: Annotated[Positional[str], tyro.conf.arg(metavar="PAPER")]
    """a paper; `jaxgpt list` shows all"""
    scale: Scale = "laptop"
    """smoke: seconds; laptop: minutes on 2 CPU cores; paper: the paper's own sizes, for accelerators"""
    results: Path = Path("results")
    """folder of the results"""
    max_minutes: Minutes = None
    """stop cleanly after about so long; the same command goes on"""
    json: OptionalFile = None
    """write the same numbers here, for machines"""


@dataclass(frozen=True)
class Train:
    """Train one run. Settings are field=value, for example model.d_model=64."""

    settings: Settings = ()
    """field=value, for example model.d_model=64; all fields stand at the end of this page"""
    config: OptionalFile = None
    """a JSON file to start from, e.g. {"model": {"d_model": 64}}; settings come after it"""
    out: Path = Path("results/raw/train")
    """folder for the run's row, curve and checkpoints"""
    max_minutes: Minutes = None
    """stop cleanly after about so long; the same command goes on"""
    json: OptionalFile = None
    """write the run's row here"""


@dataclass(frozen=True)
class Sweep:
    """Train every combination of settings. A list of values is an axis: model.d_model=32,64 train.steps=200,400."""

    settings: Settings = ()
    """field=value, or field=value,value,... for an axis; all fields stand at the end of this page"""
    zip: Zips = ()
    """axes that go side by side instead of in all combinations, e.g. --zip model.d_model,model.n_heads"""
    config: OptionalFile = None
    """a JSON file to start from, e.g. {"model": {"d_model": 64}}; settings come after it"""
    out: Path = Path("results/raw/sweep")
    """folder for rows, curves and checkpoints; runs that are done there are not done again"""
    dry_run: bool = False
    """only print the runs with N, D, C and the estimated time"""
    max_minutes: Minutes = None
    """stop cleanly after about so long; the same command goes on"""
    json: OptionalFile = None
    """write the rows (or, with --dry-run, the plan) here"""


@dataclass(frozen=True)
class Runs:
    """A table of the runs on disk: done, under way, and still to do."""

    folders: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[FOLDER ...]", help_behavior_hint="")] = ()
    """sweep folders; none: all below results/raw"""
    json: OptionalFile = None
    """write the rows here"""


@dataclass(frozen=True)
class Export:
    """Write a run table to a .csv or .parquet file, one row per run."""

    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """a sweep folder, for example results/raw/demo/laptop"""
    file: Annotated[Positional[Path], tyro.conf.arg(metavar="FILE")]
    """where to: a name that ends in .csv or .parquet"""
    curves: bool = False
    """the training curves instead, one row per logged step"""


# --- what the commands do ------------------------------------------------------------------------------------------


def list_(flags: List, console: Console) -> None:
    """`jaxgpt list`."""
    from experiments.claims import false_verdicts_by_chance
    from experiments.registry import papers
    from experiments.reproduction import outcome_folder
    from jaxgpt import store

    table, rows = Table(), []
    for column in ("paper", "what", "scales", "state"):
        table.add_column(column, overflow="fold")
    for paper in papers().values():
        verdicts = {}
        for scale in paper.takes:
            path = outcome_folder(flags.results, paper.name, scale) / "claims.json"
            if path.exists():
                verdicts[scale] = [claim["verdict"] for claim in store.read_json(path)]
        state = "\n".join(f"{scale}: {count(found)}" for scale, found in verdicts.items()) or "not run yet"
        scales = "\n".join(f"{scale}: {takes}" for scale, takes in paper.takes.items())
        table.add_row(paper.name, f"{paper.title} ({paper.source})", scales, state)
        rows.append({"name": paper.name, "title": paper.title, "source": paper.source, "takes": dict(paper.takes),
                     "verdicts": verdicts})  # fmt: skip
    claims = [claim for paper in papers().values() for claim in paper.claims]
    chance = false_verdicts_by_chance(claims)
    console.print(table)
    console.print(
        f"{len(claims)} claims; at their interval levels at most {chance:.1f} verdicts are false by chance, on average"
    )
    _write(flags.json, {"papers": rows, "claims": len(claims), "false_verdicts_by_chance": chance})


def reproduce(flags: Reproduce, console: Console) -> None:
    """`jaxgpt reproduce`."""
    from experiments.reproduction import reproduce, show

    done = reproduce(flags.name, flags.scale, results=flags.results, max_minutes=flags.max_minutes)
    outcome = done.outcome
    numbers = {"name": flags.name, "scale": flags.scale, "claims": done.claims, **outcome.numbers}
    tables = {"summary": outcome.summary.to_dict("records"), "figures": [str(path) for path in outcome.figures]}
    _write(flags.json, numbers | tables)
    show(done, console)


def train(flags: Train, console: Console) -> None:
    """`jaxgpt train`."""
    config = override(RunConfig(), _base(flags.config) | parse_settings(flags.settings))
    rows = _sweep([config], flags.out, flags.max_minutes)
    _write(flags.json, rows[0] if rows else None)
    if rows:
        console.print(runs_table(rows))
        console.print(LEGEND)
    console.print(f"row, curve and checkpoints: {flags.out}", soft_wrap=True)


def sweep(flags: Sweep, console: Console) -> None:
    """`jaxgpt sweep`."""
    configs = _configs(_base(flags.config), parse_settings(flags.settings), flags.zip)
    if flags.dry_run:
        _dry_run(configs, flags, console)
        return
    rows = _sweep(configs, flags.out, flags.max_minutes)
    _write(flags.json, rows)
    if rows:
        console.print(runs_table(rows))
        console.print(LEGEND)
    console.print(f"rows, curves and checkpoints: {flags.out}", soft_wrap=True)


def runs(flags: Runs, console: Console) -> None:
    """`jaxgpt runs`."""
    from jaxgpt import store

    folders = flags.folders or sorted(path.parent for path in Path("results/raw").glob("**/sweep.json"))
    if not folders:
        raise BadInput("there are no runs below results/raw; `jaxgpt sweep` or `jaxgpt reproduce` makes some")
    everything: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        rows = store.load(folder, _warn)[0].to_dict("records")
        rows += [row for row in unfinished(folder) if row["run_id"] not in {done["run_id"] for done in rows}]
        everything[str(folder)] = rows
    # Before anything is printed: the reader of our output may go (`jaxgpt runs --json FILE | head`).
    _write(flags.json, everything)
    for folder, rows in everything.items():
        console.print(f"\n{folder}: {count([row['status'] for row in rows])}", soft_wrap=True)
        console.print(runs_table(rows))
    console.print(LEGEND)


def export(flags: Export, console: Console) -> None:
    """`jaxgpt export`."""
    from jaxgpt import store

    if flags.file.suffix not in (".csv", ".parquet"):
        raise BadInput(f"file={flags.file} is not allowed; its name must end in .csv or .parquet")
    _target("file", flags.file)
    table = store.load(flags.folder, _warn)[1 if flags.curves else 0]
    data = io.BytesIO()
    if flags.file.suffix == ".csv":
        table.to_csv(data, index=False, lineterminator="\n")
    else:
        table.to_parquet(data, index=False)
    store.write_bytes(flags.file, data.getvalue())
    console.print(f"{len(table)} rows, {len(table.columns)} columns: {flags.file}", soft_wrap=True)


# --- parts ---------------------------------------------------------------------------------------------------------


def _base(path: Path | None) -> dict[str, Any]:
    """The settings of a --config file by dotted path. They need not make a config by themselves."""
    from jaxgpt import store

    if path is None:
        return {}
    if not path.is_file():
        raise BadInput(f"config={path} is not there; it must be a JSON file")
    tree = store.read_json(path)
    if not isinstance(tree, dict):
        raise BadInput(f'config={path} must hold a JSON object such as {{"model": {{"d_model": 64}}}}')
    settings, known = flatten(tree), {f.path: f for f in fields(RunConfig)}
    for name, value in settings.items():
        # Strings on the command line are read by the field's type; in JSON a number is a number.
        if isinstance(value, str) and name in known and not known[name].takes_text:
            raise BadInput(
                f"config={path}: {name}={json.dumps(value)} is not allowed; it must be {known[name].allowed}"
            )
    return settings


def _configs(base: dict[str, Any], settings: dict[str, str], zips: Sequence[str]) -> list[RunConfig]:
    """Lists of values are axes, zipped where asked, else in all combinations; a single value is in all of them."""
    values = {path: value.split(",") for path, value in settings.items()}
    axes: list[list[dict[str, str]]] = []
    for group in zips:
        names = group.split(",")
        for name in names:
            if len(values.get(name, ())) < 2 or names.count(name) > 1:
                raise BadInput(f"--zip {group}: {name} is not an axis here; give it values, as in {name}=1,2")
        if len({len(values[name]) for name in names}) > 1:
            lengths = ", ".join(f"{name} has {len(values[name])}" for name in names)
            raise BadInput(f"--zip {group}: the axes need equally many values, but {lengths}")
        together = zip(*(values.pop(name) for name in names), strict=True)
        axes.append([dict(zip(names, each, strict=True)) for each in together])
    axes += [[{path: value} for value in several] for path, several in values.items()]
    # All settings of a run at once: 48 wide with 3 heads is a model, 3 heads in the default width is none.
    return [
        override(RunConfig(), base | dict(itertools.chain(*(d.items() for d in each))))
        for each in itertools.product(*axes)
    ]


def _sweep(configs: list[RunConfig], out: Path, max_minutes: float | None) -> list[dict[str, Any]]:
    """The finished runs' rows. Says so when the time was up before all were done."""
    from jaxgpt.launch import plan, sweep

    rows = sweep(configs, out, max_minutes=max_minutes).to_dict("records")
    planned = len(plan(configs, out))
    if len(rows) < planned:
        sys.stderr.write(f"time is up: {len(rows)} of {planned} runs are done; the same command goes on\n")
    return rows


def _dry_run(configs: list[RunConfig], flags: Sweep, console: Console) -> None:
    from jaxgpt import store
    from jaxgpt.launch import estimate_seconds, plan
    from jaxgpt.progress import duration

    if flags.out.exists() and not flags.out.is_dir():
        raise BadInput(f"--out {flags.out} is a file; a folder is needed")
    planned = plan(configs, flags.out)
    status = {run.id: "done" if store.read_row(run.folder, run.id) else "to do" for run in planned}
    rows = [planned_row(run.id, run.config, status[run.id]) for run in planned]
    seconds = estimate_seconds(planned)
    console.print(runs_table(rows))
    console.print(LEGEND)
    console.print(f"{count(list(status.values()))}; what is to do takes about {duration(seconds)} (a rough estimate)")
    _write(flags.json, {"runs": rows, "estimated_seconds": seconds})


def _target(name: str, path: Path | None) -> None:
    """Raises BadInput, before any work, for a file that could not be written at the end."""
    if path is not None and path.is_dir():
        raise BadInput(f"{name}={path} is a folder; it must be a file")
    if path is not None and not path.absolute().parent.is_dir():
        raise BadInput(f"{name}={path} is not allowed; there is no folder {path.absolute().parent}")


def _warn(line: str) -> None:
    sys.stderr.write(f"jaxgpt: {line}\n")


def _write(path: Path | None, numbers: Any) -> None:
    from jaxgpt import store

    if path is not None:
        store.write_json(path, numbers)


# --- the command ---------------------------------------------------------------------------------------------------


def _all_fields() -> Table:
    """Every field of a run's config, for the end of `train --help` and `sweep --help`."""
    table = Table(title="Fields of a run", title_justify="left")
    for column in ("field=default", "what it means", "allowed"):
        table.add_column(column, overflow="fold")  # a name cut short could not be typed
    for f in fields(RunConfig):
        default = f.default if isinstance(f.default, str) else json.dumps(f.default)
        table.add_row(f"{f.path}={default}", f.help, f.allowed)
    return table


COMMANDS: dict[type, tuple[str, Callable[[Any, Console], None]]] = {
    List: ("list", list_),
    Reproduce: ("reproduce", reproduce),
    Train: ("train", train),
    Sweep: ("sweep", sweep),
    Runs: ("runs", runs),
    Export: ("export", export),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 2 bad input or a full disk, 130 after Ctrl-C, 143 after SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no ± shows a ?
            stream.reconfigure(errors="replace")
    try:
        _run(words)
    except KeyboardInterrupt as stopped:
        reason = str(stopped) or "stopped"
        sys.stderr.write(f"\njaxgpt: {reason}; the same command goes on\n")
        sys.exit(128 + getattr(stopped, "signum", 2))
    except BrokenPipeError:  # the reader of our output has gone: `jaxgpt list | head`
        sys.stderr.close()
        sys.exit(141)
    except Unfinished as error:
        sys.stderr.write(f"{error}\n")
    except (BadInput, FitError, OSError) as error:
        # The user's to mend; anything else is a bug and shows its traceback.
        if isinstance(error, OSError) and not isinstance(error, StoreError):
            if not out_of_space(error):
                raise
            error = store_error(error.filename or "the disk", error)
        sys.stderr.write(f"jaxgpt: {' '.join(str(error).split())}\n")
        sys.exit(2)


def _run(words: list[str]) -> None:
    flags = _parse(words)
    _target("--json", getattr(flags, "json", None))
    COMMANDS[type(flags)][1](flags, _console())


def _parse(words: list[str]) -> Any:
    """The flags of a sub-command. Raises BadInput with tyro's own reason in one line; --help prints and exits."""
    subcommands = tuple(Annotated[flags, tyro.conf.subcommand(name)] for flags, (name, _) in COMMANDS.items())
    names = [name for name, _ in COMMANDS.values()]
    if words and not words[0].startswith("-") and words[0] not in names:
        near = difflib.get_close_matches(words[0], names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadInput(f"{words[0]!r} is not a command; {hint}there are {', '.join(names)}")
    config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(  # pyright: ignore[reportCallIssue]
                functools.reduce(operator.or_, subcommands),  # pyright: ignore[reportArgumentType]
                prog="jaxgpt",
                args=_settings_first(words) or ["--help"],
                description=DESCRIPTION,
                config=config,
            )
    except SystemExit as stopped:
        if not stopped.code:
            if words and words[0] in ("train", "sweep"):
                _console().print(_all_fields())
            raise
        # tyro draws a box, in ASCII where the terminal is not UTF-8: a title, then parts with rules between them.
        inside = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
        parts = [" ".join(part) for text, part in itertools.groupby(inside, lambda s: s.strip("─-") != "") if text]
        reason = parts[0] if parts else "these arguments cannot be read"
        page = f"jaxgpt {words[0]} --help" if words[0] in names else "jaxgpt --help"
        raise BadInput(f"{' '.join(reason.split())} (see {page})") from None


def _settings_first(words: list[str]) -> list[str]:
    """Settings may stand between the flags of `train` and `sweep`; tyro wants them side by side."""
    if not words or words[0] not in ("train", "sweep"):
        return words
    settings, rest = [], []
    for before, word in itertools.pairwise(words):
        is_value = before.startswith("--") and "=" not in before and before not in ("--dry-run", "--dry_run")
        (rest if is_value or word.startswith("-") else settings).append(word)
    return [words[0], *settings, *rest]


def _console() -> Console:
    # Tables keep their columns when they are piped into a file.
    return Console() if sys.stdout.isatty() else Console(width=160)
