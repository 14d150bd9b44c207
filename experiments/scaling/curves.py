"""Dense training curves that several papers look at: one sweep of small language models, and where it lies.

A model's width varies, its number of layers does not; all runs of a scale have the same warm-up in steps, so that a
constant-rate curve cut at any step is that of a shorter training. The learning rate, .5 / width, is the demo's.
Schedules are written so that few programs serve all: a constant rate is a cosine that falls to the whole of its peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.registry import Job, check_complete
from jaxgpt import flops
from jaxgpt.config import BadInput, RunConfig, override

if TYPE_CHECKING:
    import pandas

# Compute-optimal tokens grow as N^GAMMA: b / a of the demo's fit on this text (`jaxgpt reproduce demo`: a = .68).
GAMMA = 0.47


@dataclass(frozen=True)
class Size:
    """The sweep of a scale.

    every: steps between validations. optimal: tokens per parameter of the narrowest model's compute-optimal training
    (laptop: by the demo's fit; paper: about Hoffmann et al.'s; smoke: none is in reach). constant_steps: of the runs
    with a constant rate. annealed_width, annealed_steps, annealed_seeds: of the runs with other schedules.
    """

    widths: tuple[int, ...]
    d_head: int
    seeds: int
    every: int
    optimal: float
    constant_steps: int
    annealed_width: int
    annealed_steps: tuple[int, int]
    annealed_seeds: int
    settings: Mapping[str, int]


SIZES = {
    # Of the demo's shapes, so that a test session compiles them once.
    "smoke": Size(
        widths=(4, 8, 12),
        d_head=4,
        seeds=2,
        every=1,
        optimal=0.85,
        constant_steps=120,
        annealed_width=8,
        annealed_steps=(40, 80),
        annealed_seeds=2,
        settings={"model.n_layers": 1, "model.context": 16, "train.batch_size": 2, "train.eval_windows": 32,
                  "optimizer.warmup_steps": 4},
    ),
    "laptop": Size(
        widths=(16, 24, 32, 48),
        d_head=8,
        seeds=4,
        every=20,
        optimal=52,
        constant_steps=2400,
        annealed_width=32,
        annealed_steps=(1200, 2400),
        annealed_seeds=3,
        settings={"model.n_layers": 2, "model.context": 128, "train.batch_size": 8, "train.eval_windows": 128,
                  "optimizer.warmup_steps": 50},
    ),
    "paper": Size(
        widths=(64, 96, 128, 192, 256),
        d_head=32,
        seeds=5,
        every=20,
        optimal=20,
        constant_steps=10_000,
        annealed_width=128,
        annealed_steps=(5000, 10_000),
        annealed_seeds=5,
        settings={"model.n_layers": 4, "model.context": 256, "train.batch_size": 16, "train.eval_windows": 512,
                  "optimizer.warmup_steps": 100},
    ),
}  # fmt: skip


CONSTANT = {"schedule": "cosine", "final_fraction": 1.0}
TO_ZERO = {"schedule": "cosine", "final_fraction": 0.0}


def config(size: Size, width: int, seed: int, steps: int, optimizer: Mapping[str, float | str]) -> RunConfig:
    """A run of the sweep; `optimizer`: fields of its schedule."""
    return override(
        RunConfig(),
        {
            "model.d_model": width,
            "model.n_heads": width // size.d_head,
            "optimizer.learning_rate": 0.5 / width,
            "train.steps": steps,
            "train.seed": seed,
            "train.eval_every": size.every,
            "train.log_every": size.every,
            **size.settings,
            **{f"optimizer.{name}": value for name, value in optimizer.items()},
        },
    )


def constants(size: Size) -> list[RunConfig]:
    """The constant-rate runs: widths x seeds."""
    return [
        config(size, width, seed, size.constant_steps, CONSTANT) for width in size.widths for seed in range(size.seeds)
    ]


def optimal_steps(size: Size, width: int) -> int:
    """Steps of the compute-optimal training of this width, a multiple of `every`."""

    def parameters(width: int) -> int:
        return flops.parameters(config(size, width, 0, size.constant_steps, CONSTANT).model).total

    first = parameters(size.widths[0])
    tokens = size.optimal * first * (parameters(width) / first) ** GAMMA
    steps = tokens / (size.settings["train.batch_size"] * size.settings["model.context"])
    most = size.constant_steps
    return min(most, max(4 * size.every, size.every * round(steps / size.every)))


SUMMARY = [
    *("run_id", "model.d_model", "params_total", "tokens", "optimizer.schedule", "optimizer.learning_rate"),
    *("optimizer.decay_fraction", "optimizer.final_fraction", "train.steps", "train.seed", "status", "final_loss"),
    *("final_loss_sem", "wall_seconds", "code_version"),
]


def folder(job: Job) -> Path:
    """Where the runs lie, for all papers of a scale."""
    return job.raw.parents[1] / "curves" / job.scale


def train(job: Job, configs: list[RunConfig]) -> tuple[pandas.DataFrame, Any]:
    """(runs, curves) of these configs, trained as far as they are not yet; the curves carry their runs' settings.

    Curves hold one line per validation. Raises Unfinished when the time is up, BadInput where a run diverged.
    """
    from jaxgpt import load, sweep

    runs = sweep(configs, folder(job), max_minutes=job.max_minutes)
    check_complete(runs, configs)
    bad = runs.loc[runs["status"] != "done", "run_id"]
    if len(bad):
        raise BadInput(f"{len(bad)} of {len(runs)} runs diverged, of which no curve can be compared: {', '.join(bad)}")
    seen = load(folder(job))[1].dropna(subset=["validation_loss"])
    columns = ["run_id", *(c for c in runs if "." in c or c in ("params_total", "flops_6nd"))]
    return runs, seen.merge(runs[columns], on="run_id", suffixes=("", "_run")).sort_values(["run_id", "step"])


@cache
def rates(config: RunConfig) -> tuple[float, ...]:
    """The learning rate of every step of a run, as the optimizer takes it."""
    import jax
    import numpy as np

    from jaxgpt.optimizer import hparams, learning_rate

    steps = np.arange(config.train.steps, dtype=np.int32)
    of = jax.vmap(lambda step: learning_rate(config.optimizer.schedule, step, hparams(config)))
    return tuple(np.asarray(of(steps), float).tolist())
