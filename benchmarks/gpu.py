"""GPT-2 of 124M parameters beside nanoGPT's design, and a population of small models: python3 -m benchmarks.gpu

Run it in the folder of this repository. It needs a GPU with JAX (flax, optax, einops) and PyTorch, and nothing
of ours installed.

One model: 124M parameters, T 1024, bfloat16 arithmetic and float32 parameters on both sides, random tokens; ours
(jaxgpt.step.advance) and nanoGPT's design (peers/nanogpt.py: torch.compile, flash attention, fused AdamW) are processes
of their own that take turns, A B A B. MFU: our exact FLOPs, with the attention that a causal mask leaves, over the
card's dense peak; the same count for both sides.

Population: 64 models of 1M parameters at once (vmap) beside one at a time, tokens per second of all.

`--tiny` checks the script itself, on any device, with models that say nothing about speed.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks import harness

GPT2 = {"d_model": 768, "n_layers": 12, "n_heads": 12, "context": 1024, "vocab_size": 50304}  # nanoGPT's padding
TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "context": 32, "vocab_size": 256}
SMALL = {"d_model": 128, "n_layers": 5, "n_heads": 4, "context": 256, "vocab_size": 256}  # 1.05M parameters
TEXT = 2_000_000  # tokens, drawn uniformly
RATE = 1e-4
POPULATION = 64
# JAX would take three quarters of the card's memory at once, and PyTorch has to live beside it.
SHARING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def config(sizes: dict[str, Any], batch_size: int, seed: int = 0) -> Any:
    """Our run."""
    import jax

    from jaxgpt.config import ModelConfig, OptimizerConfig, RunConfig, TrainConfig

    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    model = ModelConfig(**sizes, positions="learned", tie_output=True, compute_dtype=dtype)
    return RunConfig(
        model=model,
        optimizer=OptimizerConfig(learning_rate=RATE, schedule="constant", warmup_steps=0),
        train=TrainConfig(batch_size=batch_size, steps=100_000, seed=seed, eval_windows=2),
    )


def random_tokens(vocab_size: int) -> np.ndarray:
    """The text: which tokens does not matter for speed."""
    return np.random.default_rng(0).integers(0, vocab_size, TEXT).astype(np.uint16)


# --- the sides -----------------------------------------------------------------------------------------------------


def task_and_data(run: Any) -> tuple[Any, Any]:
    """Language modelling on random tokens, on the device."""
    import jax.numpy as jnp

    from jaxgpt.tasks.text import TextData, TextTask

    c = run.model
    train_n = random_tokens(c.vocab_size)
    windows_WxT1 = train_n[: 2 * (c.context + 1)].reshape(2, -1)
    task = TextTask(c, run.train.batch_size, run.train.eval_windows)
    return task, TextData(jnp.asarray(train_n), jnp.asarray(windows_WxT1), jnp.ones(2))


def ours(sizes: dict[str, int], batch_size: int) -> Any:
    """A function that takes n steps of our model in one dispatch."""
    import jax

    from jaxgpt.optimizer import hparams
    from jaxgpt.step import advance, init_state, program

    run = config(sizes, batch_size)
    task, data = task_and_data(run)
    prog, h = program(run, task), hparams(run)
    state = init_state(prog, h, 0)

    def take(n: int) -> None:
        nonlocal state
        state, _ = advance(prog, state, np.int32(n), h, data)
        jax.block_until_ready(state)

    return take


def theirs(sizes: dict[str, int], batch_size: int) -> Any:
    """A function that takes n steps of nanoGPT's design; compiled on a GPU."""
    import torch

    from benchmarks.peers import nanogpt

    cuda = torch.cuda.is_available()
    trainer = nanogpt.trainer(
        nanogpt.Sizes(**sizes),
        random_tokens(sizes["vocab_size"]),
        batch_size=batch_size,
        learning_rate=RATE,
        compiled=cuda,
        device="cuda" if cuda else "cpu",
    )

    def take(n: int) -> None:
        for _ in range(n):
            trainer.step()
        if cuda:
            torch.cuda.synchronize()

    return take


def population(sizes: dict[str, int], batch_size: int, count: int) -> Any:
    """A function that takes n steps of each of `count` of our models at once."""
    import jax

    from jaxgpt.optimizer import hparams
    from jaxgpt.population import advance, stack
    from jaxgpt.step import init_state, program

    runs = [config(sizes, batch_size, seed) for seed in range(count)]
    task, data = task_and_data(runs[0])
    prog, h = program(runs[0], task), [hparams(run) for run in runs]
    states_R = stack([init_state(prog, h_, seed) for seed, h_ in enumerate(h)], count)
    states_R, h_R = jax.device_put((states_R, stack(h, count)))

    def take(n: int) -> None:
        nonlocal states_R
        mode = "map" if count == 1 else "vmap"
        states_R, _ = advance(prog, mode, states_R, np.full(count, n, np.int32), h_R, {}, data)
        jax.block_until_ready(states_R)

    return take


def serve(side: str, tiny: bool, batch_size: int) -> None:
    """A side as a worker: {"steps": n} -> seconds and tokens per second, {"profile": folder} -> kinds of operations."""
    if side in ("ours", "theirs"):
        sizes, count = TINY if tiny else GPT2, 1
        take = (ours if side == "ours" else theirs)(sizes, batch_size)
    else:
        sizes, count = TINY if tiny else SMALL, int(side)
        take = population(sizes, batch_size, count)
    tokens = count * batch_size * sizes["context"]

    def answer(steps: int) -> dict[str, float]:
        seconds = harness.timed(lambda: take(steps))
        return {**seconds, "tokens_per_second": steps * tokens / seconds["wall"]}

    harness.serve(answer)


