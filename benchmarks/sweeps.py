"""24 runs as one sweep, beside the same runs as one process each: python -m benchmarks.sweeps

6 sizes of 5k to 200k parameters times 4 learning rates, T 64, B 16, 300 steps. Black-box, by the `jaxgpt` command:
`jaxgpt sweep`, and `jaxgpt train` for each run, one after the other. Each turn begins with an empty compilation cache
for either side (cold) and then repeats with the filled one and new folders (warm). Start-up counts.

Then the steady state, without start-up and compilation: tokens per second of the engine over all cores, beside one run
after the other in one process with all cores.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import harness

# Parameters: 5.8k, 15k, 33k, 54k, 108k, 181k (with 256 byte values; checked by a test).
SIZES = ((8, 2, 1), (16, 2, 1), (24, 3, 1), (32, 3, 2), (48, 3, 3), (64, 3, 4))
RATES = (0.002, 0.004, 0.008, 0.016)
FIELDS = ("model.d_model", "model.n_layers", "model.n_heads")
JAXGPT = (sys.executable, "-c", "import sys; from experiments.cli import main; sys.exit(main(sys.argv[1:]))")


def shared(steps: int) -> list[str]:
    """Settings that all runs have."""
    return ["model.context=64", "train.batch_size=16", f"train.steps={steps}", "train.eval_windows=64"]


def settings() -> list[list[str]]:
    """What each of the 24 runs has of its own."""
    return [
        [*(f"{name}={value}" for name, value in zip(FIELDS, size, strict=True)), f"optimizer.learning_rate={rate}"]
        for size, rate in itertools.product(SIZES, RATES)
    ]


def sweep_words(steps: int, out: Path) -> list[str]:
    """The one command."""
    columns = zip(FIELDS, zip(*SIZES, strict=True), strict=True)
    axes = [f"{name}={','.join(map(str, values))}" for name, values in columns]
    rates = f"optimizer.learning_rate={','.join(map(str, RATES))}"
    return [*JAXGPT, "sweep", *axes, rates, *shared(steps), "--zip", ",".join(FIELDS), "--out", str(out)]


def train_words(steps: int, out: Path) -> list[list[str]]:
    """The command of each run."""
    return [[*JAXGPT, "train", *own, *shared(steps), "--out", str(out)] for own in settings()]


def one_sweep(steps: int, out: Path, cache: Path) -> dict[str, float]:
    """Seconds of the one command."""
    return harness.command(sweep_words(steps, out), caching(cache))


def each_alone(steps: int, out: Path, cache: Path, at_once: int = 1) -> dict[str, float]:
    """Seconds of a process for each run, `at_once` of them at a time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        each = list(pool.map(lambda words: harness.command(words, caching(cache)), train_words(steps, out)))
    return {"wall": time.perf_counter() - began, "cpu": sum(one["cpu"] for one in each)}


def caching(cache: Path) -> dict[str, str]:
    """Where compiled programs are kept."""
    return {"JAX_COMPILATION_CACHE_DIR": str(cache), "XDG_CACHE_HOME": str(cache / "home")}


def process_turns(turns: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Seconds by side and turn: each twice in a turn, cold and then warm. And once, warm, two processes at a time."""
    found: dict[str, list[dict[str, float]]] = {}
    ways: dict[str, Callable[..., dict[str, float]]] = {"sweep": one_sweep, "one process each": each_alone}
    for turn in range(turns):
        with tempfile.TemporaryDirectory() as name:
            for state, (side, way) in itertools.product(("cold", "warm"), ways.items()):
                cache = Path(name, "cache", side)
                seconds = way(steps, Path(name, "out", state, side), cache)
                found.setdefault(f"{side}, {state}", []).append(seconds)
                harness.say(f"turn {turn + 1} of {turns}, {side}, {state}: {seconds['wall']:.1f} s")
            if turn == turns - 1:
                cache = Path(name, "cache", "one process each")
                pair = each_alone(steps, Path(name, "out", "pair"), cache, at_once=2)
                found["two processes at a time, warm"] = [pair]
    return found


# --- the steady state ----------------------------------------------------------------------------------------------


def serve(side: str) -> None:
    """A side as a worker: {"steps": n} -> seconds and tokens per second of n steps of each of the 24 runs."""
    from benchmarks import engine
    from jaxgpt.config import RunConfig, override, parse_settings
    from jaxgpt.launch import expose

    lanes = expose(None)
    configs = [override(RunConfig(), parse_settings([*own, *shared(1000)])) for own in settings()]
    runs = engine.runs_of(configs)
    blocks = engine.planned(runs, lanes) if side == "population" else engine.single(runs)
    advance = engine.start(blocks, lanes)

    def answer(steps: int) -> dict[str, Any]:
        seconds = harness.timed(lambda: advance(steps))
        plans = [[block.plan.mode, len(block.runs), block.runs[0].config.model.d_model] for block in blocks]
        return {**seconds, "tokens_per_second": engine.tokens(runs, steps) / seconds["wall"], "blocks": plans}

    harness.serve(answer)


def steady(turns: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Tokens per second by side and turn. One after the other: one device, whose products use all cores."""
    words, sides = (
        ["-m", "benchmarks.sweeps", "side"],
        {"population": {}, "one after the other": {"JAX_NUM_CPU_DEVICES": "1"}},
    )
    with ExitStack() as stack:
        asks = {side: stack.enter_context(harness.worker([*words, side], env)) for side, env in sides.items()}
        return harness.alternate({side: lambda ask=ask: ask(steps=steps) for side, ask in asks.items()}, turns)


def main() -> None:
    """Measures and writes sweeps.json."""
    if sys.argv[1:2] == ["side"]:
        serve(sys.argv[2])
        return
    args = harness.arguments(__doc__, turns=2, steps=300, steady_turns=7, steady_steps=40, steady_only=False)
    lines, figures = [], {}
    if not args.steady_only:
        figures["seconds"] = process_turns(args.turns, args.steps)
        lines += process_rows(figures["seconds"])
    figures["steady"] = rates = steady(args.steady_turns, args.steady_steps)
    speed = {side: [one["tokens_per_second"] for one in turns] for side, turns in rates.items()}
    gain = harness.ratio(speed["population"], speed["one after the other"])
    lines += [
        harness.Row("24 runs, steady state", harness.median(speed["population"]), "tokens/s", "more"),
        harness.Row("population over one run after the other, steady state", gain, "times the tokens/s", "more", 1.5),
    ]
    title = f"24 runs of 5k to 200k parameters, {args.steps} steps each"
    harness.write("sweeps", title, lines, figures, results=args.out)


def process_rows(found: dict[str, list[dict[str, float]]]) -> list[harness.Row]:
    """Whole processes, cold and warm."""
    wall, lines = {side: [one["wall"] for one in turns] for side, turns in found.items()}, []
    for state, target in (("cold", 2.5), ("warm", 2.0)):
        took = harness.median(wall[f"sweep, {state}"])
        less = harness.ratio(wall[f"one process each, {state}"], wall[f"sweep, {state}"])
        lines += [
            harness.Row(f"24 runs as one sweep, {state}", took, "s", "less"),
            harness.Row(f"one process each over one sweep, {state}", less, "times the time", "more", target),
        ]
    pair = harness.ratio(wall["two processes at a time, warm"], wall["sweep, warm"][-1:])
    return [*lines, harness.Row("two processes at a time over one sweep, warm", pair, "times the time", "more")]


if __name__ == "__main__":
    main()
