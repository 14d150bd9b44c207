"""The demo: a sweep of language models on real text, a fitted scaling law, and the picture.

Sizes x token budgets on Python's own library as text. Each run has its own cosine schedule, so each final loss is
that of a finished training; the learning rate falls as 1 / width, from a scan at widths 16, 32 and 64 over 300 steps
(best of 2e-3, 5e-3, 1e-2, 2e-2: .02, .01, .005).
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.claims import Claim, Measured
from experiments.registry import Job, Outcome, Paper, Unfinished
from jaxgpt.config import RunConfig, override

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
    settings: dict[str, int]
    starts: int = 500
    bootstraps: int = 1000


SWEEPS = {
    "smoke": Size(
        models=((4, 1), (8, 1), (12, 1), (16, 1)),
        steps=(8, 16, 32),
        settings={"model.context": 16, "train.batch_size": 2, "train.eval_windows": 32},
        starts=50,
        bootstraps=50,
    ),
    "laptop": Size(
        models=((16, 2), (24, 2), (32, 3), (48, 3), (64, 4)),
        steps=(150, 300, 600, 1200),
        settings={"model.context": 128, "train.batch_size": 16, "train.eval_windows": 256},
    ),
    "paper": Size(
        models=((128, 4), (192, 6), (256, 8), (384, 8), (512, 12), (768, 12)),
        steps=(2_500, 5_000, 10_000, 20_000, 40_000),
        settings={"model.context": 1024, "train.batch_size": 128, "train.eval_windows": 1024},
    ),
}


def configs(size: Size) -> list[RunConfig]:
    """The runs of the sweep, from small to large. Heads are 16 wide, and 64 in models that are wide enough."""
    return [
        override(
            RunConfig(),
            {
                "model.d_model": width,
                "model.n_layers": layers,
                "model.n_heads": max(1, width // (64 if width >= 256 else 16)),
                "model.d_head": 64 if width >= 256 else min(16, width),
                "optimizer.learning_rate": 0.32 / width,
                "train.steps": steps,
                **size.settings,
            },
        )
        for width, layers in size.models
        for steps in size.steps
    ]


SUMMARY = [
    *("run_id", "model.d_model", "model.n_layers", "params_total", "params_non_embedding", "tokens", "flops_6nd"),
    *("flops_exact", "final_loss", "final_loss_sem", "final_bits_per_byte", "optimizer.learning_rate", "train.seed"),
    *("wall_seconds", "code_version"),
]


def run(job: Job) -> Outcome:
    """Sweeps, fits, draws."""
    from analysis.fit import fit, predict, to_json
    from analysis.laws import CHINCHILLA
    from analysis.plots import scaling_figure
    from jaxgpt import load, sweep

    size = SWEEPS[job.scale]
    wanted = configs(size)
    runs = sweep(wanted, job.raw, max_minutes=job.max_minutes)
    if len(runs) < len(wanted):
        raise Unfinished(f"time is up: {len(runs)} of {len(wanted)} runs are done; the same command goes on")
    done = runs[runs["status"] == "done"]
    curves = load(job.raw)[1]
    n, d, loss = (done[column].to_numpy(float) for column in ("params_non_embedding", "tokens", "final_loss"))
    fitted = fit(CHINCHILLA, {"N": n, "D": d}, loss, starts=size.starts, bootstraps=size.bootstraps, level=LEVEL)
    largest = n == n.max()
    smaller = fit(CHINCHILLA, {"N": n[~largest], "D": d[~largest]}, loss[~largest],
                  starts=size.starts, bootstraps=size.bootstraps, level=LEVEL)  # fmt: skip
    errors = [values / loss[largest] - 1 for values in predict(smaller, N=n[largest], D=d[largest])]
    seeds = done["train.seed"].nunique()
    interval = {name: e.interval for name, e in (fitted.parameters | fitted.derived).items()}
    measured = {
        "a": Measured(fitted.derived["a"].value, *interval["a"], seeds),
        "alpha": Measured(fitted.parameters["alpha"].value, *interval["alpha"], seeds),
        "beta": Measured(fitted.parameters["beta"].value, *interval["beta"], seeds),
        "extrapolation": Measured(*(float(e.mean()) for e in errors), seeds),
    }
    return Outcome(
        measured=measured,
        summary=done[SUMMARY],
        figures=tuple(scaling_figure(done, curves, fitted, job.figure)),
        numbers={"fit": to_json(fitted)},
        seconds_training=float(runs["wall_seconds"].sum()),
        device=str(done["device"].iloc[0]),
        corpus_sha256=str(done["corpus_sha256"].iloc[0]),
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
