"""Before a sweep starts: whether its runs fit the device, and how long they may take."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import jax

from jaxgpt import memory, population, prefix, store
from jaxgpt.config import BadInput, RunConfig
from jaxgpt.run import Run


def check_memory(config: RunConfig, devices: int = 1) -> None:
    """Raises BadInput for a run that surely does not fit its devices. By a lower bound: passing proves nothing.

    `devices`: over which its model is spread; each holds its part at least.
    """
    platform = jax.local_devices()[0].platform
    # All CPU devices have the same memory.
    parts = 1 if platform == "cpu" else devices
    need, have = memory.training_bytes(config, platform) // parts, device_bytes()
    if have and need > have:
        raise BadInput(
            f"model.d_model={config.model.d_model}, model.n_layers={config.model.n_layers}, train.batch_size="
            f"{config.train.batch_size}: training needs at least {need / 1e9:,.1f} GB and the device has "
            f"{have / 1e9:,.1f} GB; make one of them smaller or raise train.microbatches"
        )


def device_bytes() -> int:
    """Memory of a device in bytes; 0 where it is not known."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def estimate_seconds(runs: Sequence[Run], lanes: int) -> float:
    """A rough forecast of the time that the unfinished runs take on so many lanes.

    From the speed of finished runs in the same folder where there are some, else from the speed of a matrix product
    of each model's width, and COMPILE_SECONDS for each program.
    """
    todo = [run for run in runs if store.read_row(run.folder, run.id) is None]
    rows = {run.id: row for run in runs if (row := store.read_row(run.folder, run.id)) and row["wall_seconds"]}
    # What another run trains too counts once, there.
    shared = prefix.shared_steps(todo) | {i: row.get("shared_steps", 0) for i, row in rows.items()}
    work = {run.id: population.work(run) * (1 - shared.get(run.id, 0) / run.config.train.steps) for run in runs}
    rows = {i: row for i, row in rows.items() if work[i]}
    if rows:
        rate = sum(work[i] for i in rows) / sum(row["wall_seconds"] for row in rows.values())
        return sum(work[run.id] for run in todo) / rate / lanes
    programs = {run.program for run in todo}
    rates = {width: _matmul_flops_per_second(width) for width in {run.config.model.d_model for run in todo}}
    seconds = sum(work[run.id] / (STEP_EFFICIENCY * rates[run.config.model.d_model]) for run in todo)
    # A matrix product uses all cores, and lanes share them.
    lanes = 1 if jax.default_backend() == "cpu" else lanes
    return seconds / lanes + COMPILE_SECONDS * len(programs)


# Measured on 2 CPU cores over the demo's models; for a forecast only.
COMPILE_SECONDS = 6.0
STEP_EFFICIENCY = 0.3


def _matmul_flops_per_second(width: int) -> float:
    """Speed of [2048, width] x [width, 4 width] on this device, FLOPs per second; the best of three."""
    product = jax.jit(lambda x_BxD, w_DxF: x_BxD @ w_DxF)
    x_BxD, w_DxF = jax.numpy.ones((2048, width)), jax.numpy.ones((width, 4 * width))
    product(x_BxD, w_DxF).block_until_ready()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(10):
            out = product(x_BxD, w_DxF)
        out.block_until_ready()
        times.append((time.perf_counter() - began) / 10)
    return 2 * 2048 * 4 * width**2 / min(times)
