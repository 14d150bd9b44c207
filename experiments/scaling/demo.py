"""The demo: a sweep of language models on real text, a fitted scaling law, and the picture.

Sizes x token budgets on Python's own library as text. Each run has its own cosine schedule, so each final loss is
that of a finished training. The learning rate, .5 / width, is near the best of scans with one seed each, over 300 and
1200 steps (width 16: 1e-2, 2e-2, 4e-2; widths 32 and 64: 5e-3, 1e-2, 2e-2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.claims import Claim, Measured
from experiments.registry import Job, Outcome, Paper, Unfinished
from jaxgpt import flops
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy as np
    import pandas

    from analysis.fit import Fit

HOFFMANN = "Hoffmann et al. 2022"
LEVEL = 0.9


def _claim(id: str, row: int, statement: str, source: str, expected: float, margin: float) -> Claim:
    return Claim(id, statement, source, expected, margin, unit="1", scope="toy_analogue", level=LEVEL, row=row)


CLAIMS = (
    _claim("a", 3, "compute-optimal size grows as C^a", f"{HOFFMANN}, table 2, approach 3", 0.46, 0.1),
    _claim("alpha", 2, "loss falls with size as N^-alpha above a floor", f"{HOFFMANN}, appendix D.3", 0.34, 0.1),
    _claim("beta", 2, "loss falls with data as D^-beta above a floor", f"{HOFFMANN}, appendix D.3", 0.28, 0.1),
    _claim("extrapolation", 8, "the law of the smaller models predicts the largest model's loss: mean relative error",
           "what scaling laws are used for", 0.0, 0.02),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """The sweep of a scale: (width, layers) of each model, steps of each budget, and the rest of a run's settings."""

    models: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    most_flops: float  # 6ND; what would cost more is left out, so that small models get the long runs
    settings: dict[str, int]
    starts: int = 500
    bootstraps: int = 1000


SWEEPS = {
    "smoke": Size(
        models=((4, 1), (8, 1), (12, 1), (16, 1)),
        steps=(8, 16, 32),
        most_flops=math.inf,
        settings={"model.context": 16, "train.batch_size": 2, "train.eval_windows": 32},
        starts=50,
        bootstraps=50,
    ),
    "laptop": Size(
        models=((16, 2), (24, 2), (32, 3), (48, 3), (64, 4)),
        steps=(500, 1000, 2000, 4000),
        most_flops=3e12,
        settings={"model.context": 128, "train.batch_size": 8, "train.eval_windows": 256},
    ),
    "paper": Size(
        models=((128, 4), (192, 6), (256, 8), (384, 8), (512, 12), (768, 12)),
        steps=(2_500, 5_000, 10_000, 20_000, 40_000),
        most_flops=math.inf,
        settings={"model.context": 1024, "train.batch_size": 128, "train.eval_windows": 1024},
    ),
}