# --- the comparison ------------------------------------------------------------------------------------------------


def turns_of(sides: tuple[str, ...], more: list[str], turns: int, steps: dict[str, int]) -> dict[str, list[float]]:
    """Tokens per second by side and turn, each side a process of its own that has compiled before the first turn."""
    with ExitStack() as stack:
        words = ["-m", "benchmarks.gpu", "side"]
        asks = {side: stack.enter_context(harness.worker([*words, side, *more], SHARING)) for side in sides}
        for side, ask in asks.items():
            began = time.perf_counter()
            ask(steps=1)
            ask(steps=steps[side])  # clocks rise, memory is found
            harness.say(f"{side} is ready after {time.perf_counter() - began:.0f} s")
        ready = {side: lambda ask=ask, n=steps[side]: ask(steps=n) for side, ask in asks.items()}
        found = harness.alternate(ready, turns)
    return {side: [one["tokens_per_second"] for one in values] for side, values in found.items()}


def profiled(batch_size: int, out: Any) -> dict[str, float]:
    """Shares of the device's time by kind of operation, of our 124M model; see jaxgpt/profile.py."""
    from jaxgpt.profile import profile
    from jaxgpt.run import Run, Source

    run = config(GPT2, batch_size)
    task, data = task_and_data(run)
    return profile(Run(run, Source(task, lambda: data, "random"), out), out / "gpu-profile").shares


def device(tiny: bool) -> str:
    """The GPU's name. Ends the process with one line where something is missing."""
    os.environ.update(SHARING)
    try:
        import einops
        import flax
        import jax
        import optax
        import torch
    except ImportError as error:
        sys.exit(f"benchmarks.gpu needs JAX, flax, optax, einops and PyTorch, and {error.name} is not installed")
    del einops, flax, optax
    if not tiny and (jax.default_backend() != "gpu" or not torch.cuda.is_available()):
        sys.exit("benchmarks.gpu needs a GPU that JAX and PyTorch see; --tiny checks the script itself on any device")
    return jax.devices()[0].device_kind


def main() -> None:
    """Measures and writes gpu.json."""
    if sys.argv[1:2] == ["side"]:
        serve(sys.argv[2], sys.argv[3] == "tiny", int(sys.argv[4]))
        return
    args = harness.arguments(__doc__, turns=7, steps=20, batch_size=16, small_batch_size=8, tiny=False)
    name = device(args.tiny)
    from jaxgpt.profile import mfu

    tiny, n = ("tiny", 4) if args.tiny else ("full", POPULATION)
    pair, counts = ("ours", "theirs"), (str(n), "1")
    large = turns_of(pair, [tiny, str(args.batch_size)], args.turns, dict.fromkeys(pair, args.steps))
    steps = dict(zip(counts, (args.steps, 4 * args.steps), strict=True))
    many = turns_of(counts, [tiny, str(args.small_batch_size)], args.turns, steps)
    run = config(TINY if args.tiny else GPT2, args.batch_size)
    shares = {side: mfu(run, harness.median(rates).value, name, "bfloat16") for side, rates in large.items()}
    kinds, notes = {}, [] if shares["ours"] is not None else [f"No published peak of {name} is known: no MFU."]
    if shares["ours"] is not None and shares["ours"] < 0.4:
        kinds = profiled(args.batch_size, args.out)
        spoken = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in kinds.items())
        notes.append(f"Where our step's device time goes: {spoken}.")
    lines = [*large_rows(large, shares), *many_rows(many, n)]
    if args.tiny:
        sys.stdout.write("".join(f"{harness.line(row)}\n" for row in lines))
        harness.say("the script runs; with --tiny nothing is written, and the numbers say nothing")
        return
    figures = {"tokens_per_second": {**large, **many}, "mfu": shares, "shares": kinds}
    harness.write("gpu", "On a GPU", lines, figures, notes=notes, device=name, results=args.out)


def large_rows(large: dict[str, list[float]], shares: dict[str, float | None]) -> list[harness.Row]:
    """Of the 124M model."""
    who = {"ours": "ours", "theirs": "nanoGPT's design"}
    lines = [
        harness.Row(f"124M parameters, bf16, T 1024, {who[side]}", harness.median(rates), "tokens/s", "more")
        for side, rates in large.items()
    ]
    gain = harness.ratio(large["ours"], large["theirs"])
    lines.append(harness.Row("ours over nanoGPT's design", gain, "times the tokens/s", "more", 1.0))
    for side, share in shares.items():
        if share is not None:
            lines.append(harness.Row(f"MFU, {who[side]}", harness.median([100 * share]), "%", "more"))
    return lines


def many_rows(many: dict[str, list[float]], count: int) -> list[harness.Row]:
    """Of the population."""
    what, gain = f"{count} models of 1M parameters", harness.ratio(many[str(count)], many["1"])
    return [
        harness.Row(f"{what} at once", harness.median(many[str(count)]), "tokens/s", "more"),
        harness.Row(f"{what} over one at a time", gain, "times the tokens/s", "more", 10.0),
    ]


if __name__ == "__main__":
    main()
