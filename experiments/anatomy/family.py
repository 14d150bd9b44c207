"""One family of small language models that the commands of anatomy, architecture and geometry share.

Sizes x seeds x training time: four-block models of bytes with ReLU MLPs, biases and learned positions (OPT's recipe
in small), trained on the default corpus, with a checkpoint every so many steps and the initial parameters besides. It
is the sweep in `results/raw/anatomy/<scale>`: whichever command comes first trains it, the others find it there, and
any of them goes on with what an interrupted one left.

The rate was chosen on seed 100 at the middle width (held-out loss 2.24 at .001, 1.93 at .003, 1.84 at .006: the
library's default, .005, is kept); the family has seeds 0 to 3. Letters as in model.py; W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.registry import Job, check_complete
from jaxgpt.config import BadInput, ModelConfig, RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas
    from flax import nnx
    from jax import Array

NAME = "anatomy"


@dataclass(frozen=True)
class Size:
    """The family at a scale. kept: steps between checkpoints. windows: of held-out text that measures are taken on."""

    widths: tuple[int, ...]
    seeds: int
    steps: int
    kept: int
    windows: int
    settings: Mapping[str, Any]


PLAIN = {"model.mlp": "relu", "model.bias": True, "model.positions": "learned", "model.d_head": 16,
         "model.n_layers": 4, "model.context": 128, "train.batch_size": 8, "train.eval_windows": 64,
         "optimizer.learning_rate": 5e-3, "optimizer.warmup_steps": 100}  # fmt: skip
SIZES = {
    "smoke": Size((16, 24), 2, 20, 10, 4, {**PLAIN, "model.d_head": 8, "model.n_layers": 2, "model.context": 32,
                  "train.batch_size": 4, "train.eval_windows": 4, "optimizer.warmup_steps": 2}),
    "laptop": Size((32, 64, 96), 4, 2000, 200, 64, PLAIN),
    "paper": Size((256, 512, 1024), 4, 20_000, 1000, 256, {
        **PLAIN, "model.d_head": 64, "model.n_layers": 12, "model.context": 512, "model.vocab_size": 8192,
        "data.tokenizer": "bpe", "train.batch_size": 64, "train.eval_windows": 256, "optimizer.learning_rate": 6e-4,
        "optimizer.warmup_steps": 500}),
}  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A finished run of the family. steps: those with parameters, from 0, the initial ones, to the last."""

    run_id: str
    config: RunConfig
    folder: Path
    steps: tuple[int, ...]

    @property
    def model(self) -> ModelConfig:
        """The model's config."""
        return self.config.model

    @property
    def seed(self) -> int:
        """Of the initial parameters and of the data order."""
        return self.config.train.seed

    @property
    def width(self) -> int:
        """d_model."""
        return self.config.model.d_model


def configs(size: Size) -> list[RunConfig]:
    """Widths x seeds, n_heads by the head's width."""
    return [
        override(RunConfig(), {
            "train.steps": size.steps, "train.keep_every": size.kept, "train.eval_every": size.kept,
            "train.seed": seed, "model.d_model": width, "model.n_heads": width // size.settings["model.d_head"],
            **size.settings,
        })
        for width in size.widths
        for seed in range(size.seeds)
    ]  # fmt: skip


def train(job: Job, minutes: float | None = None) -> tuple[pandas.DataFrame, list[Member]]:
    """(rows, members), trained where they are not yet: rows of all runs, members those that did not diverge.

    minutes: the time left, where the caller has other work before it; None: the job's. Raises Unfinished, and BadInput
    where every run of a width diverged.
    """
    from jaxgpt import sweep
    from jaxgpt.tasks import text

    size, folder = SIZES[job.scale], job.raw.parents[1] / NAME / job.scale
    wanted = configs(size)
    runs = sweep(wanted, folder, setup=text.reader(), max_minutes=job.max_minutes if minutes is None else minutes)
    check_complete(runs, wanted)
    return runs, _members(runs, wanted, folder)


def _members(runs: Any, wanted: list[RunConfig], folder: Path) -> list[Member]:
    from jaxgpt import checkpoint

    by_setting = {(c.model.d_model, c.train.seed): c for c in wanted}
    found = []
    for row in runs[runs["status"] == "done"].to_dict("records"):
        config = by_setting[row["model.d_model"], row["train.seed"]]
        t, there = config.train, checkpoint.steps(folder / "checkpoints" / row["run_id"])
        # Others may have been saved for their own sake, by the clock.
        kept = [step for step in sorted(there) if step == t.steps or (t.keep_every and step % t.keep_every == 0)]
        found.append(Member(row["run_id"], config, folder, (0, *kept)))
    for width in {c.model.d_model for c in wanted} - {member.width for member in found}:
        raise BadInput(f"every run of width {width} diverged, which leaves nothing to look at: lower the rate")
    return sorted(found, key=lambda member: (member.width, member.seed))


def params(member: Member, step: int | None = None) -> nnx.State:
    """The parameters at one of its steps; None: the last. Raises checkpoint.Damaged for one that is not good."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxgpt import build
    from jaxgpt.trained import load_model

    if step == 0:
        return jax.tree.map(jnp.asarray, build.init_params(member.model, member.seed))
    return nnx.split(load_model(f"{member.folder}/{member.run_id}", step=step or member.steps[-1]).model)[1]


def by_seed(rows: Any, column: str) -> numpy.ndarray:
    """One number per seed: the mean over widths, and over whatever else the rows differ in; of seeds that have all
    widths of the table, as the mean of those that are left would be that of another family.
    """
    table = rows.pivot_table(index="seed", columns="width", values=column, dropna=False)
    return table.mean(axis=1, skipna=False).dropna().to_numpy()


def arrays_of(state: nnx.State) -> dict[str, numpy.ndarray]:
    """The parameters by their dotted names."""
    import jax
    import numpy as np

    from jaxgpt.build import param_name

    return {param_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def with_arrays(state: nnx.State, new: Mapping[str, Any]) -> nnx.State:
    """The parameters with those named in `new` in place of their own."""
    import jax
    import jax.numpy as jnp

    from jaxgpt.build import param_name

    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(new[param_name(path)]) if param_name(path) in new else leaf, state
    )


def shuffled(state: nnx.State, seed: int) -> nnx.State:
    """A null: the same numbers in every tensor in another order, so that norms and outliers stay and structure goes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    draw = np.random.default_rng(seed)

    def permuted(leaf: Array) -> Array:
        return jnp.asarray(draw.permutation(np.asarray(leaf).reshape(-1)).reshape(leaf.shape))

    return jax.tree.map(permuted, state)


def held_out(scale: str) -> numpy.ndarray:
    """Windows of validation text, [W, T + 1] int32, evenly over it; the family has not trained on it."""
    import numpy as np

    from jaxgpt.tasks import text

    size = SIZES[scale]
    config = override(configs(size)[0], {"train.eval_windows": size.windows})
    return np.asarray(text.reader()(config).data().validation_WxT1).astype(np.int32)


@cache
def losses(model: ModelConfig) -> Callable[[nnx.State, Any], Array]:
    """A compiled function of parameters and windows [W, T + 1]: loss of each window's tokens [W, T], nats."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from jaxgpt import build

    def of(state: nnx.State, window_WxT1: Array) -> Array:
        def one(window_T1: Array) -> Array:
            logits_1xTxV = nnx.merge(build.graphdef(model), state)(window_T1[None, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits_1xTxV[0].astype(jnp.float32), window_T1[1:])

        return jax.lax.map(one, window_WxT1, batch_size=8)

    return jax.jit(of)
