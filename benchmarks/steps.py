"""One training step of an 853k-parameter byte GPT, ours beside its peers: python -m benchmarks.steps

Width 128, 4 layers, 4 heads, T 256, B 16, float32, AdamW. Each side is a process of its own and they take turns of a
few steps, A B C A B C ..., until each has trained the same number of steps on the same text, windows drawn uniformly,
at the same rate; then their held-out losses are compared. Once with glibc told to keep freed memory, once without.

Sides: ours (jaxgpt.step.advance, one run alone, as many steps per dispatch as training takes), PyTorch eager and
torch.compile (peers/nanogpt.py), Flax Linen (peers/nanodo.py).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness

SIZES: dict[str, Any] = {"d_model": 128, "n_layers": 4, "n_heads": 4, "context": 256, "vocab_size": 256}
TRAINING: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 20}
EVAL_WINDOWS = 128
SIDES = ("ours", "PyTorch eager", "nanodo", "torch.compile")
EQUAL = 0.05  # nats per byte that our held-out loss may be above the best peer's


def config(sizes: dict[str, Any] = SIZES, training: dict[str, Any] = TRAINING) -> Any:
    """Our run of the same model and training."""
    from jaxgpt.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig

    return RunConfig(
        model=ModelConfig(**sizes, positions="learned", tie_output=True),
        optimizer=OptimizerConfig(
            learning_rate=training["learning_rate"], warmup_steps=training["warmup_steps"], schedule="constant"
        ),
        train=TrainConfig(batch_size=training["batch_size"], eval_windows=EVAL_WINDOWS),
    )


# --- the sides: each a function of the text's folder, giving (take n steps, held-out loss) --------------------------

Side = tuple[Callable[[int], None], Callable[[np.ndarray], float]]


def ours(train_n: np.ndarray, window_WxT1: np.ndarray) -> Side:
    """jaxgpt: `step.advance`, one run alone; `jaxgpt train` does the same arithmetic for a stack of one run."""
    import jax
    import jax.numpy as jnp

    from jaxgpt.optimizer import hparams
    from jaxgpt.step import CHUNK, advance, evaluate, init_state, program
    from jaxgpt.tasks.text import TextData, TextTask
    from jaxgpt.train import SECONDS_PER_DISPATCH

    run = config()
    task = TextTask(run.model, run.train.batch_size, run.train.eval_windows)
    prog, h = program(run, task), hparams(run)
    data = TextData(jnp.asarray(train_n), jnp.asarray(window_WxT1), jnp.ones(len(window_WxT1)))
    state, seconds = init_state(prog, h, 0), float("inf")

    def take(n: int) -> None:
        nonlocal state, seconds
        while n:
            now = max(1, min(n, CHUNK, int(SECONDS_PER_DISPATCH / seconds)))
            began = time.perf_counter()
            state, _ = advance(prog, state, np.int32(now), h, data)
            jax.block_until_ready(state)
            seconds, n = (time.perf_counter() - began) / now, n - now

    return take, lambda _: float(np.mean(evaluate(task, state.params, data).loss_W))


def torch_side(compiled: bool) -> Callable[[np.ndarray, np.ndarray], Side]:
    """nanoGPT's design, eager or compiled."""

    def side(train_n: np.ndarray, _window_WxT1: np.ndarray) -> Side:
        from benchmarks.peers import nanogpt

        trainer = nanogpt.trainer(nanogpt.Sizes(**SIZES), train_n, **TRAINING, compiled=compiled)

        def take(n: int) -> None:
            for _ in range(n):
                trainer.step()

        return take, trainer.held_out

    return side


def nanodo_side(train_n: np.ndarray, _window_WxT1: np.ndarray) -> Side:
    """nanodo's design."""
    from benchmarks.peers import nanodo

    trainer = nanodo.trainer(SIZES, train_n, **TRAINING)

    def take(n: int) -> None:
        trainer.steps(n)

    return take, trainer.held_out


def serve(name: str, folder: Path) -> None:
    """A side as a worker: {"steps": n} -> seconds, {"held_out": true} -> loss. The first step, which compiles, is
    taken when it starts; it counts.
    """
    train_n, window_WxT1 = np.load(folder / "train.npy"), np.load(folder / "windows.npy")
    makers: dict[str, Any] = dict(zip(SIDES, (ours, torch_side(False), nanodo_side, torch_side(True)), strict=True))
    take, held_out = makers[name](train_n, window_WxT1)

    def answer(steps: int = 0, held_out_loss: bool = False) -> dict[str, float]:
        if held_out_loss:
            return {"loss": held_out(window_WxT1)}
        return {key: seconds / steps for key, seconds in harness.timed(lambda: take(steps)).items()}

    harness.serve(answer)


