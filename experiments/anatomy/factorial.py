"""What kills hidden units: small models trained at two biases, rates and weight decays, with three activations.

All combinations, a sweep of one program for each activation. Letters as in model.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.registry import Job, check_complete
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas
    from jax import Array

    from jaxgpt.config import ModelConfig
    from jaxgpt.run import Source
    from jaxgpt.step import Loss, Task

ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU", "swiglu": "SiLU"}  # SiLU is the gate's of a SwiGLU
READERS = {"relu": "up", "gelu": "up", "swiglu": "gate"}  # the matrix whose outputs go through the activation
FACTORS = ("shift", "rate", "decay")
DEADLY = 0.01


@dataclass(frozen=True)
class Levels:
    """The two levels of each factor, the harmless one first. shift: what is added to every unit's bias at the start."""

    shift: tuple[float, float]
    rate: tuple[float, float]
    decay: tuple[float, float]


def shifted(params: Any, reader: str, shift: Array | float) -> Any:
    """The parameters with this added to the biases of the MLPs' matrix `reader`."""
    import jax

    from jaxgpt.build import param_name

    def leaf(path: tuple, p: Array) -> Array:
        return p + shift if param_name(path).endswith(f"mlp.{reader}.bias") else p

    return jax.tree_util.tree_map_with_path(leaf, params)


@dataclass(frozen=True)
class Shifted:
    """A task of which the biases before the activation start at the number "shift" of its Source: they are parameters
    plus shift. Adam moves them as if they had started there, and weight decay leaves biases alone.
    """

    task: Task
    reader: str

    @property
    def unit(self) -> str:
        """The task's."""
        return self.task.unit  # pyright: ignore[reportAttributeAccessIssue]

    def init(self, seed: int) -> Any:
        """Without the shift."""
        return self.task.init(seed)

    def sample(self, data: Any, key: Array, step: Array) -> Any:
        """The task's batch, and the shift for each row of it."""
        import jax
        import jax.numpy as jnp

        data, numbers = data
        batch = self.task.sample(data, key, step)
        return batch, jnp.broadcast_to(numbers["shift"], len(jax.tree.leaves(batch)[0]))

    def loss(self, params: Any, batch: Any, key: Array) -> Loss:
        """The task's, of the shifted parameters."""
        inner, shift_B = batch
        return self.task.loss(shifted(params, self.reader, shift_B[0]), inner, key)

    def evaluate(self, params: Any, data: Any) -> Any:
        """The task's, of the shifted parameters."""
        data, numbers = data
        return self.task.evaluate(shifted(params, self.reader, numbers["shift"]), data)

    def summarise(self, held_out: Any) -> dict[str, float]:
        """The task's."""
        return self.task.summarise(held_out)


def configs(levels: Levels, seeds: range, settings: dict[str, Any]) -> list[RunConfig]:
    """Activations x rates x decays x seeds."""
    return [
        override(RunConfig(), {
            **settings, "model.mlp": activation, "optimizer.learning_rate": rate, "optimizer.weight_decay": decay,
            "train.seed": seed,
        })
        for activation in ACTIVATIONS
        for rate in levels.rate
        for decay in levels.decay
        for seed in seeds
    ]  # fmt: skip


def setup(shift: float) -> Callable[[RunConfig], Source]:
    """What a config trains on where biases start at this."""
    from dataclasses import replace

    from jaxgpt.tasks import text

    read = text.reader()

    def source(config: RunConfig) -> Source:
        plain = read(config)
        return replace(plain, task=Shifted(plain.task, READERS[config.model.mlp]), numbers={"shift": shift},
                       identity=f"{plain.identity}, shifted biases")  # fmt: skip

    return source


def train(job: Job, levels: Levels, seeds: range, settings: dict[str, Any], minutes: float | None) -> pandas.DataFrame:
    """All runs, a line each, with the column shift. Raises Unfinished."""
    import pandas

    from jaxgpt import sweep

    began, found, wanted = time.monotonic(), [], configs(levels, seeds, settings)
    for shift in levels.shift:
        left = None if minutes is None else max(0.0, minutes - (time.monotonic() - began) / 60)
        runs = sweep(wanted, job.raw, setup=setup(shift), max_minutes=left)
        check_complete(runs, wanted)
        found.append(runs.assign(shift=shift))
    return pandas.concat(found, ignore_index=True)


