"""What each sub-command of `jaxgpt` does. Numbers go to stdout, progress and notes to stderr."""

from __future__ import annotations

import codecs
import dataclasses
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from experiments.flags import (
    Anatomy,
    Diff,
    Emergence,
    Evaluate,
    Export,
    ExportHf,
    Fit,
    List,
    Plan,
    Report,
    Reproduce,
    Runs,
    Sample,
    Show,
    Spread,
    Sweep,
    Train,
)  # fmt: skip
from experiments.interrupt import PREEMPTED, ending_at_once
from experiments.settings import configs, settings_of
from experiments.tables import LEGEND, count, planned_row, profile_table, runs_table, unfinished
from jaxgpt.config import BadInput, RunConfig, override, parse_settings

if TYPE_CHECKING:
    from jaxgpt.launchers import Resources
    from jaxgpt.run import Run

UNFINISHED = PREEMPTED  # --max-minutes too


def list_(flags: List, console: Console) -> None:
    """`jaxgpt list`."""
    from experiments.claims import VERDICTS, false_verdicts_by_chance
    from experiments.registry import papers
    from experiments.reproduction import outcome_folder
    from jaxgpt import store

    tables, rows = [], []
    for paper in papers().values():
        if not rows or rows[-1]["group"] != paper.group:
            tables.append(Table(title=paper.group, title_justify="left", expand=True))
            for column, ratio in (("paper", 14), ("what", 38), ("scales", 38), ("state", 24)):
                tables[-1].add_column(column, overflow="fold", ratio=ratio)
        verdicts = {}
        for scale in paper.takes:
            path = outcome_folder(flags.results, paper.name, scale) / "claims.json"
            if path.exists():
                verdicts[scale] = [claim["verdict"] for claim in store.read_json(path)]
        ordered = {scale: sorted(found, key=VERDICTS.index) for scale, found in verdicts.items()}
        state = "\n".join(f"{scale}: {count(found)}" for scale, found in ordered.items()) or "not run yet"
        scales = "\n".join(f"{scale}: {takes}" for scale, takes in paper.takes.items())
        tables[-1].add_row(paper.name, f"{paper.title} ({paper.source})", scales, state)
        rows.append({"name": paper.name, "group": paper.group, "title": paper.title, "source": paper.source,
                     "takes": dict(paper.takes), "verdicts": verdicts})  # fmt: skip
    claims = [claim for paper in papers().values() for claim in paper.claims]
    chance = false_verdicts_by_chance(claims)
    console.print(*tables)
    console.print(
        f"{len(claims)} claims; at their interval levels at most {chance:.1f} verdicts are false by chance, on average"
    )
    _write(flags.json, {"papers": rows, "claims": len(claims), "false_verdicts_by_chance": chance})


def reproduce(flags: Reproduce, console: Console) -> None:
    """`jaxgpt reproduce`."""
    with ending_at_once():
        from experiments.registry import find
        from experiments.reproduction import reproduce, show

        find(flags.name)  # an unknown name is refused at once
        import jaxgpt.launch  # noqa: F401
    done = reproduce(flags.name, flags.scale, results=flags.results, max_minutes=flags.max_minutes)
    outcome = done.outcome
    numbers = {"name": flags.name, "scale": flags.scale, "claims": done.claims, **outcome.numbers}
    tables = {"summary": outcome.summary.to_dict("records"), "figures": [str(path) for path in outcome.figures]}
    _write(flags.json, numbers | tables)
    show(done, console)


def report(flags: Report, console: Console) -> None:
    """`jaxgpt report`."""
    from experiments.reporting import report as write_page

    target("--out", flags.out)
    write_page(flags.results, flags.out or flags.results / "index.html", console)