# --- the comparison ------------------------------------------------------------------------------------------------


def write_text(folder: Path) -> None:
    """The default corpus and held-out windows, as arrays that every side can read."""
    from jaxgpt import corpus

    text, length = corpus.load("stdlib", 0.1, SIZES["context"]), SIZES["context"] + 1
    starts_W = np.linspace(0, len(text.validation) - length, EVAL_WINDOWS).astype(np.int64)
    np.save(folder / "train.npy", text.train)
    np.save(folder / "windows.npy", text.validation[starts_W[:, None] + np.arange(length)])


def compare(sides: tuple[str, ...], env: dict[str, str], turns: int, steps: int) -> tuple[dict[str, list], dict]:
    """Seconds per step of each side by turn, and the held-out losses after 1 + turns x steps steps."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_text(folder)
        words = ["-m", "benchmarks.steps", "side"]
        asks = {side: stack.enter_context(harness.worker([*words, side, name], env)) for side in sides}
        for side, ask in asks.items():
            harness.say(f"{side} compiles and takes its first step: {ask(steps=1)['wall']:.1f} s")
        found = harness.alternate({side: lambda ask=ask: ask(steps=steps) for side, ask in asks.items()}, turns)
        return found, {side: ask(held_out_loss=True)["loss"] for side, ask in asks.items()}


def rows(found: dict[str, list], how: str, target: float | None) -> list[harness.Row]:
    """Ours in ms, and each peer's time over ours."""
    wall = {side: [one["wall"] for one in turns] for side, turns in found.items()}
    mine = harness.median(1e3 * seconds for seconds in wall["ours"])
    lines = [harness.Row(f"one step, 853k parameters, {how}", mine, "ms", "less")]
    for side in [side for side in wall if side != "ours"]:
        faster = harness.ratio(wall[side], wall["ours"])
        goal = target if side == "PyTorch eager" else None
        lines.append(harness.Row(f"ours against {side}, {how}", faster, "times as fast", "more", goal))
    return lines


def main() -> None:
    """Measures and writes steps.json."""
    if sys.argv[1:2] == ["side"]:
        serve(sys.argv[2], Path(sys.argv[3]))
        return
    args = harness.arguments(__doc__, turns=10, steps=20, plain_turns=5, no_compile=False)
    sides = SIDES[:-1] if args.no_compile else SIDES
    kept, losses = compare(sides, harness.KEEP_MEMORY, args.turns, args.steps)
    plain, _ = compare(SIDES[:-1], {}, args.plain_turns, args.steps)
    behind = losses["ours"] - min(loss for side, loss in losses.items() if side != "ours")
    after = 1 + args.turns * args.steps
    what = f"held-out loss after {after} steps, ours above the best peer's"
    lines = [
        *rows(kept, "freed memory kept", 1.0),
        *rows(plain, "allocator as it is", 1.0),
        harness.Row(what, harness.median([behind]), "nats per byte", "less", EQUAL),
    ]
    spoken = ", ".join(f"{side} {loss:.3f}" for side, loss in losses.items())
    harness.write(
        "steps",
        "One training step, ours and its peers",
        lines,
        {"seconds_freed_memory_kept": kept, "seconds_allocator_as_it_is": plain, "held_out_losses": losses},
        notes=[f"Held-out losses in nats per byte after {after} steps: {spoken}.",
               "Freed memory kept: " + " ".join(f"{k}={v}" for k, v in harness.KEEP_MEMORY.items()) + "."],
        results=args.out,
    )  # fmt: skip
    draw(kept, plain, args.out)


def draw(kept: dict[str, list], plain: dict[str, list], out: Path) -> None:
    """Medians and single turns by side, as steps.png."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for shift, (how, found) in zip(
        (-0.17, 0.17), (("freed memory kept", kept), ("allocator as it is", plain)), strict=True
    ):
        names = [side for side in SIDES if side in found]
        places = [SIDES.index(side) + shift for side in names]
        milliseconds = [[1e3 * one["wall"] for one in found[side]] for side in names]
        axes.barh(places, [float(np.median(m)) for m in milliseconds], 0.3, label=how, alpha=0.75)
        for place, m in zip(places, milliseconds, strict=True):
            axes.plot(m, [place] * len(m), "k|", markersize=6, alpha=0.6)
    shown = [side for side in SIDES if side in kept]
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step: median, and each turn")
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    harness.tidy(axes)
    figure.savefig(out / "steps.png", dpi=150)


if __name__ == "__main__":
    main()
