"""From the command to the first step, for each of the demo's models: python -m benchmarks.startup

Seconds from the start of the process of `jaxgpt train` until its first training step is done: Python, imports, the
text, initial parameters, the compiled program. Cold: with an empty compilation cache. Warm: with what the same command
left there; the results folder is new each time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness

# The command, watched: once the engine is imported, its dispatch is replaced by one that ends the process after the
# first. Nothing is imported for it that the command does not import itself, or earlier than it does.
WATCHED = """
import os, sys, threading, time

def watch():
    while not hasattr(sys.modules.get("jaxgpt.population"), "advance"):
        time.sleep(0.002)
    engine = sys.modules["jaxgpt.population"]
    dispatch = engine.advance

    def first(*arguments, **named):
        import jax
        jax.block_until_ready(dispatch(*arguments, **named))
        sys.stdout.write("the first step is done")
        sys.stdout.flush()
        os._exit(0)

    engine.advance = first

threading.Thread(target=watch, daemon=True).start()
from experiments.cli import main
sys.exit(main(sys.argv[1:]) or 3)
"""


def words(config: Any) -> list[str]:
    """The settings of a config that are not the defaults, as the command takes them."""
    from jaxgpt.config import RunConfig, flatten, to_dict

    default = flatten(to_dict(RunConfig()))
    return [f"{name}={value}" for name, value in flatten(to_dict(config)).items() if value != default[name]]


def models() -> dict[str, list[str]]:
    """The command's words for one run of each of the demo's populations."""
    from experiments.scaling import demo

    firsts: dict[str, list[str]] = {}
    for config in demo.configs(demo.SWEEPS["laptop"]):
        firsts.setdefault(f"width {config.model.d_model}, {config.model.n_layers} layers", words(config))
    return firsts


def first_step(settings: list[str], cache: Path) -> float:
    """Wall seconds to the first step."""
    with tempfile.TemporaryDirectory() as out:
        env = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        return harness.command([sys.executable, "-c", WATCHED, "train", *settings, "--out", out], env)["wall"]


def measure(runs: Mapping[str, list[str]], turns: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by model, cold and warm, in each turn."""
    found = {name: {"cold": [], "warm": []} for name in runs}
    for turn in range(turns):
        for name, settings in runs.items():
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    found[name][state].append(first_step(settings, Path(cache)))
                    harness.say(f"turn {turn + 1} of {turns}, {name}, {state}: {found[name][state][-1]:.1f} s")
    return found


def main() -> None:
    """Measures and writes startup.json."""
    args = harness.arguments(__doc__, turns=3)
    found = measure(models(), args.turns)
    lines = []
    for state, target in (("warm", 4.0), ("cold", None)):
        slowest = max(found, key=lambda name: harness.median(found[name][state]).value)
        what = f"command to first step, {state}, the slowest of the demo's models ({slowest})"
        lines.append(harness.Row(what, harness.median(found[slowest][state]), "s", "less", target))
    harness.write("startup", "From the command to the first step", lines, {"seconds": found}, results=args.out)
    draw(found, args.out)


def draw(found: Mapping[str, Mapping[str, list[float]]], out: Path) -> None:
    """Medians and single turns by model, as startup.png."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for shift, state in ((-0.17, "cold"), (0.17, "warm")):
        places = np.arange(len(found)) + shift
        axes.barh(places, [float(np.median(one[state])) for one in found.values()], 0.3, label=state, alpha=0.75)
        for place, one in zip(places, found.values(), strict=True):
            axes.plot(one[state], [place] * len(one[state]), "k|", markersize=6, alpha=0.6)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.axvline(4, color="k", linestyle=":", linewidth=1)
    axes.set_xlabel("seconds from command to first step (dotted: target when warm)")
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    harness.tidy(axes)
    figure.savefig(out / "startup.png", dpi=150)


if __name__ == "__main__":
    main()
