"""How speed scales with the number of runs and the size of a model: python -m benchmarks.scale

Tokens per second of the engine, compiled and warm, over all cores: of 1 to 64 runs of one small model, and of models
of 5k to 3M parameters, one run by itself and two for each core. And the seconds that Python takes per step of a model
of 1M parameters, beside the step.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness

COUNTS = (1, 2, 4, 8, 16, 32, 64)
SIZES = ((8, 2, 1), (16, 2, 1), (32, 3, 2), (64, 4, 4), (128, 4, 4), (128, 12, 4))  # width, layers, heads
MILLION = (128, 5, 4)  # 1.05M parameters
SMALL = (32, 2, 2)
SECONDS = 1.0  # of a turn, about


def config(size: tuple[int, int, int], seed: int = 0, **train: Any) -> Any:
    """A run of a model of (width, layers, heads): T 64, B 16."""
    from jaxgpt.config import ModelConfig, RunConfig, TrainConfig

    model = ModelConfig(d_model=size[0], n_layers=size[1], n_heads=size[2], context=64)
    return RunConfig(model=model, train=TrainConfig(**{"steps": 100_000, "seed": seed, "eval_windows": 2, **train}))


# --- speed ---------------------------------------------------------------------------------------------------------


def serve(side: str) -> None:
    """A worker that holds some runs: {"load": [size, count]} takes others up, {} -> tokens per second.

    `lanes`: as a sweep would place them, cores as devices. `all cores`: one device, whose products use all cores.
    """
    from benchmarks import engine
    from jaxgpt.launch import expose

    lanes = expose(None)
    held: dict[str, Any] = {}

    def answer(load: Any = None) -> dict[str, Any]:
        if load is not None:
            size, count = load
            runs = engine.runs_of([config(tuple(size), seed) for seed in range(count)])
            blocks = engine.planned(runs, lanes) if side == "lanes" else engine.single(runs)
            advance, steps = engine.start(blocks, lanes), 1
            while (seconds := harness.timed(partial(advance, steps))["wall"]) < SECONDS / 4:
                steps *= 2
            held.update(runs=runs, advance=advance, steps=max(1, round(steps * SECONDS / seconds)))
            return {"blocks": [[block.plan.mode, len(block.runs)] for block in blocks]}
        seconds = harness.timed(lambda: held["advance"](held["steps"]))
        return {**seconds, "tokens_per_second": engine.tokens(held["runs"], held["steps"]) / seconds["wall"]}

    harness.serve(answer)


def speeds(cases: list[tuple[tuple[int, int, int], int]], turns: int) -> list[dict[str, list[float]]]:
    """Tokens per second of each case (size, number of runs), by side and turn."""
    env = {"lanes": {}, "all cores": {"JAX_NUM_CPU_DEVICES": "1"}}
    found = []
    with ExitStack() as stack:
        words = ["-m", "benchmarks.scale", "side"]
        asks = {side: stack.enter_context(harness.worker([*words, side], more)) for side, more in env.items()}
        for case in cases:
            harness.say(f"{case[1]} runs of width {case[0][0]}, {case[0][1]} layers")
            for ask in asks.values():
                ask(load=case)
            rates = harness.alternate({side: lambda ask=ask: ask() for side, ask in asks.items()}, turns)
            found.append({side: [one["tokens_per_second"] for one in values] for side, values in rates.items()})
    return found


# --- Python's part -------------------------------------------------------------------------------------------------


def overhead(steps: int) -> dict[str, float]:
    """Seconds per step of a run of 1M parameters in training, and what Python takes of it, by the median dispatch.

    Python's: from the end of a dispatch to the beginning of the next, points of the curve, loops and all, and a
    dispatch of no steps. The run is stopped long before its first validation or checkpoint, which are not among it.
    """
    import jax
    import numpy as np

    from benchmarks import engine
    from jaxgpt import population
    from jaxgpt.launch import plan
    from jaxgpt.train import Stopped, train

    spans: list[tuple[float, float, int]] = []  # begin, end, steps
    dispatch = population.advance

    def watched(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        out = dispatch(*arguments, **named)
        jax.block_until_ready(out)
        spans.append((began, time.perf_counter(), int(np.max(arguments[3]))))
        return out

    with tempfile.TemporaryDirectory() as folder:
        (run,) = plan([config(MILLION, log_every=1)], folder)
        population.advance = watched
        try:
            train(run, stop=lambda: sum(n for *_, n in spans) >= steps)
        except Stopped:
            pass
        finally:
            population.advance = dispatch

    loaded = engine.load(engine.single([run])[0], jax.devices()[0], run.source.data())
    empty = harness.median(harness.timed(lambda: loaded.advance(0))["wall"] for _ in range(21)).value
    later = spans[2:]  # the first compiles, the second finds its memory
    gap = harness.median(now[0] - before[1] for before, now in zip(spans[1:], later, strict=False)).value
    per_step = harness.median((end - began) / n for began, end, n in later).value
    several = sum(n for *_, n in later) / len(later)
    return {"step": per_step + gap / several, "python": (gap + empty) / several, "steps_per_dispatch": several}


def serve_overhead() -> None:
    """A worker: {"steps": n} -> overhead."""
    harness.serve(lambda steps: overhead(steps))


# --- together ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measures and writes scale.json and scale.png."""
    if sys.argv[1:2] == ["side"]:
        serve_overhead() if sys.argv[2] == "overhead" else serve(sys.argv[2])
        return
    args = harness.arguments(__doc__, turns=3, most_runs=64, most_parameters=3_000_000, steps=60)
    from jaxgpt import flops

    counts = [n for n in COUNTS if n <= args.most_runs]
    sizes = {s: flops.parameters(config(s).model).total for s in SIZES}
    sizes = {s: n for s, n in sizes.items() if n <= args.most_parameters}
    cores = harness.machine()["cores"]
    by_count = speeds([(SMALL, n) for n in counts], args.turns)
    by_size = [speeds([(s, n) for s in sizes], args.turns) for n in (1, 2 * cores)]
    with harness.worker(["-m", "benchmarks.scale", "side", "overhead"]) as ask:
        costs = [ask(steps=args.steps) for _ in range(args.turns)]
    share = harness.median(100 * one["python"] / one["step"] for one in costs)
    most = harness.ratio(by_count[-1]["lanes"], by_count[0]["lanes"])
    lines = [
        harness.Row("Python's share of a step, 1M parameters", share, "%", "less", 1.0),
        harness.Row(
            f"{counts[-1]} small runs over one, both as a sweep places them", most, "times the tokens/s", "more"
        ),
    ]
    figures = {
        "by_count": dict(zip(map(str, counts), by_count, strict=True)),
        "by_size": {str(n): {"one run": a, f"{2 * cores} runs": b}
                    for n, a, b in zip(sizes.values(), *by_size, strict=True)},
        "overhead": costs,
    }  # fmt: skip
    harness.write("scale", "Speed against the number of runs and their size", lines, figures, results=args.out)
    draw(figures, args.out)