def train(flags: Train, console: Console) -> int:
    """`jaxgpt train`."""
    config = override(RunConfig(), settings_of(flags.config) | parse_settings(flags.settings))
    _check_trackers(flags.track)
    for name, value in (("layout", flags.layout), ("hosts", flags.hosts)) if flags.profile else ():
        if value not in (None, Spread()):
            raise BadInput(f"--{name} {value} is not for --profile, which times one device; leave one of them out")
    _start_hosts(flags)
    with ending_at_once():
        from jaxgpt import launch
        from jaxgpt.tasks import text
    setup = text.reader()  # one for all: it reads a corpus, and says what it thinks of it, once
    profiled = {}
    if flags.profile:
        launch.expose(flags.devices)  # before anything starts JAX
        found = launch.profile(config, flags.out, setup=setup)
        console.print(profile_table(found))
        console.print(f"trace: {found.trace} (tensorboard or xprof --logdir, or its .json.gz in ui.perfetto.dev)",
                      soft_wrap=True)  # fmt: skip
        profiled = {"profile": dataclasses.asdict(found)}
    rows, code = _sweep([config], flags, setup)
    _tell(rows, flags, rows[0] | profiled if rows else None, console)
    return code


def sweep(flags: Sweep, console: Console) -> int:
    """`jaxgpt sweep`."""
    wanted = configs(settings_of(flags.config), parse_settings(flags.settings), flags.zip)
    _check_trackers(flags.track)
    names = ("job_minutes", "partition", "gpus", "cpus", "memory_gb", "address")
    resources = {name: value for name in names if (value := getattr(flags, name)) is not None}
    elsewhere = flags.launcher != "local" or flags.workers is not None
    for name in ("devices", "hosts") if elsewhere or resources else ():
        if (value := getattr(flags, name)) is not None:
            raise BadInput(f"--{name} {value} is for a sweep in this process; a job has its own --cpus and --gpus")
    with ending_at_once():
        from jaxgpt.launchers import Resources, check
        from jaxgpt.tasks import text
    asked = Resources(**resources)
    check(flags.launcher, flags.workers, asked, layout=_layout(flags))
    if flags.dry_run:
        _dry_run(wanted, flags, elsewhere, console)
        return 0
    _start_hosts(flags)
    rows, code = _launch(wanted, flags, asked) if elsewhere else _sweep(wanted, flags, text.reader())
    _tell(rows, flags, rows, console)
    return code


def fit(flags: Fit, console: Console) -> None:
    """`jaxgpt fit`."""
    from experiments import fitting

    target("--figure", flags.figure)
    found = fitting.fit(flags)
    _write(flags.json, found.numbers)
    fitting.show_fit(found, console)


def plan(flags: Plan, console: Console) -> None:
    """`jaxgpt plan`."""
    from experiments import fitting

    found = fitting.plan(flags)
    _write(flags.json, found.numbers)
    fitting.show_plan(found, console)


def emergence(flags: Emergence, console: Console) -> None:
    """`jaxgpt emergence`."""
    from experiments import abilities

    found = abilities.emergence(flags)
    _write(flags.json, found)
    abilities.show(found, console)


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
    target("file", flags.file)
    table = store.load(flags.folder, _warn)[1 if flags.curves else 0]
    data = io.BytesIO()
    if flags.file.suffix == ".csv":
        table.to_csv(data, index=False, lineterminator="\n")
    else:
        table.to_parquet(data, index=False)
    store.write_bytes(flags.file, data.getvalue())
    console.print(f"{len(table)} rows, {len(table.columns)} columns: {flags.file}", soft_wrap=True)


def show(flags: Show, console: Console) -> None:
    """`jaxgpt show`."""
    from experiments import lookback

    seen = lookback.look(flags.run, flags.results)
    _write(flags.json, seen)
    lookback.print_run(seen, console)


def anatomy(flags: Anatomy, console: Console) -> None:
    """`jaxgpt anatomy`."""
    from experiments import inside

    target("--csv", flags.csv)
    target("--figure", flags.figure)
    inside.anatomy(flags, console)