def configs(size: Size) -> list[RunConfig]:
    """The runs of the sweep, from small to large. Heads are 16 wide, and 64 in models that are wide enough."""
    grid = [
        override(
            RunConfig(),
            {
                "model.d_model": width,
                "model.n_layers": layers,
                "model.n_heads": max(1, width // (64 if width >= 256 else 16)),
                "model.d_head": 64 if width >= 256 else min(16, width),
                "optimizer.learning_rate": 0.5 / width,
                "train.steps": steps,
                **size.settings,
            },
        )
        for width, layers in size.models
        for steps in size.steps
    ]
    return [c for c in grid if flops.flops_6nd(flops.parameters(c.model).total, c.tokens) <= size.most_flops]


SUMMARY = [
    *("run_id", "model.d_model", "model.n_layers", "params_total", "params_non_embedding", "tokens", "flops_6nd"),
    *("flops_exact", "final_loss", "final_loss_sem", "final_bits_per_byte", "optimizer.learning_rate", "train.seed"),
    *("wall_seconds", "code_version"),
]


def run(job: Job) -> Outcome:
    """Sweeps, fits, draws."""
    from analysis.fit import fit, to_json, with_interval
    from analysis.laws import CHINCHILLA
    from analysis.plots import scaling_figure
    from jaxgpt import load, sweep

    size = SWEEPS[job.scale]
    wanted = configs(size)
    runs = sweep(wanted, job.raw, max_minutes=job.max_minutes)
    if len(runs) < len(wanted):
        raise Unfinished(f"time is up: {len(runs)} of {len(wanted)} runs are done; the same command goes on")
    # N counts all parameters, as Hoffmann et al. do.
    symbols = {"params_total": "N", "tokens": "D", "flops_6nd": "C"}
    done = runs.query("status == 'done'")
    named, curves = done.rename(columns=symbols), load(job.raw)[1].rename(columns=symbols)
    n, d, loss = (named[column].to_numpy(float) for column in ("N", "D", "final_loss"))
    fitted = fit(CHINCHILLA, {"N": n, "D": d}, loss, starts=size.starts, bootstraps=size.bootstraps, level=LEVEL)
    largest = n == n.max()
    smaller = fit(CHINCHILLA, {"N": n[~largest], "D": d[~largest]}, loss[~largest],
                  starts=size.starts, bootstraps=size.bootstraps, level=LEVEL)  # fmt: skip
    held_out = {"N": n[largest], "D": d[largest]}

    def mean_error(parameters: Mapping) -> np.ndarray:
        return (CHINCHILLA.predict(parameters, held_out) / loss[largest] - 1).mean(axis=-1, keepdims=True)

    seeds = len(set(done["train.seed"]))
    estimates = fitted.parameters | fitted.derived
    measured = {
        name: Measured(e.value, *e.interval, seeds, e.remark)
        for name, e in estimates.items()
        if name in ("a", "alpha", "beta")
    }
    value, low, high = (float(e[0]) for e in with_interval(smaller, mean_error))
    measured["extrapolation"] = Measured(value, low, high, seeds)
    return Outcome(
        measured=measured,
        summary=done.filter(SUMMARY),
        tables=(
            ("Validation loss in nats per byte, by size N and training bytes D", _losses(done)),
            (_how_it_was_fitted(fitted), _parameters(fitted)),
        ),
        figures=tuple(scaling_figure(named, curves, fitted, job.figure)),
        numbers={"fit": to_json(fitted)},
        seconds_training=sum(runs["wall_seconds"]),
        device=done["device"].iloc[0],
        corpus_sha256=done["corpus_sha256"].iloc[0],
    )


def _losses(done: pandas.DataFrame) -> pandas.DataFrame:
    """Final losses with their standard errors, one line per size and one column per token budget."""
    text = [f"{loss:.3f} ± {sem:.3f}" for loss, sem in zip(done["final_loss"], done["final_loss_sem"], strict=True)]
    cells = done.assign(cell=text).pivot_table(index="params_total", columns="tokens", values="cell", aggfunc="first")
    cells.columns = [f"D = {tokens:,}" for tokens in cells.columns]
    cells.insert(0, "N (all parameters)", [f"{n:,}" for n in cells.index])
    return cells.fillna("–")


def _how_it_was_fitted(fitted: Fit) -> str:
    return (
        f"{fitted.law.formula} on {fitted.points} runs; Huber on log-loss, {fitted.starts} starts, "
        f"{fitted.share_at_optimum:.0%} of them at the optimum; scatter {fitted.scatter:.2%}"
    )


def _parameters(fitted: Fit) -> pandas.DataFrame:
    """The law's parameters and exponents with their bootstrap intervals."""
    import pandas

    interval = f"{fitted.level:.0%} interval ({fitted.bootstraps} bootstraps)"
    return pandas.DataFrame(
        {
            "parameter": name,
            "value": f"{e.value:.4g}",
            interval: f"{e.interval[0]:.4g} to {e.interval[1]:.4g}",
            "identified": e.remark or "yes",
        }
        for name, e in (fitted.parameters | fitted.derived).items()
    )


PAPER = Paper(
    name="demo",
    title="A scaling law in minutes: L(N, D) of small language models on real text",
    source=f"after {HOFFMANN}",
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 5 minutes on 2 CPU cores",
        "paper": "a day on one large GPU (not yet run)",
    },
    run=run,
)
