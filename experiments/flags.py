"""The flags of each sub-command of `jaxgpt`: one frozen dataclass each, whose docstrings are the help texts."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from experiments.registry import Scale

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


def _trackers(words: list[str]) -> tuple[str, ...]:
    return tuple(words[0].split(","))


Trackers = Annotated[tuple[str, ...], tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="TRACKER", instance_from_str=_trackers, str_from_instance=lambda names: [",".join(names)],
    is_instance=lambda names: isinstance(names, tuple),
)]  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """`--layout`: as jaxgpt.parallel.Layout, which imports JAX."""

    data: int = 1
    model: int = 1
    fsdp: bool = False

    def __str__(self) -> str:
        return f"data={self.data},model={self.model}" + ",fsdp" * self.fsdp


def _spread(words: list[str]) -> Spread:
    found: dict[str, int | bool] = {}
    for word in words[0].split(","):
        name, _, value = word.partition("=")
        if name == "fsdp" and not value:
            found[name] = True
        elif name in ("data", "model") and value.isdecimal() and int(value):
            found[name] = int(value)
        else:
            raise ValueError(f"{word} is not allowed; it must look like data=4,model=2,fsdp, any part of it")
    return Spread(**found)  # pyright: ignore[reportArgumentType]


Layouts = Annotated[Spread, tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="data=N,model=N,fsdp", instance_from_str=_spread, str_from_instance=lambda spread: [str(spread)],
    is_instance=lambda spread: isinstance(spread, Spread),
)]  # fmt: skip
Devices = Annotated[int | None, tyro.conf.arg(metavar="N")]
Hosts = Annotated[str | None, tyro.conf.arg(metavar="HOSTS")]


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
    """stop cleanly after about so long (exit code 75 if not all is done); the same command goes on"""
    json: OptionalFile = None
    """write the same numbers here, for machines"""


@dataclass(frozen=True)
class Report:
    """Write the results page: every reproduction in one HTML file that loads nothing."""

    results: Path = Path("results")
    """folder of the results"""
    out: OptionalFile = None
    """where to; index.html in the folder of the results unless given"""


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
    """stop cleanly after about so long (exit code 75 if not all is done); the same command goes on"""
    track: Trackers = ()
    """log to tensorboard, wandb or both (tensorboard,wandb) while it trains"""
    devices: Devices = None
    """use so many devices; all unless given (on a CPU each core is one)"""
    layout: Layouts = Spread()
    """spread each model over devices: batches over data, heads and MLP over model; fsdp: parameters over data too"""
    hosts: Hosts = None
    """train each model on several hosts, each of which runs this command: auto (Slurm's srun, Kubernetes, TPU pods), or
    ADDRESS:PORT,COUNT,INDEX"""
    profile: bool = False
    """first time and trace a few steps: where a step's time goes, memory, share of the device's peak"""
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
    """stop cleanly after about so long (exit code 75 if not all is done); the same command goes on"""
    track: Trackers = ()
    """log to tensorboard, wandb or both (tensorboard,wandb) while it trains"""
    devices: Devices = None
    """use so many devices; all unless given (on a CPU each core is one)"""
    layout: Layouts = Spread()
    """spread each model over devices: batches over data, heads and MLP over model; fsdp: parameters over data too"""
    hosts: Hosts = None
    """train each model on several hosts, each of which runs this command: auto (Slurm's srun, Kubernetes, TPU pods), or
    ADDRESS:PORT,COUNT,INDEX"""
    launcher: Literal["local", "slurm", "ray"] = "local"
    """where the runs train: on this machine, as jobs of Slurm, or as tasks of Ray"""
    workers: Annotated[int | None, tyro.conf.arg(metavar="K")] = None
    """local: K processes, any of which may die (else it trains in this one); slurm, ray: at most K jobs at once"""
    job_minutes: Annotated[int | None, tyro.conf.arg(metavar="MINUTES")] = None
    """slurm: time limit of a job, 60 unless given; it saves before, and is put back in the queue"""
    partition: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """slurm: where to submit; for all else Slurm's own variables do: SBATCH_ACCOUNT, SBATCH_QOS, ..."""
    gpus: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """slurm, ray: GPUs for each job, 0 unless given"""
    cpus: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """slurm, ray: cores for each job, 1 unless given"""
    memory_gb: Annotated[float | None, tyro.conf.arg(metavar="GB")] = None
    """slurm, ray: memory for each job"""
    address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """ray: a cluster that is running; none: one is started on this machine, for this sweep"""
    json: OptionalFile = None
    """write the rows (or, with --dry-run, the plan) here"""


Column = Annotated[str | None, tyro.conf.arg(metavar="COL")]
Count = Annotated[int, tyro.conf.arg(metavar="N")]
Number = Annotated[float | None, tyro.conf.arg(metavar="X")]


@dataclass(frozen=True)
class Fit:
    """Fit a scaling law to a table: its parameters with intervals, and whether the data identify them.

    Laws: kaplan_n, kaplan_d, kaplan_c, kaplan_nd, power, saturating, chinchilla, chinchilla_equal, overtraining,
    data_constrained, bnsl_1, bnsl_2, bnsl_3.
    """

    law: Annotated[Positional[str], tyro.conf.arg(metavar="LAW")]
    """the law's name, for example chinchilla"""
    table: Annotated[Positional[Path], tyro.conf.arg(metavar="TABLE")]
    """a .csv or .parquet file, or a sweep folder, whose finished runs are taken"""
    n: Column = None
    """column of parameters; params_total unless given"""
    d: Column = None
    """column of training tokens; tokens unless given, or C / (6 N) where only --c is"""
    c: Column = None
    """column of training FLOPs"""
    u: Column = None
    """column of distinct tokens, for data_constrained"""
    x: Column = None
    """column of the variable of power, saturating and bnsl_1 to 3"""
    loss: Annotated[str, tyro.conf.arg(metavar="COL")] = "final_loss"
    """column of the loss in nats per token"""
    group: Column = None
    """column of labels, or several as in params_total,train.seed: runs of one label share a trunk, a budget or a seed,
    and are resampled together"""
    sem: Column = None
    """column of standard errors of the loss; points weigh as (loss / error)^2"""
    keep: Annotated[str | None, tyro.conf.arg(metavar="CONDITION")] = None
    """only rows like 'loss < 3.4 and `Training FLOP` > 1e19'"""
    objective: Literal["huber", "squared_log", "squared"] | None = None
    """huber: of log loss, the default from 30 points on; squared_log, the default below; squared: of the loss"""
    delta: Number = None
    """where the Huber loss turns linear, in log loss; 0.001 unless given"""
    starts: Count = 1000
    """starting points, each refined until it converges"""
    bootstraps: Count = 4000
    """resamples behind the intervals"""
    level: float = 0.9
    """of the intervals"""
    seed: int = 0
    """of the resamples"""
    figure: OptionalFile = None
    """write a figure of a chinchilla fit to this name, as .png and .svg"""
    json: OptionalFile = None
    """write the fit here, for machines and for `jaxgpt plan`"""


@dataclass(frozen=True)
class Plan:
    """From a fit to the best run for one target, what missing it costs, and smaller models trained for longer."""

    fit: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """what `jaxgpt fit --json` wrote"""
    flops: Number = None
    """target: training FLOPs to spend, 6 N D"""
    params: Number = None
    """target: a model of so many parameters"""
    loss: Number = None
    """target: a loss in nats per token"""
    json: OptionalFile = None
    """write the same here, for machines"""


@dataclass(frozen=True)
class Emergence:
    """How suddenly scores of tasks rise over sizes, where, how surely, and what luck and smooth curves would give."""

    table: Annotated[Positional[Path], tyro.conf.arg(metavar="TABLE")]
    """a .csv, .parquet or .jsonl file with a row for each task, size and seed, or a sweep folder"""
    task: Annotated[str, tyro.conf.arg(metavar="COL")]
    """column of the tasks' names"""
    scale: Annotated[str, tyro.conf.arg(metavar="COL")]
    """column of sizes: parameters, FLOPs, tokens, ...; scores are expected to rise with it, so of losses, which fall as
    models get better, no threshold is found; rows without one are left out"""
    score: Annotated[str, tyro.conf.arg(metavar="COL")]
    """column of scores, better when larger; shares from 0 to 1 where --chance or --n is given; tasks that have none are
    left out"""
    chance: Column = None
    """column of the score that guessing has, one number a task; 0 unless given"""
    n: Column = None
    """column of the number of questions behind a score, the same ones for all seeds: gives binomial intervals"""
    seed: Column = None
    """column of seeds: gives intervals over them, and says where they fall into two groups"""
    keep: Annotated[str | None, tyro.conf.arg(metavar="CONDITION")] = None
    """only rows like 'step == 2000 and `model family` == \'ours\''"""
    method: Literal["logistic", "broken_power", "change_point"] = "logistic"
    """curve whose place is the threshold; change_point: a step"""
    level: float = 0.9
    """of the intervals"""
    resamples: Count = 400
    """behind the intervals"""
    json: OptionalFile = None
    """write the same here, for machines"""


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


RunName = Annotated[Positional[str], tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True)
class Show:
    """One run, finished or not: its settings, sizes, versions, curve, validations and last checkpoint."""

    run: RunName
    """a run's id or the beginning of it, as `jaxgpt runs` shows; also FOLDER/ID"""
    results: Path = Path("results/raw")
    """folder below which the run is sought"""
    json: OptionalFile = None
    """write the same here, for machines"""


@dataclass(frozen=True)
class Anatomy:
    """What is inside a run's checkpoints, by layer: parameters that are not finite, how far they moved, dead units,
    outliers of the residual stream, attention sinks, and what each block is worth.
    """

    run: RunName
    """a run's id or the beginning of it, as `jaxgpt runs` shows; also FOLDER/ID, or a folder of Hugging Face weights"""
    steps: Annotated[str, tyro.conf.arg(metavar="all|last|STEP,STEP")] = "all"
    """checkpoints to look at (train.keep_every keeps more of them); 0: the initial parameters"""
    windows: Annotated[int | None, tyro.conf.arg(metavar="W")] = None
    """validation windows to look at; as many as hold 8,192 tokens unless given"""
    corpus: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """a file or folder whose held-out part is looked at; the run's own text unless given"""
    csv: OptionalFile = None
    """write the table here, a line per layer and checkpoint"""
    figure: OptionalFile = None
    """write the page of figures to this name, as .png and .svg"""
    results: Path = Path("results/raw")
    """folder below which the run is sought"""
    json: OptionalFile = None
    """write the table here, with what its columns mean, for machines"""


@dataclass(frozen=True)
class Diff:
    """Two runs side by side: where settings and versions differ, and the losses at the steps that both logged."""

    run_a: Annotated[Positional[str], tyro.conf.arg(metavar="RUN_A")]
    """a run's id or the beginning of it; also FOLDER/ID"""
    run_b: Annotated[Positional[str], tyro.conf.arg(metavar="RUN_B")]
    """the other run"""
    results: Path = Path("results/raw")
    """folder below which the runs are sought"""
    json: OptionalFile = None
    """write the same here, for machines"""


@dataclass(frozen=True)
class ExportHf:
    """Write a run's model, and its tokenizer unless it is bytes, as safetensors that Hugging Face's transformers loads.

    As GPT-2 (learned positions) or GPT-NeoX (rope): layer norms, one GELU or ReLU MLP, no grouped queries, no muP.
    """

    run: RunName
    """a run's id or the beginning of it, as `jaxgpt runs` shows; also FOLDER/ID"""
    folder: Annotated[Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """where to: a new folder, which `jaxgpt sample FOLDER` reads too"""
    ema: bool = False
    """the running mean of the parameters (optimizer.ema) instead of the last ones"""
    results: Path = Path("results/raw")
    """folder below which the run is sought"""


@dataclass(frozen=True)
class Sample:
    """Text from a run's model, as its last checkpoint holds it, token by token."""

    run: RunName
    """a run's id or the beginning of it, as `jaxgpt runs` shows; also FOLDER/ID, or a folder of Hugging Face weights"""
    prompt: str = ""
    """what the text begins with; nothing: the beginning of a document"""
    max_tokens: int = 200
    """how many tokens to add at most; the end of a document ends the text too"""
    temperature: float = 1.0
    """below 1: likelier tokens; 0: always the likeliest"""
    top_k: int | None = None
    """draw from so many of the likeliest tokens"""
    top_p: float | None = None
    """draw from the likeliest tokens that together have this probability"""
    seed: int = 0
    """the same seed gives the same text"""
    ema: bool = False
    """the running mean of the parameters (optimizer.ema) instead of the last ones"""
    results: Path = Path("results/raw")
    """folder below which the run is sought"""
    json: OptionalFile = None
    """write prompt, text and token ids here"""


@dataclass(frozen=True)
class Evaluate:
    """What checkpoints answer, over sizes and training steps: a table of scores for `jaxgpt emergence`.

    Made tasks: addition-K, subtraction-K, multiplication-K (numbers of K digits), reversal-K, unscramble-K (words of K
    letters). Rows are appended as they are done, and what is there is not done again. exact_match wants the answer and
    the end of its line; likelihoods are of the answer, whatever follows.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GLOB [GLOB ...]")]
    """ids of runs or their beginnings, with wildcards ('3f2a', '*', 'FOLDER/*'), sweep folders, or folders of Hugging
    Face weights; every checkpoint that a run has kept is evaluated (train.keep_every keeps more of them); with
    wildcards, runs that did not learn text are left out"""
    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]
    """tasks such as addition-3, or .jsonl files: a line is {"prompt", "answer"} or {"prompt", "choices", "right"}"""
    count: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """ask at most so many examples of each task; 200 of a made one (of unscramble-K
    all words of K letters, 8 to 45) and all of a file unless given"""
    shots: Annotated[int, tyro.conf.arg(metavar="K")] = 0
    """solved examples in front of each prompt, the task's first ones; these are not asked"""
    key: int = 0
    """of the examples that are made: the same key, the same examples"""
    last: bool = False
    """only the newest checkpoint of each run"""
    ema: bool = False
    """the running mean of the parameters (optimizer.ema) instead of the last ones"""
    out: OptionalFile = None
    """the table, a .csv file; evaluation.csv in the folder of the runs unless given"""
    results: Path = Path("results/raw")
    """folder below which the runs are sought"""
    max_minutes: Minutes = None
    """stop cleanly after about so long (exit code 75 if not all is done); the same command goes on"""
    json: OptionalFile = None
    """write the rows here as JSON"""