def diff(flags: Diff, console: Console) -> None:
    """`jaxgpt diff`."""
    from experiments import lookback

    a, b = (lookback.look(run, flags.results) for run in (flags.run_a, flags.run_b))
    compared = lookback.compare(a, b)
    _write(flags.json, compared)
    lookback.print_comparison(compared, console)


def sample(flags: Sample, console: Console) -> None:
    """`jaxgpt sample`. The text goes to stdout as it is made."""
    with ending_at_once():
        from jaxgpt.sample import generate
        from jaxgpt.trained import load_model
    trained = load_model(flags.run, flags.results, flags.ema, _warn)
    tokenizer, prompt = trained.tokenizer, os.fsencode(flags.prompt)
    # Between documents stands the separator: what follows it is how one begins.
    ids = tokenizer.encode(prompt).tolist() if prompt else [tokenizer.separator]
    tokens = generate(trained.model, ids, max_tokens=flags.max_tokens, temperature=flags.temperature,
                      top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed, stop=tokenizer.separator,
                      vocabulary=tokenizer.vocab_size)  # fmt: skip
    sys.stderr.write(f"{flags.run}, step {trained.step:,}\n")
    made, text = [], codecs.getincrementaldecoder("utf-8")("replace")
    console.file.write(flags.prompt)
    for token in tokens:
        made.append(token)
        console.file.write(text.decode(tokenizer.decode([token])))
        console.file.flush()
    console.file.write(text.decode(b"", final=True) + "\n")
    said = tokenizer.decode(made).decode(errors="replace")
    _write(flags.json, {"run": flags.run, "step": trained.step, "prompt": flags.prompt, "text": said, "tokens": made})


def evaluate(flags: Evaluate, console: Console) -> int:
    """`jaxgpt evaluate`."""
    from experiments import evaluation

    target("--out", flags.out)
    return evaluation.evaluate(flags, console)


def export_hf(flags: ExportHf, console: Console) -> None:
    """`jaxgpt export-hf`."""
    with ending_at_once():
        from flax import nnx

        from jaxgpt import huggingface
        from jaxgpt.trained import load_model
    if (flags.folder / "config.json").exists():  # perhaps of another run
        raise BadInput(f"folder={flags.folder} holds an export already; name a new folder")
    trained = load_model(flags.run, flags.results, flags.ema, _warn)
    params = nnx.state(trained.model)
    folder = huggingface.save(trained.config.model, params, flags.folder, tokenizer=trained.tokenizer)
    console.print(f"step {trained.step:,} of run {flags.run}: {folder}", soft_wrap=True)


# --- parts ---------------------------------------------------------------------------------------------------------


def _check_trackers(names: tuple[str, ...]) -> None:
    if names:
        from jaxgpt import track

        track.check(names)


def _sweep(configs: list[RunConfig], flags: Train | Sweep, setup: Any) -> tuple[list[dict[str, Any]], int]:
    """The finished runs' rows, and the exit code. Says so when the time was up before all were done."""
    from jaxgpt.launch import plan, sweep

    table = sweep(configs, flags.out, setup=setup, max_minutes=flags.max_minutes, trackers=flags.track,
                  devices=flags.devices, layout=_layout(flags))  # fmt: skip
    return _outcome(table, len(plan(configs, flags.out, setup, check=False)), flags)


def _layout(flags: Train | Sweep) -> Any:
    from jaxgpt.parallel import Layout

    return Layout(flags.layout.data, flags.layout.model, flags.layout.fsdp)


def _start_hosts(flags: Train | Sweep) -> None:
    """What `--hosts` asks for: this process becomes one of several, before JAX is used."""
    if flags.hosts is not None:
        from jaxgpt.parallel import start_hosts

        where = _hosts(flags)
        if where:
            sys.stderr.write(f"host {where[2]} of {where[1]} waits for the others at {where[0]}\n")
        start_hosts(*where)