NAMES = {"lanes": "as a sweep: a core for each", "all cores": "one after the other, all cores"}


def draw(figures: dict[str, Any], out: Path) -> None:
    """Tokens per second against the number of runs, and against size, as scale.png."""
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import NullFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
    counts = [int(n) for n in figures["by_count"]]
    for side, label in NAMES.items():
        rates = np.array([figures["by_count"][str(n)][side] for n in counts])
        left.plot(counts, np.median(rates, axis=1), "o-", label=label, markersize=4)
        left.fill_between(counts, rates.min(axis=1), rates.max(axis=1), alpha=0.2)
    left.set_xscale("log", base=2)
    left.set_xticks(counts, [str(n) for n in counts])
    left.set_ylim(bottom=0)
    left.set_xlabel(f"runs (width {SMALL[0]}, {SMALL[1]} layers)")
    left.set_ylabel("tokens per second, all runs")
    left.legend(frameon=False)
    sizes = [int(n) for n in figures["by_size"]]
    many = list(next(iter(figures["by_size"].values())))[1]
    for (case, side), label in {
        ("one run", "all cores"): "one run, all cores",
        (many, "all cores"): f"{many}, one after the other",
        (many, "lanes"): f"{many}, as a sweep",
    }.items():
        rates = [float(np.median(figures["by_size"][str(n)][case][side])) for n in sizes]
        right.plot(sizes, rates, "o-", label=label, markersize=4)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("parameters")
    for axis in (right.xaxis, right.yaxis):
        axis.set_minor_formatter(NullFormatter())  # between decades they would run into each other
    right.legend(frameon=False)
    for axes in (left, right):
        harness.tidy(axes)
    figure.savefig(out / "scale.png", dpi=150)


if __name__ == "__main__":
    main()