def looked_at(job: Job, runs: Any, window_WxT1: Any) -> pandas.DataFrame:
    """A line per run that did not diverge: shares of its units that are never above 0 before the activation (`silent`;
    of ReLU: dead), at the end and at the start, and that never add a thousandth of the stream's norm (`idle`:
    analysis.anatomy.effectively_dead), the root mean square of their incoming weights and the mean of their biases.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import pandas
    from flax import nnx

    from analysis.anatomy import dead, effectively_dead
    from experiments.anatomy import units
    from experiments.anatomy.family import arrays_of
    from jaxgpt import build
    from jaxgpt.trained import load_model

    def silent(seen: units.Seen) -> float:
        return float(dead(seen.largest_WxLxF.max(axis=0)).mean())

    def reads(state: nnx.State, c: ModelConfig, leaf: str) -> list[numpy.ndarray]:
        return [x for name, x in arrays_of(state).items() if name.endswith(f"mlp.{READERS[c.mlp]}.{leaf}")]

    rows = []
    for run in runs[runs["status"] == "done"].to_dict("records"):
        trained = load_model(f"{job.raw}/{run['run_id']}")
        c = trained.config.model
        start = jax.tree.map(jnp.asarray, build.init_params(c, run["train.seed"]))
        first, state = (shifted(p, READERS[c.mlp], run["shift"]) for p in (start, nnx.split(trained.model)[1]))
        seen = units.watch(c, state, window_WxT1)
        sizes = zip(seen.peak_LxF, units.out_of(state, c), seen.stream_L, strict=True)
        idle = [effectively_dead(*each) for each in sizes]
        rows.append({"activation": c.mlp, "shift": run["shift"], "rate": run["optimizer.learning_rate"],
                     "decay": run["optimizer.weight_decay"], "seed": run["train.seed"], "loss": run["final_loss"],
                     "silent": silent(seen), "silent at the start": silent(units.watch(c, first, window_WxT1)),
                     "idle": np.mean(idle), "active": seen.active_LxF.mean(),
                     "incoming": np.sqrt(np.mean(np.square(reads(state, c, "kernel")))),
                     "incoming at the start": np.sqrt(np.mean(np.square(reads(first, c, "kernel")))),
                     "bias": np.mean(reads(state, c, "bias"))})  # fmt: skip
    return pandas.DataFrame(rows)


def by_cell(rows: Any, column: str, levels: Levels) -> pandas.DataFrame:
    """A line per seed, a column per combination (shift, rate, decay), all eight; NaN for a training that diverged."""
    import pandas

    every = pandas.MultiIndex.from_product([getattr(levels, factor) for factor in FACTORS], names=FACTORS)
    return rows.pivot_table(index="seed", columns=list(FACTORS), values=column).reindex(columns=every)


def effect(rows: Any, factor: str, column: str, levels: Levels) -> pandas.Series:
    """By seed: the mean of a column at the second level of a factor minus that at the first, over the other factors.

    NaN for a seed without all combinations: the means would not be over the same levels of the others.
    """
    cells = by_cell(rows, column, levels)
    first_S, second_S = (
        cells.xs(level, axis=1, level=factor).mean(axis=1, skipna=False) for level in getattr(levels, factor)
    )
    return second_S - first_S


def idle_where_deadly(rows: Any, kind: str, levels: Levels) -> pandas.Series:
    """By seed: the mean idle share of this activation's units over the combinations of `deadly`; NaN for a seed in
    which one of them, or a training of ReLU units, diverged, and where there are none.
    """
    relu = by_cell(rows[rows["activation"] == "relu"], "silent", levels)
    idle = by_cell(rows[rows["activation"] == kind], "idle", levels)[deadly(rows, levels)]
    whole = relu.notna().all(axis=1).reindex(idle.index, fill_value=False)
    return idle.mean(axis=1, skipna=False).where(whole)


def deadly(rows: Any, levels: Levels) -> list[tuple[float, float, float]]:
    """The combinations (shift, rate, decay) at which more than DEADLY of the ReLU units are dead, mean of seeds."""
    dead = by_cell(rows[rows["activation"] == "relu"], "silent", levels).mean()
    return [cell for cell, share in zip(dead.index.to_list(), dead.to_numpy(), strict=True) if share > DEADLY]