def _hosts(flags: Train | Sweep) -> tuple[Any, ...]:
    """Address, count and index in `--hosts`; none of them for auto."""
    assert flags.hosts is not None
    if flags.devices is not None:
        raise BadInput(f"--devices {flags.devices} is not for --hosts, which uses all devices of every host")
    if flags.hosts == "auto":
        return ()
    found = re.fullmatch(r"(\S+:[0-9]+),([0-9]+),([0-9]+)", flags.hosts)
    port = 0 if found is None else int(found[1].rpartition(":")[2])
    if found is None or int(found[3]) >= int(found[2]) or not 0 < port < 2**16:
        raise BadInput(
            f"--hosts {flags.hosts} is not allowed; it must be auto or ADDRESS:PORT,COUNT,INDEX, INDEX below COUNT "
            "and PORT from 1 to 65535"
        )
    return found[1], int(found[2]), int(found[3])


def _tells(flags: Train | Sweep) -> bool:
    """Whether this process prints and writes what comes out: of several hosts the first one does."""
    if flags.hosts is None:
        return True
    from jaxgpt.parallel import is_writer

    return is_writer()


def _launch(configs: list[RunConfig], flags: Sweep, resources: Resources) -> tuple[list[dict[str, Any]], int]:
    """As `_sweep`, in other processes; 1 when a job was given up."""
    with ending_at_once():
        from jaxgpt.launch import plan
        from jaxgpt.launchers import Failed, launch
    try:
        table = launch(configs, flags.out, launcher=flags.launcher, workers=flags.workers, trackers=flags.track,
                       resources=resources, max_minutes=flags.max_minutes,
                       layout=_layout(flags))  # fmt: skip
    except Failed as error:
        for line in str(error).splitlines():
            _warn(line)
        return error.table.to_dict("records"), 1
    planned = len(table if flags.max_minutes is None else plan(configs, flags.out, check=False))
    return _outcome(table, planned, flags)


def _outcome(table: Any, planned: int, flags: Train | Sweep) -> tuple[list[dict[str, Any]], int]:
    rows = table.to_dict("records")
    if len(rows) == planned:
        return rows, 0
    if _tells(flags):
        sys.stderr.write(f"time is up: {len(rows)} of {planned} runs are done; the same command goes on\n")
    return rows, UNFINISHED


def _tell(rows: list[dict[str, Any]], flags: Train | Sweep, numbers: Any, console: Console) -> None:
    if not _tells(flags):
        return
    _write(flags.json, numbers)
    if rows:
        console.print(runs_table(rows))
        console.print(LEGEND)
    console.print(f"rows, curves and checkpoints: {flags.out}", soft_wrap=True)


def _dry_run(configs: list[RunConfig], flags: Sweep, elsewhere: bool, console: Console) -> None:
    """What would be trained, after the checks of a sweep. `elsewhere`: by jobs."""
    from jaxgpt import store
    from jaxgpt.population import split
    from jaxgpt.prefix import shared_steps
    from jaxgpt.progress import duration

    if flags.out.exists() and not flags.out.is_dir():
        raise BadInput(f"--out {flags.out} is a file; a folder is needed")
    planned, places, seconds = (_plan_jobs if elsewhere else _plan_here)(configs, flags)
    population = {run.id: part.name for part in split(planned) for run in part.runs}
    status = {run.id: "done" if store.read_row(run.folder, run.id) else "to do" for run in planned}
    rows = [planned_row(run.id, run.config, status[run.id]) | {"population": population[run.id]} for run in planned]
    console.print(runs_table(rows))
    console.print(LEGEND)
    takes = "" if seconds is None else f"; what is to do takes about {duration(seconds)} (a rough estimate)"
    programs = len(set(population.values()))
    console.print(f"{count(list(status.values()))}; compiled programs: {programs}; {places}{takes}", soft_wrap=True)
    shared = shared_steps([run for run in planned if status[run.id] == "to do"])
    if any(shared.values()):
        branches, total = sum(map(bool, shared.values())), sum(shared.values())
        console.print(f"{branches} of them begin as a longer one does, which trains {total:,} steps for them")
    _write(flags.json, {"runs": rows, "estimated_seconds": seconds, "shared_steps": shared})


def _plan_here(configs: list[RunConfig], flags: Sweep) -> tuple[list[Run], str, float]:
    """The runs of a sweep in this process, where they would train, and about how many seconds."""
    import jax

    from jaxgpt.forecast import estimate_seconds
    from jaxgpt.launch import lanes_of, plan

    layout = _layout(flags)
    if flags.hosts is not None:
        _, hosts, _ = _hosts(flags) or (None, 1, 0)
        if hosts > layout.size:
            raise BadInput(f"--layout {layout} is for {layout.size} devices; {hosts} hosts have at least {hosts}")
        runs = plan(configs, flags.out, layout=layout)
        return runs, f"devices of all hosts: {layout.size} in 1 lane", estimate_seconds(runs, layout.size)
    lanes = lanes_of(layout, flags.devices)
    runs = plan(configs, flags.out, layout=layout)
    devices = len(lanes) * layout.size
    places = f"{jax.default_backend()} devices: {devices}"
    if layout.size > 1:
        places += f" in {len(lanes)} lane{'s' * (len(lanes) > 1)}"
    return runs, places, estimate_seconds(runs, devices)


def _plan_jobs(configs: list[RunConfig], flags: Sweep) -> tuple[list[Run], str, float | None]:
    """The runs of jobs, how many jobs, and about how many seconds where they would train on cores of this machine."""
    import jax

    from jaxgpt import store
    from jaxgpt.forecast import estimate_seconds
    from jaxgpt.launch import plan
    from jaxgpt.launchers import parts_of
    from jaxgpt.launchers.local import gpus

    jax.config.update("jax_platforms", "cpu")
    runs = plan(configs, flags.out, layout=_layout(flags), check=False)
    jobs = parts_of([run for run in runs if not store.read_row(run.folder, run.id)], flags.launcher, flags.workers)
    here = flags.launcher == "local" and flags.workers is not None and not gpus()
    return runs, f"{flags.launcher} jobs: {len(jobs)}", estimate_seconds(runs, flags.workers or 1) if here else None


def version() -> str:
    """One line: jaxgpt's version, the code's, and those of the packages that the numbers depend on."""
    from importlib.metadata import version

    from jaxgpt import store

    packages = ", ".join(f"{name} {found}" for name, found in store.package_versions().items())
    return f"jaxgpt {version('jaxgpt')} (code {store.code_version()}; {packages})"


def target(name: str, path: Path | None) -> None:
    """Raises BadInput, before any work, for a file that could not be written at the end."""
    if path is not None and path.is_dir():
        raise BadInput(f"{name}={path} is a folder; it must be a file")
    if path is not None and not path.absolute().parent.is_dir():
        raise BadInput(f"{name}={path} is not allowed; there is no folder {path.absolute().parent}")
    try:
        if path is not None:
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise BadInput(f"{name}={path} cannot be written: {error.strerror}") from error


def _warn(line: str) -> None:
    sys.stderr.write(f"jaxgpt: {line}\n")


def _write(path: Path | None, numbers: Any) -> None:
    from jaxgpt import store

    if path is not None:
        store.write_json(path, numbers)


COMMANDS: dict[type, tuple[str, Callable[[Any, Console], int | None]]] = {
    List: ("list", list_), Reproduce: ("reproduce", reproduce), Report: ("report", report),
    Train: ("train", train), Sweep: ("sweep", sweep),
    Fit: ("fit", fit), Plan: ("plan", plan), Emergence: ("emergence", emergence),
    Runs: ("runs", runs), Show: ("show", show), Diff: ("diff", diff), Anatomy: ("anatomy", anatomy),
    Sample: ("sample", sample), Evaluate: ("evaluate", evaluate),
    Export: ("export", export), ExportHf: ("export-hf", export_hf),
}  # fmt: skip
